"""notify: real HTTP servers that take, stall, fail, redirect and hang up; real programs that obey and that do not."""

import base64
import hashlib
import hmac
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import notify, s3, webhook
from cluster.errors import PlacementError
from cluster.hook_command import run_command
from cluster.notify import check, check_form, message_of, send
from cluster.webhook import check_address, post, read_key
from components.errors import InputError
from components.standing import RetrainSection
from flows.config import load_config

KEY = b"a key of the tests, long enough"
SECRET_PATH = "/services/T0SECRET/B0SECRET"
EVENT = {
    "event": "cycle",
    "decision": "promoted",
    "reasons": ["412 arrivals", "drift 0.31"],
    "versions": {"champion": 4},
}


@dataclass
class Receiver:
    """A server that answers by plan (one status a request, then 204), and what it got."""

    url: str
    plan: list[int | str]
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)


@contextmanager
def receiver(*plan: int | str) -> Iterator[Receiver]:
    """`slow` never answers, `drip` sends a byte now and then, `hang_up` closes, a text with :// redirects there."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            served.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            todo = served.plan.pop(0) if served.plan else 204
            if todo == "slow":
                served.release.wait(60)
            elif todo == "drip":
                while not served.release.wait(0.05):
                    self.wfile.write(b"H")
            elif todo == "hang_up":
                self.connection.shutdown(socket.SHUT_RDWR)
            elif isinstance(todo, str):
                self.send_response(307)
                self.send_header("location", todo)
                self.end_headers()
            else:
                self.send_response(todo)
                self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                pass  # the client left

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Receiver(f"http://127.0.0.1:{server.server_port}", list(plan))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        served.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "hook.key"
    path.write_bytes(KEY + b"\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def section(key_file: Path) -> Callable[..., RetrainSection]:
    return lambda **settings: RetrainSection(webhook_secret_file=str(key_file), **settings)


def signed_by(key: bytes, headers: dict[str, str], body: bytes) -> bool:
    """What a receiver does, written from the documentation and not from the sender's code."""
    text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    mine = base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
    return hmac.compare_digest(f"v1,{mine}", headers["webhook-signature"])


def test_message_comes_signed_and_whole(section: Callable[..., RetrainSection]) -> None:
    with receiver(200) as served:
        assert send(section(webhook=served.url + SECRET_PATH), EVENT) == []
    ((headers, body),) = served.got
    told = json.loads(body)
    assert {key: told[key] for key in EVENT} == EVENT and told["id"] == headers["webhook-id"]
    assert signed_by(KEY, headers, body) and abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert not signed_by(KEY, headers, body.replace(b"promoted", b"refused!"))
    assert not signed_by(KEY, {**headers, "webhook-timestamp": "1"}, body)
    assert not signed_by(b"another key of the tests", headers, body)
    assert headers["content-type"] == "application/json"


