"""Secrets go, whatever spelling they come in; ordinary text stays as it is."""

import pytest

from cluster.redaction import holds_credentials, redacted

SECRET = "wJalr/UtnFEMI+K7MDENG=bPxRfiCY"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a header {SECRET} was refused", "a header [hidden] was refused"),
        (f"{SECRET.replace('/', '%2F').replace('+', '%2B').replace('=', '%3D')}!", "[hidden]!"),
        (
            "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=ab12 then",
            "https://b.s3.amazonaws.com/k?[hidden] then",
        ),
        ("'https://b/k?AWSAccessKeyId=A&Signature=b%3D&Expires=1'", "'https://b/k?[hidden]'"),
        ("http://h/k%3FX-Amz-Signature%3Dab%26x%3Dy there", "http://h/k?[hidden] there"),
        ("http://user:password@127.0.0.1:9000/b", "http://[hidden]@127.0.0.1:9000/b"),
        ("http://user:p@ss@host/b", "http://[hidden]@host/b"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=A/1, Signature=2", "Authorization: [hidden]"),
        ("s3://bucket/testing/a?list=1 and a@b.c", "s3://bucket/testing/a?list=1 and a@b.c"),
    ],
)
def test_what_may_be_shown(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "testing")
    assert redacted(text) == expected


def test_a_secret_from_elsewhere_goes_too_also_line_by_line() -> None:
    assert redacted(r"b'token-of-a-role\n'", ["token-of-a-role\n"]) == "b'[hidden]'"
    assert redacted("first-line-of-key and second", ["first-line-of-key\nsecond-line"]) == "[hidden] and second"


def test_mlflows_own_secrets_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-to-be-seen")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "nor-this-one")
    assert redacted("said not-to-be-seen and nor-this-one") == "said [hidden] and [hidden]"


@pytest.mark.parametrize(
    ("address", "held"),
    [
        ("http://user:word@host:5000", True),
        ("https://user@host", True),
        ("http://user:p/w@host", True),
        ("http://user:p#w@host", True),
        ("postgresql://user:word@host/db", True),
        ("postgresql://host/db?user=me&password=word", True),
        ("http://host:5000", False),
        ("http://host/mlflow?x=1", False),
        ("sqlite:////home/me@work/mlflow.db", False),
        ("", False),
    ],
)
def test_addresses_with_credentials_are_told_from_those_without(address: str, held: bool) -> None:
    assert holds_credentials(address) is held
