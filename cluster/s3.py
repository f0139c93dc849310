"""How do single objects of a bucket get read and written so that no fault of the network passes for an answer?

One boto3 client for everything. Requests are retried by it (throttling, 5xx, broken connections, timeouts); a body that
arrives cut short or damaged is read again here, as often. Lengths are always checked, checksums where the object has
one, and an ETag that is an MD5. Conditional writes are S3's own (If-None-Match, If-Match), and a lost answer to one is
told from a lost race by a mark in the object's metadata. `worded` makes boto3's errors Fresco's.
"""

import hashlib
import io
import logging
import os
import random
import re
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

from cluster.errors import BucketError, StorageError
from cluster.redaction import redacted

LOG = logging.getLogger(__name__)
MAX_ATTEMPTS = 4
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
BACKOFF_S = 0.5
MAX_CONNECTIONS = 32
PART_BYTES = 16 * 2**20
MULTIPART_BYTES = 64 * 2**20
"""From this size an object is uploaded in parts, each retried by itself; it appears when all are there, or never."""
WRITER = "fresco-writer"
NOT_THERE = "NoSuchKey"
"""What S3 itself says of an object that is not there; any other 404 may be a proxy's, and proves nothing."""
NO_BUCKET = "NoSuchBucket"
WORDLESS = ("404", "NotFound")
"""A 404 without S3's words: every one that answers HEAD, and those that are not from S3."""
EMPTY = "InvalidRange"
"""An object of no bytes has no first one."""
CONDITION_FAILED = ("PreconditionFailed", "412")
TRY_AGAIN = ("ConditionalRequestConflict", "409")
WRONG_CLOCK = ("RequestTimeTooSkewed", "RequestExpired")
NO_BUCKET_ADVICE = "create it, or correct the name or AWS_ENDPOINT_URL"
STRANGER_ADVICE = "not S3 but something before it said so: check AWS_ENDPOINT_URL, and proxies and routes on the way"
_MD5 = re.compile(r"[0-9a-f]{32}")
_MADE: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Clients of this process."""
EXPRESS_BUCKET = "--x-s3"
"""How the names of S3 Express buckets end: their ETags look like an MD5 and are none. So do some of Google's."""


def client() -> Any:
    """Return the client for this process's AWS_* variables; made once, safe between threads."""
    return _client_for(tuple(sorted(aws_environment().items())), os.getpid())


def aws_environment() -> dict[str, str]:
    """Return this process's AWS_* variables."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def secrets() -> list[str]:
    """Return the secrets that this process's clients sign with, wherever in the AWS chain they came from.

    Of clients that were made: making one, or asking a role for new keys, would ask the network.
    """
    found = set()
    for made in list(_MADE):
        credentials = getattr(getattr(made, "_request_signer", None), "_credentials", None)
        held = getattr(credentials, "_frozen_credentials", credentials)  # a role's, None before the first request
        found |= {str(secret) for secret in (getattr(held, "secret_key", ""), getattr(held, "token", "")) if secret}
    return sorted(found)


def read(bucket: str, key: str, **conditions: Any) -> tuple[bytes, str]:
    """Return an object's bytes (or the Range asked for) and its ETag."""
    content, answer = read_answer(bucket, key, **conditions)
    return content, tag_of(answer)


def read_answer(bucket: str, key: str, **conditions: Any) -> tuple[bytes, dict[str, Any]]:
    """Return what `read` does, and all that boto3 says of the object instead of its ETag."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        answer = client().get_object(Bucket=bucket, Key=key, **conditions)
        try:
            with closing(answer["Body"]) as body:
                content = bytes(body.read())
            _check_whole(content, answer, bucket)
            return content, answer
        except _damage() as error:
            pause(attempt, f"read s3://{bucket}/{key}", error)
    raise AssertionError("the last pause raises")


def head(bucket: str, key: str) -> dict[str, Any]:
    """Return what boto3 says of an object without its bytes; ClientError NoSuchKey when there is none.

    An answer to HEAD has no words, so its 404 may be anybody's, a proxy's too: GET is asked whose it was.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            found: dict[str, Any] = client().head_object(Bucket=bucket, Key=key)
            return found
        except client().exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in WORDLESS:
                raise
            unsaid = error
        try:
            client().get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
        except client().exceptions.ClientError as error:
            if error.response["Error"]["Code"] != EMPTY:
                raise
        pause(attempt, f"read s3://{bucket}/{key}", unsaid)  # it is there: it came between the two requests
    raise AssertionError("the last pause raises")


def write(bucket: str, key: str, content: bytes) -> None:
    """Write a whole object or none, replacing what was there."""
    if len(content) < MULTIPART_BYTES:
        client().put_object(Bucket=bucket, Key=key, Body=content)
        return
    from boto3.s3.transfer import TransferConfig

    parts = TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=PART_BYTES)
    client().upload_fileobj(io.BytesIO(content), bucket, key, Config=parts)


def write_if(bucket: str, key: str, content: bytes, etag: str | None) -> bool:
    """Write the object if its ETag still is `etag` (None: if there is no object); say whether that was so."""
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": f'"{etag}"'}
    mark = uuid.uuid4().hex
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=content, Metadata={WRITER: mark}, **condition)
            return True
        except client().exceptions.ClientError as error:
            code = error.response["Error"]["Code"]
            if code in CONDITION_FAILED:
                # Perhaps by our own write, whose answer was lost and which the client then sent again.
                return _mark_of(bucket, key) == mark
            if etag is not None and code == NOT_THERE:
                return False
            if code not in TRY_AGAIN:
                raise
            pause(attempt, f"write s3://{bucket}/{key}", error)
    raise AssertionError("the last pause raises")


