"""Pictures by address: any replica resolves them, they expire, the folder is bounded, and no path gets in."""

import os
import re
import threading
from pathlib import Path
from urllib.parse import quote

import pytest
from fastapi import FastAPI, Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from cluster.api_errors import install_handlers
from cluster.errors import StorageError
from cluster.picture_urls import ROUTE, PictureStore, add_route, address_of, open_pictures
from cluster.placement import ServeSection


class Clock:
    """Seconds that pass when they are told to."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> PictureStore:
    return PictureStore(tmp_path / "pictures", ttl_s=60, max_bytes=1000, clock=clock)


def names(store: PictureStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


def app_of(store: PictureStore) -> FastAPI:
    app = FastAPI()
    install_handlers(app, ())
    add_route(app, store)
    return app


def test_another_replica_resolves_the_name(store: PictureStore, clock: Clock) -> None:
    name = store.put(b"picture", "webp")
    found = PictureStore(store.folder, 1, 1, clock).get(name)
    assert found is not None
    assert (found.content, found.media_type) == (b"picture", "image/webp") and 59 <= found.remaining_s <= 61


def test_names_cannot_be_guessed(store: PictureStore) -> None:
    given_out = {store.put(b"", "png") for _ in range(50)}
    tokens = {re.fullmatch(r"[0-9a-f]{8}-([\w-]{32})\.png", name).group(1) for name in given_out}  # type: ignore[union-attr]
    assert len(tokens) == 50


def test_picture_expires_and_is_swept_away(store: PictureStore, clock: Clock) -> None:
    name = store.put(b"picture", "png")
    later = name.replace(name[:8], f"{int(name[:8], 16) + 999:08x}")
    clock.now += 59
    assert store.get(name) is not None and store.get(later) is None, "another expiry is another name"
    clock.now += 3
    assert store.get(name) is None and names(store) == {name}
    other = store.put(b"new", "png")
    assert names(store) == {other}


def test_bytes_are_bounded_and_what_expires_first_goes_first(store: PictureStore, clock: Clock) -> None:
    kept = []
    for _ in range(5):
        kept.append(store.put(b"x" * 300, "png"))
        clock.now += 2
        assert sum(path.stat().st_size for path in store.folder.iterdir()) <= 1000
    assert names(store) == set(kept[-3:])
    with pytest.raises(StorageError, match=r"serve\.url_max_bytes"):
        store.put(b"x" * 1001, "png")
    assert names(store) == set(kept[-3:])


def test_what_a_killed_replica_left_half_written_is_removed_later(store: PictureStore, clock: Clock) -> None:
    store.put(b"picture", "png")
    half = store.folder / ".half.tmp"
    half.write_bytes(b"pict")
    os.utime(half, (clock.now - 10, clock.now - 10))
    store.sweep()
    assert half.exists()
    os.utime(half, (clock.now - 4000, clock.now - 4000))
    store.sweep()
    assert not half.exists() and len(names(store)) == 1


def test_replicas_that_write_and_sweep_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    store = PictureStore(tmp_path / "pictures", ttl_s=60, max_bytes=1000)
    problems: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(30):
                store.put(b"x" * 90, "png")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store.sweep()
    assert problems == [] and sum(path.stat().st_size for path in store.folder.iterdir()) <= 1000


def test_route_hands_out_the_picture_as_a_picture(store: PictureStore) -> None:
    name = store.put(b"picture", "jpeg")
    with TestClient(app_of(store)) as client:
        answer = client.get(f"{ROUTE}/{name}")
        assert (answer.status_code, answer.content) == (200, b"picture")
        assert answer.headers["content-type"] == "image/jpeg" and answer.headers["x-content-type-options"] == "nosniff"
        assert re.fullmatch("private, max-age=6[01]", answer.headers["cache-control"])
        gone = client.get(f"{ROUTE}/{name[:-5]}.webp")
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "not_found"


def test_address_is_below_the_public_url_or_what_the_client_used(store: PictureStore) -> None:
    app = FastAPI()

    @app.get("/address")
    def address(request: Request, public: str = "") -> str:
        return address_of(request, ServeSection(public_url=public), "a.png")

    with TestClient(app, base_url="http://draw.example:81") as client:
        assert client.get("/address").json() == "http://draw.example:81/v1/pictures/a.png"
        known = client.get("/address", params={"public": "https://x.org/fresco/"}).json()
    assert known == "https://x.org/fresco/v1/pictures/a.png"
    opened = open_pictures(ServeSection(url_ttl_s=5, url_max_bytes=2048), store.folder)
    assert (opened.ttl_s, opened.max_bytes) == (5, 2048)


TRICKS = [
    *("../secret.png", "..%2fsecret.png", "%2e%2e/secret.png", "..\\secret.png", "....//secret.png", "/etc/passwd"),
    *(
        "%2fetc%2fpasswd",
        "//etc/passwd",
        "secret.png",
        "..%252fsecret.png",
        "%c0%ae%c0%ae/secret.png",
        "．．/secret.png",
    ),
    *(
        "{name}/",
        "{name}/../../secret.png",
        "./{name}",
        "{name}%00",
        "{name}%0a",
        "{name}?x=1#y/../..",
        "{name}.",
        "{NAME}",
    ),
    *("{name};x", "~/secret.png", "file:///etc/passwd", "%5c%5chost%5cshare", "CON.png", "", ".", ".."),
]


@pytest.mark.parametrize("trick", TRICKS)
def test_path_tricks_reach_nothing(store: PictureStore, trick: str) -> None:
    name = store.put(b"picture", "png")
    (store.folder / "secret.png").write_bytes(b"secret")
    (store.folder.parent / "secret.png").write_bytes(b"secret")
    asked = trick.format(name=name, NAME=name.upper())
    assert store.get(asked) is None
    with TestClient(app_of(store), follow_redirects=True) as client:
        answer = client.get(f"{ROUTE}/{asked}")
    assert answer.content != b"secret" and (answer.status_code in (404, 405) or answer.content == b"picture")
    assert answer.status_code != 200 or asked.startswith((name, "./")), "only the whole name opens it"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80) | st.binary(max_size=80).map(lambda raw: raw.decode("latin-1")))
def test_any_other_name_is_none(store: PictureStore, name: str) -> None:
    store.folder.mkdir(exist_ok=True)
    (store.folder.parent / "secret.png").write_bytes(b"secret")
    assert store.get(name) is None and store.get(quote(name)) is None


def test_kind_that_is_no_picture_is_refused(store: PictureStore) -> None:
    with pytest.raises(ValueError, match=r"found '\.\./x'"):
        store.put(b"", "../x")
