"""Pages of other sites are refused, whatever trick brings them here; our own page and programs are not."""

from collections.abc import Mapping

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from cluster.placement import ServeSection
from cluster.same_site import SameSite

FORM = {"content-type": "multipart/form-data; boundary=b"}


def ask(method: str = "POST", host: str = "127.0.0.1:8000", limits: ServeSection | None = None, **headers: str) -> str:
    """Return the code of the refusal, or `passed`."""
    app = FastAPI()
    app.add_api_route("/", lambda: "passed", methods=["GET", "POST", "DELETE"])
    app.add_middleware(SameSite, limits=limits or ServeSection())
    sent: Mapping[str, str] = {"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
    with TestClient(app) as client:
        answer = client.request(method, "/", headers=sent)
    if answer.status_code == 200:
        return str(answer.json())
    assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error", answer.text
    assert len(answer.json()["error"]["message"]) < 600
    return str(answer.json()["error"]["code"])


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9000"},
        {"origin": "http://127.0.0.1:8000.evil.example"},
        {"origin": "https://127.0.0.1"},
        {"origin": "x" * 5000},
        {"origin": "http://[::1"},
        {"sec_fetch_site": "cross-site"},
    ],
)
def test_page_of_another_site_cannot_change_anything(method: str, headers: dict[str, str]) -> None:
    assert ask(method, **FORM, **headers) == "cross_site_request"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "a@b:c"]
)
def test_name_that_was_made_to_point_here_is_not_answered(method: str, host: str) -> None:
    assert ask(method, host, origin=f"http://{host}") == "host_not_allowed"


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1", "127.8.9.1:1", "[::1]:8000", "[::1]"]
)
def test_names_of_this_machine_and_their_own_page_pass(host: str) -> None:
    assert ask("POST", host) == ask("GET", host) == "passed"
    assert ask("POST", host, origin=f"http://{host}", sec_fetch_site="same-origin") == "passed"


def test_reading_is_left_to_the_browsers_own_rule() -> None:
    """No header of ours lets another site's page read an answer."""
    assert ask("GET", origin="http://evil.example", sec_fetch_site="cross-site") == "passed"


def test_host_of_the_config_and_of_the_public_address_pass() -> None:
    limits = ServeSection(host="studio", public_url="https://draw.example/images")
    assert ask("POST", "studio:8000", limits) == ask("POST", "draw.example", limits) == "passed"
    # A proxy in front that asks for its own name, and one that passes the browser's on.
    for host in ("127.0.0.1:8000", "draw.example"):
        assert ask("POST", host, limits, origin="https://draw.example") == "passed"
        assert ask("POST", host, limits, origin="https://draw.example.evil.example") == "cross_site_request"