def test_known_message_has_the_signature_of_the_standards_own_example() -> None:
    """From the Standard Webhooks specification's reference libraries."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    signature = webhook.sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_receiver_of_the_user_guide_takes_what_is_genuine_and_nothing_else(
    section: Callable[..., RetrainSection], key_file: Path, tmp_path: Path
) -> None:
    """The program as it is printed there, in a process of its own."""
    guide = Path(__file__).parents[2] / "docs" / "user-guide.md"
    script = guide.read_text().split("```python\nimport base64")[1].split("```")[0]
    command = [sys.executable, "-c", f"import base64{script}", str(key_file), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert send(section(webhook=url), EVENT) == []
            assert process.stdout.readline() == "cycle promoted 412 arrivals; drift 0.31\n"
            assert post(url, b"another key of the tests", "two", b"{}").endswith("found: status 401")
        finally:
            process.kill()


def test_failure_that_may_pass_is_tried_again_with_the_same_id(section: Callable[..., RetrainSection]) -> None:
    with receiver(500, "hang_up", 204) as served:
        assert post(served.url, KEY, "one", b"{}", waits_s=(0.0, 0.0)) == ""
    assert len(served.got) == 3
    assert {headers["webhook-id"] for headers, _ in served.got} == {"one"}
    assert all(signed_by(KEY, headers, body) for headers, body in served.got)
    with receiver(500, 503, 429, 204) as served:
        found = post(f"{served.url}/x", KEY, "one", b"{}", waits_s=(0.0, 0.0))
    assert found == f"webhook {served.url} expected to take the message, found: status 429 (3 attempts)"


@pytest.mark.parametrize("status", [400, 401, 404, 410])
def test_refusal_is_told_and_not_repeated(status: int) -> None:
    with receiver(status) as served:
        found = post(served.url, KEY, "one", b"{}")
    assert found.endswith(f"found: status {status}") and len(served.got) == 1


@pytest.mark.parametrize("how", ["slow", "drip"])
def test_answer_that_does_not_come_is_waited_for_no_longer_than_the_limit(how: str) -> None:
    with receiver(how, how) as served:
        found = post(served.url, KEY, "one", b"{}", limit_s=0.3, waits_s=(0.0,))
        assert "no answer within 0.3 s (2 attempts)" in found and not served.release.is_set()


def test_redirect_is_not_followed_and_its_place_is_told_without_its_path() -> None:
    with receiver() as other, receiver(f"{other.url}/secret-place", "/elsewhere") as served:
        found = post(served.url, KEY, "one", b"{}")
        assert other.got == [] and len(served.got) == 1
        assert f"status 307, a redirect to {other.url};" in found and "secret-place" not in found
        assert "a redirect to the same host;" in post(served.url, KEY, "two", b"{}") and len(served.got) == 2


def test_nobody_listening_is_told_without_what_the_address_hides(section: Callable[..., RetrainSection]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        found = post(url + SECRET_PATH, KEY, "one", b"{}", waits_s=())
    assert found.startswith(f"webhook {url} expected to take the message, found: ") and "SECRET" not in found


def test_a_proxy_for_http_never_sees_what_stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as proxy, receiver() as served:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert post(served.url, KEY, "one", b"{}") == ""
    assert proxy.got == [] and len(served.got) == 1


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://hooks.example.com/x", "expected https"),
        ("http://127.0.0.1.example.com/", "expected https"),
        ("http://localhost.example.com/", "expected https"),
        ("http://192.168.1.4/", "expected https"),
        ("http://[::2]/", "expected https"),
        ("https://user:hidden-word@hooks.example.com/", "without user or password"),
        ("https://127.0.0.1@hooks.example.com/", "without user or password"),
        ("file:///etc/passwd", "expected an address"),
        ("ftp://hooks.example.com/", "expected an address"),
        ("https://", "expected an address"),
        ("https://host:port/", "expected an address"),
        ("https://[::1/", "expected an address"),
        ("https://host/a b", "expected an address"),
        ("https://host/\nx-header: 1", "expected an address"),
        ("hooks.example.com", "expected an address"),
    ],
)
def test_address_that_is_not_safe_is_refused_when_the_config_is_read(
    address: str, problem: str, key_file: Path
) -> None:
    with pytest.raises(PlacementError, match=problem):
        check_address(address)
    settings = [f"retrain.webhook={json.dumps(address)}", f"retrain.webhook_secret_file={key_file}"]
    with pytest.raises(InputError, match=problem) as error:
        load_config(overrides=settings)
    assert "hidden-word" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["https://hooks.example.com/x?y=1", "http://localhost:8080", "http://[::1]:1/", "HTTPS://A.B/"]
)
def test_address_that_is_safe_is_taken(address: str, key_file: Path) -> None:
    settings = [f"retrain.webhook={json.dumps(address)}", f"retrain.webhook_secret_file={key_file}"]
    assert load_config(overrides=settings).retrain.webhook == address


def test_webhook_without_a_key_and_command_with_open_quotes_are_refused_when_the_config_is_read() -> None:
    with pytest.raises(InputError, match="retrain: webhook_secret_file expected beside webhook, found none"):
        load_config(overrides=["retrain.webhook=https://hooks.example.com"])
    with pytest.raises(InputError, match=r"retrain: command expected .* found: No closing quotation"):
        load_config(overrides=["""retrain.command='sh -c "x'"""])


def test_key_that_others_can_read_or_that_is_none_is_refused_and_nothing_is_sent(
    key_file: Path, tmp_path: Path
) -> None:
    with receiver() as served:
        section = RetrainSection(webhook=served.url, webhook_secret_file=str(key_file))
        for mode in (0o644, 0o640, 0o604, 0o660):
            key_file.chmod(mode)
            (found,) = send(section, EVENT)
            assert f"found mode {mode:o}; run: chmod 600" in found
        key_file.chmod(0o400)
        assert read_key(str(key_file)) == KEY
        key_file.chmod(0o600)
        key_file.write_text("short")
        assert "at least 16 bytes, found 5" in send(section, EVENT)[0]
        key_file.write_text("whsec_!!!")
        assert "expected base64 after whsec_" in send(section, EVENT)[0]
        key_file.unlink()
        assert "found: No such file" in send(section, EVENT)[0]
        key_file.mkdir(mode=0o700)
        assert "found: Is a directory" in send(section, EVENT)[0]
    assert served.got == []


def test_key_in_the_standards_form_is_its_bytes(key_file: Path) -> None:
    key_file.write_text("whsec_" + base64.b64encode(KEY).decode() + "\n")
    assert read_key(str(key_file)) == KEY


def test_nothing_set_tells_nobody() -> None:
    assert send(RetrainSection(), EVENT) == []
    check(RetrainSection())


def test_command_gets_the_event_on_its_input(tmp_path: Path) -> None:
    copy = tmp_path / "a file"
    assert send(RetrainSection(command=f"sh -c {shlex.quote(f'cat > {shlex.quote(str(copy))}')}"), EVENT) == []
    told = json.loads(copy.read_bytes())
    assert {key: told[key] for key in EVENT} == EVENT and told["id"].startswith("fresco_")


def test_command_that_reads_nothing_of_a_large_message_is_no_problem() -> None:
    assert run_command("true", b"x" * 2_000_000) == ""


def test_command_that_fails_is_told_by_its_first_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENG")
    script = 'echo; echo "no room for $AWS_SECRET_ACCESS_KEY \x1b[2J" >&2; echo more; exit 3'
    found = run_command(f"sh -c {shlex.quote(script)}", b"{}")
    assert found == "command 'sh' expected to end with 0, found: exit code 3; it said: no room for [hidden] [2J"


@pytest.fixture
def role_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The secret of a profile that a client of this process signs with; no variable holds it."""
    secret = "wJalrXUtnFEMIofaPROFILE"
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    shared = tmp_path / "credentials"
    shared.write_text(f"[team]\naws_access_key_id = AKIATEST\naws_secret_access_key = {secret}\n")
    for name, value in (("SHARED_CREDENTIALS_FILE", str(shared)), ("PROFILE", "team"), ("DEFAULT_REGION", "eu-west-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    assert secret not in s3.secrets()
    s3.client()
    assert secret in s3.secrets()
    return secret


def test_secret_of_a_profile_is_in_no_message_and_in_nothing_that_is_told_of_a_command(role_secret: str) -> None:
    script = f'cat >&2; echo "no room for {role_secret}"; exit 3'
    found = run_command(f"sh -c {shlex.quote(script)}", b"")
    assert found.endswith("it said: no room for [hidden]")
    with receiver(400) as served:
        assert role_secret not in post(f"{served.url}/{role_secret}", KEY, "one", b"{}")
    sent = json.dumps(notify._plain({"reasons": [f"found key {role_secret}"], "links": {"a": role_secret}}))
    assert role_secret not in sent and sent.count("[hidden]") == 2


def test_telling_makes_no_client_for_a_storage_that_nobody_uses() -> None:
    made = s3._client_for.cache_info().misses
    notify._plain({"reasons": ["a text"]})
    assert run_command("sh -c 'echo no; exit 1'", b"").endswith("it said: no")
    assert s3._client_for.cache_info().misses == made


def test_command_that_prints_without_end_is_heard_to_the_end_in_bounded_memory() -> None:
    code = "import sys\nfor _ in range(400): sys.stdout.write('x' * 65536)\nsys.exit(1)"
    found = run_command(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}", b"{}")
    assert found.endswith("exit code 1; it said: " + "x" * 200)


def test_command_that_does_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 600 & echo $! > {pids}; setsid sleep 600 & echo $! >> {pids}; echo waiting; wait"
    before = set(psutil.Process().children(recursive=True))
    found = run_command(f"sh -c {shlex.quote(script)}", b"{}", limit_s=1.0)
    assert "still running after 1 s, and ended it; it said: waiting" in found
    assert set(psutil.Process().children(recursive=True)) <= before
    started = [int(line) for line in pids.read_text().split()]
    assert len(started) == 2
    until(lambda: not any(alive(pid) for pid in started))


def test_what_a_finished_command_left_behind_is_ended_too(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    assert run_command(f"sh -c {shlex.quote(f'sleep 600 & echo $! > {pid}')}", b"{}", limit_s=20) == ""
    until(lambda: not alive(int(pid.read_text())))


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_command_that_is_none_is_told_and_refused_before_a_loop_begins(tmp_path: Path) -> None:
    section = RetrainSection(command="no-such-program --now")
    assert "found none called 'no-such-program'" in send(section, EVENT)[0]
    with pytest.raises(PlacementError, match="no-such-program"):
        check(section)
    check_form(section)
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    assert "found none called" in send(RetrainSection(command=str(plain)), EVENT)[0]
    plain.chmod(0o755)
    assert "expected to start, found: " in send(RetrainSection(command=str(plain)), EVENT)[0]


def test_both_are_told_and_one_that_fails_does_not_silence_the_other(
    section: Callable[..., RetrainSection], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    with receiver(400) as served:
        both = section(webhook=served.url, command=f"sh -c {shlex.quote(f'cat > {copy}')}")
        (found,) = send(both, EVENT)
        check(both)
    assert "status 400" in found and json.loads(copy.read_bytes()) == json.loads(served.got[0][1])


def test_message_says_what_the_journal_says_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENG")
    line: dict[str, Any] = {
        "time": "2026-11-22T03:00:00Z",
        "event": "cycle",
        "id": "c7",
        "name": "icons",
        "decision": "promoted",
        "reasons": ["412 arrivals", "found key wJalrXUtnFEMIK7MDENG"],
        "champion_before": 3,
        "champion_after": 4,
        "dataset": "icons@b",
        "run_id": "icons-c",
        "report": "/w/reports/promote.html",
        "scorecard": {"kid": float("nan")},
    }
    told = message_of(line, "/somewhere/private/icons-workspace")
    assert told == {
        **{key: line[key] for key in ("time", "event", "name", "decision", "reasons", "id", "run_id", "dataset")},
        "workspace": "icons-workspace",
        "versions": {"champion_before": 3, "champion_after": 4},
        "links": {"report": "/w/reports/promote.html"},
    }
    assert message_of({"event": "monitor", "verdict": "drift"}, "s3://bucket/prefix/w")["decision"] == "drift"
    sent = json.dumps(notify._plain({**told, "effect": float("nan")}))
    assert "[hidden]" in sent and "wJalr" not in sent and "NaN" not in sent


def test_nothing_stays_open_after_many_messages(section: Callable[..., RetrainSection], tmp_path: Path) -> None:
    with receiver() as served:
        both = section(webhook=served.url, command="true")
        send(both, EVENT)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            assert send(both, EVENT) == []
        until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before)