def delete(bucket: str, key: str) -> None:
    """Remove an object; nothing there is fine."""
    client().delete_object(Bucket=bucket, Key=key)


def pages(bucket: str, prefix: str, **after: str) -> Iterator[dict[str, Any]]:
    """Yield the objects below a prefix (StartAfter: behind that key) in the order of their keys, as boto3 has them."""
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **after):
        yield from page.get("Contents", ())


@contextmanager
def worded(verb: str, uri: str) -> Iterator[None]:
    """Turn what boto3 raises into FileNotFoundError or StorageError; not chained, a cause's text may hold secrets."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if verb == "read" and code == NOT_THERE:
            raise FileNotFoundError(f"{redacted(uri)} expected to be there, found nothing") from None
        if code == NO_BUCKET:
            found = f"bucket {uri.split('/')[2]!r} does not exist"
            raise BucketError(message(verb, uri, found, NO_BUCKET_ADVICE)) from None
        advice = STRANGER_ADVICE if code in WORDLESS else _clock_advice(error)
        raise StorageError(message(verb, uri, error, advice)) from None
    except (OSError, BotoCoreError, ResponseParserError, HTTPError, ValueError) as error:
        raise StorageError(message(verb, uri, error)) from None


def message(verb: str, uri: str, error: Exception | str, advice: str = "") -> str:
    """Word a failure: where, why, what to do; without credentials."""
    remote = uri.startswith("s3://")
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    where = f" at {address}" if remote and address else ""
    advice = advice or f"check that it exists, that you may {verb} it, and that there is room and network"
    return redacted(f"could not {verb} {uri}{where}: {error}; {advice}", secrets() if remote else ())


def _clock_advice(error: Any) -> str:
    """What to do when an answer says that this machine's clock is wrong; empty for other errors."""
    if error.response["Error"].get("Code") not in WRONG_CLOCK:
        return ""
    there = error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("date", "")
    try:
        ahead_s = time.time() - parsedate_to_datetime(there).timestamp()
    except ValueError:
        return "set this machine's clock: requests are signed with the time"
    way = "ahead of" if ahead_s > 0 else "behind"
    return f"this machine's clock is {abs(ahead_s):.0f} s {way} the storage's; set it, requests are signed with it"


@lru_cache(maxsize=4)
def _client_for(environment: tuple[tuple[str, str], ...], process: int) -> Any:
    import boto3
    from botocore.config import Config

    # Its debug lines hold request headers, and those the session token.
    for noisy in ("botocore", "boto3", "s3transfer", "urllib3"):
        if logging.getLogger(noisy).level == logging.NOTSET:
            logging.getLogger(noisy).setLevel(logging.INFO)
    made = boto3.session.Session().client(
        "s3",
        config=Config(
            retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=MAX_CONNECTIONS,
        ),
    )
    _MADE.add(made)
    return made


def _damage() -> tuple[type[Exception], ...]:
    """What a body that does not arrive whole raises while it is read."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    return (
        exceptions.IncompleteReadError,
        exceptions.ResponseStreamingError,
        exceptions.ReadTimeoutError,
        exceptions.FlexibleChecksumError,
        HTTPError,  # boto3 lets some through, such as an error of TLS in the middle of a body
        ConnectionError,
        TimeoutError,
    )


def _check_whole(content: bytes, answer: dict[str, Any], bucket: str) -> None:
    """Raise what `_damage` lists when the bytes are not those of the object (its checksum was checked by boto3)."""
    from botocore.exceptions import FlexibleChecksumError, IncompleteReadError

    if len(content) != int(answer["ContentLength"]):
        raise IncompleteReadError(actual_bytes=len(content), expected_bytes=int(answer["ContentLength"]))
    if _has_md5(answer, bucket) and hashlib.md5(content, usedforsecurity=False).hexdigest() != tag_of(answer):
        raise FlexibleChecksumError(error_msg=f"{len(content)} bytes came that do not match the ETag {tag_of(answer)}")


def tag_of(answer: dict[str, Any]) -> str:
    """Return the ETag of an answer without its quotes."""
    return str(answer["ETag"]).strip('"')


def _has_md5(answer: dict[str, Any], bucket: str) -> bool:
    """Say whether the answer is a whole object whose ETag is the MD5 of its bytes."""
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    foreign = bucket.endswith(EXPRESS_BUCKET) or any(name.lower().startswith("x-goog-") for name in headers)
    plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
    return plain and not foreign and "ContentRange" not in answer and _MD5.fullmatch(tag_of(answer)) is not None


def _mark_of(bucket: str, key: str) -> str | None:
    try:
        found: str | None = read_answer(bucket, key)[1]["Metadata"].get(WRITER)
        return found
    except client().exceptions.ClientError as error:
        if error.response["Error"]["Code"] != NOT_THERE:
            raise
    return None


def pause(attempt: int, what: str, error: Exception) -> None:
    """Wait before the next attempt, longer each time; after the last one raise."""
    if attempt == MAX_ATTEMPTS:
        raise error
    LOG.warning("could not %s (attempt %d of %d): %s", what, attempt, MAX_ATTEMPTS, redacted(str(error), secrets()))
    time.sleep(random.uniform(0, BACKOFF_S * 2**attempt))
