"""Bad input as a new user, a broken client or an attacker sends it: each a 4xx in OpenAI's shape, at once."""

import io
import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from cluster.drawing_routes import EDITS_ROUTE, GENERATIONS_ROUTE
from cluster.images_api import make_app
from cluster.placement import ServeSection
from tests.endpoint import open_desk

LIMITS = ServeSection(
    max_body_bytes=20_000, max_upload_bytes=100_000, max_upload_pixels=4096, default_steps=2, capture_share=0
)
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def client(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with (
        open_desk(tiny_base, tmp_path_factory.mktemp("workspace"), LIMITS, resolution_px=16) as desk,
        TestClient(make_app(desk), "http://localhost", raise_server_exceptions=False) as client,
    ):
        yield client


def part(name: str, content: bytes, filename: str | None = None, more: str = "") -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n{more}\r\n'.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def png(width: int = 16, height: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def with_text_bomb() -> bytes:
    """A PNG whose compressed text is 60 MB."""
    data = b"Comment\0\0" + zlib.compress(b"x" * 60_000_000, 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = png()
    return whole[:33] + chunk + whole[33:]


KEPT = "ffffffff-" + "a" * 32 + ".png"
"""The form of a picture's name; none is kept under it."""
PICTURE, PROMPT = part("image", png(), "a.png"), part("prompt", b"x")
BODIES: list[Any] = [
    *(None, 5, "text", [], [{}], {}, {"prompt": None}, {"prompt": ""}, {"prompt": {}}, {"prompt": ["x"]}),
    *({"prompt": True}, {"prompt": "x" * 2001}, {"prompt": "a\x00"}, {"Prompt": "x"}, {"prompt": "x", "": 1}),
    *({"prompt": "x", "n": n} for n in (0, -1, 9, 1.5, "1", True, [], 10**400)),
    *(
        {"prompt": "x", "size": size}
        for size in (5, "", "0x0", "16x", "x16", "16X16", "-16x16", "1e2x16", "16x16x", "１６x16")
    ),
    *({"prompt": "x", "size": size} for size in ("17x16", "1024x1024", "9" * 9999 + "x16", ["16x16"], "16 x 16")),
    *({"prompt": "x", "seed": seed} for seed in (-1, 2**53, 0.5, "7", {})),
    *({"prompt": "x", "steps": steps} for steps in (0, 101, -5, "many", 1e3)),
    *({"prompt": "x", "guidance_scale": scale} for scale in (-1, 31, "3", [])),
    *({"prompt": "x", "response_format": kind} for kind in ("png", 5, "URL", ["url"])),
    *({"prompt": "x", "output_format": kind} for kind in ("gif", "PNG", 1)),
    # Texts that look like others, lie about their length, or end where half a letter is.
    *({"prompt": "x", "size": size} for size in ("64\u00d764", "\u0666\u0664x64", "64x64\u202e", "\ufeff64x64")),
    *({"prompt": prompt} for prompt in ("\ud83d", "x\udc00", "\u0000", "\u0301" * 2001, "\U0001f468\u200d" * 1001)),
    *({"prompt": "x", name: 1} for name in ("\uff4e", "se\u0435d", "steps ", "N")),
    # Addresses are made here, never taken: no field leads to a file or to another host.
    *(
        {"prompt": "x", field: value}
        for field, value in (
            *(("url", "file:///etc/passwd"), ("url", "../../etc/passwd"), ("image_url", "http://169.254.169.254/")),
            *(("response_format", "url/../x"), ("response_format", "file:///tmp"), ("model", "models:/fresco/../4")),
            *(("model", "../../etc/passwd"), ("model", "s3://bucket/key"), ("output_format", "../png")),
        )
    ),
    *(
        {"prompt": "x", **more}
        for more in ({"stream": "yes"}, {"model": "dall-e-3"}, {"model": 5}, {"scheduler": "magic"})
    ),
    *(
        {"prompt": "x", **more}
        for more in ({"priority": 99}, {"deadline_s": -1}, {"postprocess": ["rm -rf"]}, {"user": 5})
    ),
    *({"prompt": "x", **more} for more in ({"x" * 9000: 1}, {"model": "x" * 9000}, {"y" * 9000: {"z" * 9000: 1}})),
    *(
        {"prompt": "x", **more}
        for more in ({"negative_prompt": "y" * 2001}, {"background": "transparent"}, {"__proto__": {}})
    ),
]
RAW: list[tuple[str, dict[str, str], bytes]] = [
    *(
        (GENERATIONS_ROUTE, JSON, body)
        for body in (b"", b"{", b"\xff", b'{"prompt": "x"} x', b'{"prompt": NaN}', b"[" * 9000)
    ),
    *(
        (GENERATIONS_ROUTE, JSON, body)
        for body in (b'{"prompt": "\\ud800"}', b" " * 20_001, b'{"n":' + b"9" * 9000 + b"}")
    ),
    *(
        (GENERATIONS_ROUTE, {"content-type": kind}, b'{"prompt": "x"}')
        for kind in ("text/plain", "multipart/form-data", "é/ü")
    ),
    (GENERATIONS_ROUTE, {**JSON, "content-encoding": "gzip"}, zlib.compress(b'{"prompt": "x"}')),
    *((EDITS_ROUTE, JSON, body) for body in (b"{}", b'{"prompt": "x", "image": "AAAA"}')),
    *(
        (EDITS_ROUTE, {"content-type": kind}, b"")
        for kind in ("multipart/form-data", "multipart/form-data; boundary=", "")
    ),
    *((EDITS_ROUTE, {"content-type": "multipart/form-data; boundary=" + "b" * size}, b"--") for size in (1, 5000)),
    *((EDITS_ROUTE, FORM, body) for body in (b"", b"--b", b"--b--\r\n", form(PROMPT), form(PICTURE), PICTURE + PROMPT)),
    *(
        (EDITS_ROUTE, FORM, form(PROMPT, part("image", image, "a.png")))
        for image in (b"", b"GIF89a", png()[:50], b"x" * 99)
    ),
    *((EDITS_ROUTE, FORM, form(PROMPT, part("image", image, "a.png"))) for image in (png(65, 64), with_text_bomb())),
    (EDITS_ROUTE, FORM, form(PROMPT, part("image", b"x" * 100_001, "a.png"))),
    *(
        (EDITS_ROUTE, FORM, form(PICTURE, PROMPT, part(*more)))
        for more in (("n", b"two"), ("seed", b"\xff"), ("strength", b"2"))
    ),
    *(
        (EDITS_ROUTE, FORM, form(PICTURE, PROMPT, part(*more)))
        for more in (("size", b"1x1"), ("../x", b""), ("mask", b"text"))
    ),
    (EDITS_ROUTE, FORM, form(PICTURE, PICTURE, PROMPT)),
    (EDITS_ROUTE, FORM, form(PICTURE, PROMPT, part("mask", png(8, 8), "../../etc/passwd"))),
    (EDITS_ROUTE, FORM, form(PICTURE, PROMPT, *(part(f"f{number}", b"") for number in range(99)))),
]
REQUESTS = [
    *((GENERATIONS_ROUTE, JSON, json.dumps(body).encode()) for body in BODIES if body != {"prompt": "x", "steps": None})
]
REQUESTS += RAW


def check(answer: Any, spent_s: float) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"], error
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 2000
    assert len(error["param"] or "") <= 200
    assert spent_s < 1


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_malformed_body_is_refused_in_openai_shape_within_a_second(client: TestClient, number: int) -> None:
    path, headers, content = REQUESTS[number]
    start = time.process_time()
    raw = {key: value.encode() for key, value in headers.items()}
    check(client.post(path, headers=raw, content=content), time.process_time() - start)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(
            ("GET", GENERATIONS_ROUTE),
            ("PUT", EDITS_ROUTE),
            ("DELETE", "/v1/models"),
            ("TRACE", "/"),
            ("POST", "/healthz"),
        ),
        *(
            ("GET", "/v1/models/../../etc/passwd"),
            ("GET", "/v1/models/%00"),
            ("GET", "/v2"),
            ("GET", "/%ff"),
            *(("GET", f"{path}/{'x' * 9000}") for path in ("/v1/models", "/v2")),
        ),
        *(
            ("GET", f"/v1/pictures/{name}")
            for name in ("x", "..%2f..%2fetc%2fpasswd", "%2e%2e%5c", "a%00b", "☀" * 99, "")
        ),
        # A name of the right form and length, with a way out of the folder before, inside or after it.
        *(
            ("GET", f"/v1/pictures/{name}")
            for name in (
                *(f"%2e%2e/{KEPT}", f"..%2f{KEPT}", f"%252e%252e%252f{KEPT}", f"{KEPT}%00.png", f"{KEPT}/..%2fkeys"),
                *(f"%5c..%5c{KEPT}", f"{KEPT}%0a", f"file:%2f%2f{KEPT}", KEPT.replace("a", "%2f", 1), KEPT + ".json"),
            )
        ),
        *(("DELETE", f"/v1/requests/{name}") for name in ("..%2f..", "%00", "x" * 5000, "☀")),
    ],
)
def test_wrong_address_or_method_is_refused_in_openai_shape(client: TestClient, method: str, path: str) -> None:
    start = time.process_time()
    check(client.request(method, path), time.process_time() - start)


