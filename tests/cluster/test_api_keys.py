"""Keys: only hashes are stored, strangers get 401, a used-up minute 429, other addresses need keys."""

import logging
import re
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from cluster.api_errors import ApiError
from cluster.api_keys import Bucket, KeyRing, check_exposure, is_loopback, new_key, read_keys
from cluster.errors import PlacementError
from cluster.images_api import make_app
from cluster.placement import ServeSection
from tests.endpoint import open_desk


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "keys.yaml"


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_key_is_shown_once_and_only_its_hash_is_stored(path: Path, clock: Clock) -> None:
    key = new_key(path, "studio", requests_per_minute=30, priority=7)
    assert re.fullmatch(r"fresco-[\w-]{43}", key) and key[7:] not in path.read_text()
    assert new_key(path, "desk") != key
    first, second = read_keys(path)
    assert (first.name, first.requests_per_minute, first.priority, second.priority) == ("studio", 30, 7, 5)
    assert KeyRing(path, clock).admit(bearer(key)).name == "studio"
    assert [file.name for file in path.parent.iterdir() if not file.name.startswith("keys.yaml")] == []


def test_name_that_is_taken_or_wrong_leaves_the_file_as_it_was(path: Path) -> None:
    new_key(path, "studio")
    before = path.read_bytes()
    for name, said in (("studio", "'studio' again"), ("a b", "found 'a b'"), ("", "found ''"), ("x\n", "found")):
        with pytest.raises(PlacementError, match=said):
            new_key(path, name)
    assert path.read_bytes() == before


