"""What may be shown of a text that may hold credentials?

Messages quote addresses and the words of other libraries, and those quote headers (a session token with a line break in
it is refused with the token in the message), user names in addresses and the queries of presigned URLs. Secrets are
found by their value, in every spelling in which a library may quote them; shorter ones than MIN_CHARS are left, since
hiding those would blank out ordinary words.
"""

import os
import re
from collections.abc import Iterable
from urllib.parse import quote

HIDDEN = "[hidden]"
MIN_CHARS = 8
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
_SIGNED_QUERY = re.compile(
    r"(?:\?|%3F)[^\s'\"<>]*(?:X-Amz-(?:Signature|Security-Token|Credential)|Signature|AWSAccessKeyId|sig)(?:=|%3D)[^\s'\"<>]*",
    re.I,
)
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^/\s'\"<>]+@")
_PASSWORD_IN_QUERY = re.compile(r"[?&](?:password|passwd|pwd|token|user|username)=", re.I)
_AUTHORIZATION = re.compile(r"AWS4-HMAC-SHA256 [^'\"\n]*")


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """Return the text without this process's AWS and MLflow secrets, `secrets`, signed queries, users in addresses."""
    known = {*(os.environ.get(name, "") for name in SECRET_VARIABLES), *secrets}
    spellings = {spelling for secret in known for spelling in _spellings(secret) if len(spelling) >= MIN_CHARS}
    for spelling in sorted(spellings, key=len, reverse=True):
        text = text.replace(spelling, HIDDEN)
    text = _SIGNED_QUERY.sub(f"?{HIDDEN}", text)
    text = _USER_IN_ADDRESS.sub(f"{HIDDEN}@", text)
    return _AUTHORIZATION.sub(HIDDEN, text)


def holds_credentials(address: str) -> bool:
    """Say whether an address has a user or a password in it, also one that is not written as it should be."""
    scheme, _, rest = address.partition("://")
    web = scheme.lower() in ("http", "https")
    place = rest if web else re.split(r"[/?#]", rest, maxsplit=1)[0]  # a password may hold a bare slash
    return "@" in place or _PASSWORD_IN_QUERY.search(rest) is not None


def _spellings(secret: str) -> set[str]:
    lines = [line for line in secret.split("\n") if line]
    return {
        spelling
        for part in (secret, secret.strip(), *lines)
        for spelling in (part, repr(part)[1:-1], quote(part, safe=""), quote(part))
    }