def test_form_that_another_sites_page_posts_is_refused_before_it_is_read(client: TestClient) -> None:
    answer = client.post(EDITS_ROUTE, headers={**FORM, "origin": "http://evil.example"}, content=form(PICTURE, PROMPT))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site_request")
    rebound = client.get("/v1/models", headers={"host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "host_not_allowed")


def test_there_are_enough_of_them() -> None:
    assert len(REQUESTS) >= 60


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["n", "size", "seed", "steps", "guidance_scale", "stream", "user", "postprocess", "priority", "x"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(FIELDS | st.just("prompt"), VALUES, max_size=4) | VALUES)
def test_any_json_is_drawn_or_refused(client: TestClient, body: Any) -> None:
    answer = client.post(GENERATIONS_ROUTE, headers=JSON, content=json.dumps(body).encode())
    assert answer.status_code == 200 or (400 <= answer.status_code < 500 and answer.json()["error"]["code"])


# Starlette leaves the file of a part that never ends to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=300) | st.lists(st.sampled_from([PICTURE, PROMPT, b"--b", b"\r\n", b"--"])).map(b"".join)
)
def test_any_form_is_read_or_refused(client: TestClient, content: bytes) -> None:
    answer = client.post(EDITS_ROUTE, headers=FORM, content=content)
    assert answer.status_code == 200 or (400 <= answer.status_code < 500 and answer.json()["error"]["code"])