def test_keys_made_at_once_are_all_kept(path: Path) -> None:
    threads = [threading.Thread(target=new_key, args=(path, f"key-{number}")) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {key.name for key in read_keys(path)} == {f"key-{number}" for number in range(6)}


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer {half}",
        "Bearer {hash}",
        "Bearer é☀",
    ],
)
def test_stranger_is_401_and_what_was_presented_is_not_repeated(
    path: Path, clock: Clock, authorization: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = new_key(path, "studio")
    presented = authorization and authorization.format(key=key, half=key[:-1], hash=read_keys(path)[0].sha256)
    with pytest.raises(ApiError) as refused:
        KeyRing(path, clock).admit(presented)
    error = refused.value
    assert (error.status, error.code, error.headers) == (401, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
    assert key[:20] not in error.message and key[:20] not in caplog.text


@given(st.text(max_size=300))
def test_any_header_is_answered(header: str) -> None:
    from cluster.api_keys import _find

    with pytest.raises(ApiError):
        _find((), header)


def test_minute_of_a_key_is_used_up_and_comes_back_evenly(path: Path, clock: Clock) -> None:
    key, other = new_key(path, "studio", requests_per_minute=3), new_key(path, "desk")
    ring = KeyRing(path, clock)
    for _ in range(3):
        ring.admit(bearer(key))
    with pytest.raises(ApiError) as refused:
        ring.admit(bearer(key))
    error = refused.value
    assert (error.status, error.code) == (429, "rate_limit_exceeded") and "3 requests a minute" in error.message
    # A third of a minute brings one token; the whole second above is told.
    assert error.headers == {"Retry-After": "21"}
    ring.admit(bearer(other))
    ring.admit(bearer(key), counted=False)
    clock.now += 20.5
    ring.admit(bearer(key))
    with pytest.raises(ApiError):
        ring.admit(bearer(key))


@given(
    st.floats(0.01, 10_000),
    st.lists(st.floats(0, 30), min_size=1, max_size=60),
)
def test_bucket_never_lets_more_through_than_its_rate_and_keeps_its_promise(rate: float, gaps: list[float]) -> None:
    bucket, now, passed = Bucket(rate, 0.0), 0.0, 0
    for gap in gaps:
        now += gap
        wait_s = bucket.take(now)
        assert wait_s >= 0
        passed += wait_s == 0
    assert passed <= bucket.capacity + now * rate / 60 + 1e-6
    wait_s = bucket.take(now)
    if wait_s:
        assert bucket.take(now + wait_s * (1 + 1e-9) + 1e-9) == 0


def test_clock_that_goes_back_takes_nothing_away() -> None:
    bucket = Bucket(60, 100.0)
    assert bucket.take(100) == 0 and bucket.take(50) == 0
    assert bucket.tokens == pytest.approx(58)


def test_changed_file_is_read_again_and_a_wrong_one_locks_nobody_out(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    old = new_key(path, "old")
    ring = KeyRing(path, clock)
    new = new_key(path, "new")
    clock.now += 2
    assert ring.admit(bearer(new)).name == "new"
    path.write_text("- name: [")
    clock.now += 2
    assert ring.admit(bearer(old)).name == "old" and "keys stay as they were" in caplog.text
    path.write_text("[]")
    clock.now += 2
    with pytest.raises(ApiError, match="not known"):
        ring.admit(bearer(old))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name: a", "expected a list of keys .*, found a dict"),
        ("- name: a", "entry 1 .* found sha256 wrong: Field required"),
        ("- [", "expected YAML"),
        ("- hello", "entry 1"),
        (f"- {{name: a, sha256: {'0' * 63}}}", "sha256 wrong"),
        (f"- {{name: a, sha256: {'a' * 64}, requests_per_minute: .nan}}", "requests_per_minute wrong"),
        (f"- {{name: a, sha256: {'a' * 64}, requests_per_minute: 0}}", "requests_per_minute wrong"),
        (f"- {{name: a, sha256: {'a' * 64}, priority: 10}}", "priority wrong"),
        (f"- {{name: a, sha256: {'a' * 64}, key: fresco-secret}}", "key wrong: Extra inputs"),
        (f"- {{name: a, sha256: {'a' * 64}}}\n- {{name: a, sha256: {'b' * 64}}}", "'a' again"),
    ],
)
def test_wrong_file_is_refused_without_repeating_its_values(path: Path, content: str, said: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(PlacementError, match=said) as refused:
        read_keys(path)
    assert "secret" not in str(refused.value) and "a" * 64 not in str(refused.value)


def test_other_addresses_are_refused_without_keys(path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert is_loopback(host)
        check_exposure(ServeSection(host=host))
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(PlacementError, match="fresco serve --new-key NAME"):
            check_exposure(ServeSection(host=host))
    with pytest.raises(PlacementError, match="found nothing"):
        check_exposure(ServeSection(host="0.0.0.0", api_keys_file=str(path)))
    path.parent.mkdir()
    path.write_text("")
    with pytest.raises(PlacementError, match="found none in"):
        check_exposure(ServeSection(host="0.0.0.0", api_keys_file=str(path)))
    new_key(path, "studio")
    check_exposure(ServeSection(host="0.0.0.0", api_keys_file=str(path)))


def test_file_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert ServeSection(api_keys_file="keys.yaml").api_keys_file == str(tmp_path / "keys.yaml")
    assert ServeSection().api_keys_file == ""


def test_routes_that_draw_need_a_key_and_health_does_not(path: Path, tiny_base: Path, tmp_path: Path) -> None:
    key = new_key(path, "studio", requests_per_minute=2)
    limits = ServeSection(api_keys_file=str(path), default_steps=1)
    known = {"Authorization": bearer(key)}
    body = {"prompt": "x"}
    with open_desk(tiny_base, tmp_path, limits, resolution_px=16) as desk, TestClient(make_app(desk)) as client:
        assert client.get("/healthz").status_code == 200 and client.get("/").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers=known).status_code == 200
        assert client.post("/v1/images/generations", json=body).json()["error"]["type"] == "authentication_error"
        answers = [client.post("/v1/images/generations", json=body, headers=known) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert int(answers[2].headers["retry-after"]) in (30, 31)


def test_yaml_of_the_file_is_what_people_can_edit(path: Path) -> None:
    new_key(path, "studio")
    (entry,) = yaml.safe_load(path.read_text())
    assert set(entry) == {"name", "sha256", "requests_per_minute", "priority"}
