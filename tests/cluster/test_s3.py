"""What the network may do to a request, and what comes of it: the right bytes after bounded retries, or a StorageError.

Never other bytes, never half an object, never a secret in a message.
"""

import io
import logging
import threading
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.response import StreamingBody
from urllib3.exceptions import SSLError

from cluster import s3, storage
from cluster.errors import BucketError, StorageError
from tests.faults import (
    CONFLICT,
    FLIP,
    HANG,
    LOST_ANSWER,
    NOT_FOUND,
    RESET,
    SHORTEN,
    SLOW_DOWN,
    TRUNCATE,
    WRONG_CLOCK,
    Network,
    Rule,
)

CONTENT = bytes(range(256)) * 40
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYDISTINCTIVE"
TOKEN = "FwoGZXIvYXdzEDISTINCTIVEtoken//////////wEaDA=="


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "BACKOFF_S", 0.01)


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 4.0)
    s3._client_for.cache_clear()
    yield
    s3._client_for.cache_clear()


@pytest.fixture
def stored(bucket: str) -> str:
    storage.write_bytes_atomic(f"{bucket}/a/picture.png", CONTENT)
    return f"{bucket}/a/picture.png"


@pytest.fixture
def stored_without_checksum(bucket: str) -> str:
    """As older clients upload: nothing but the ETag tells what the bytes were."""
    from botocore.config import Config

    client = boto3.client("s3", config=Config(request_checksum_calculation="when_required"))
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key="old.png", Body=CONTENT)
    return f"{bucket}/old.png"


@pytest.mark.parametrize("fault", [SLOW_DOWN, RESET, TRUNCATE, SHORTEN, FLIP])
def test_a_read_that_meets_a_fault_twice_gets_the_right_bytes(fault: str, stored: str, s3_network: Network) -> None:
    s3_network.plan(Rule(fault, 2, "GET .*picture"))
    assert storage.read_bytes(stored) == CONTENT
    assert s3_network.struck == [fault, fault]


@pytest.mark.parametrize("fault", [SHORTEN, FLIP])
def test_an_object_without_checksum_is_held_against_its_etag(
    fault: str, stored_without_checksum: str, s3_network: Network
) -> None:
    s3_network.plan(Rule(fault, 1, "GET .*old"))
    assert storage.read_bytes(stored_without_checksum) == CONTENT
    assert s3_network.struck == [fault]


@pytest.mark.parametrize(
    ("fault", "said"),
    [(SLOW_DOWN, "SlowDown"), (RESET, "closed|reset|broken"), (TRUNCATE, "read"), (SHORTEN, "match"), (FLIP, "match")],
)
def test_a_read_whose_faults_do_not_end_fails_after_bounded_attempts_and_says_why(
    fault: str, said: str, stored: str, s3_network: Network
) -> None:
    s3_network.plan(Rule(fault, 1000, "GET .*picture"))
    with pytest.raises(StorageError, match=rf"could not read {stored} at http://127.*(?i:{said})"):
        storage.read_bytes(stored)
    assert len(s3_network.seen) == s3.MAX_ATTEMPTS


@pytest.mark.parametrize("times", [2, s3.MAX_ATTEMPTS])
def test_a_tls_error_in_the_middle_of_a_body_is_tried_again_and_then_said(stored: str, times: int) -> None:
    """As urllib3 raises it, and boto3 lets it through: no OSError and no error of boto3."""
    left = [SSLError("[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC]")] * times

    class Torn(io.BytesIO):
        def read(self, amount: int | None = None) -> bytes:
            raise left.pop()

    def tear(parsed: dict[str, Any], **_: object) -> None:
        if left:
            parsed["Body"].close()
            parsed["Body"] = StreamingBody(Torn(), len(CONTENT))

    events = s3.client().meta.events
    events.register("after-call.s3.GetObject", tear)
    try:
        if times < s3.MAX_ATTEMPTS:
            assert storage.read_bytes(stored) == CONTENT
        else:
            with pytest.raises(StorageError, match=rf"could not read {stored} at http.*DECRYPTION_FAILED.*network"):
                storage.read_bytes(stored)
    finally:
        events.unregister("after-call.s3.GetObject", tear)
    assert left == []


def test_an_answer_that_never_comes_is_asked_for_again(short_timeouts: None, stored: str, s3_network: Network) -> None:
    s3_network.hang_s = 6.0
    s3_network.plan(Rule(HANG, 1, "GET .*picture"))
    assert storage.read_bytes(stored) == CONTENT


@pytest.mark.parametrize("fault", [SLOW_DOWN, RESET, LOST_ANSWER])
def test_a_write_that_meets_a_fault_twice_is_whole(fault: str, bucket: str, s3_network: Network) -> None:
    s3_network.plan(Rule(fault, 2, "PUT .*new"))
    storage.write_bytes_atomic(f"{bucket}/new", CONTENT)
    s3_network.plan()
    assert storage.read_bytes(f"{bucket}/new") == CONTENT


def test_a_write_that_is_throttled_for_ever_fails_and_leaves_what_was_there(stored: str, s3_network: Network) -> None:
    s3_network.plan(Rule(SLOW_DOWN, 1000, "PUT"))
    with pytest.raises(StorageError, match=rf"could not write {stored} .*SlowDown.*room and network"):
        storage.write_bytes_atomic(stored, b"new")
    assert len(s3_network.seen) == s3.MAX_ATTEMPTS
    s3_network.plan()
    assert storage.read_bytes(stored) == CONTENT


@pytest.mark.parametrize("fault", [SLOW_DOWN, RESET, TRUNCATE, LOST_ANSWER])
def test_a_listing_that_meets_faults_is_complete_and_in_order(fault: str, bucket: str, s3_network: Network) -> None:
    for index in range(5):
        storage.write_bytes_atomic(f"{bucket}/set/{index}.png", b"x")
    s3_network.plan(Rule(fault, 2, "GET .*list-type"))
    assert [entry.uri for entry in storage.list_files(f"{bucket}/set")] == [f"{bucket}/set/{i}.png" for i in range(5)]
    assert s3_network.struck == [fault, fault]


def test_a_listing_that_is_cut_short_in_its_text_is_refused_not_taken_for_fewer_files(
    bucket: str, s3_network: Network
) -> None:
    for index in range(5):
        storage.write_bytes_atomic(f"{bucket}/set/{index}.png", b"x")
    s3_network.plan(Rule(SHORTEN, 1000, "GET .*list-type"))
    with pytest.raises(StorageError, match=f"could not list {bucket}/set"):
        storage.list_files(f"{bucket}/set")


def test_a_404_that_is_not_s3s_own_is_an_error_and_never_nothing_there(stored: str, s3_network: Network) -> None:
    """As an ingress answers while the server behind it is replaced: "default backend - 404"."""
    _, tag = storage.read_tagged(stored)
    s3_network.plan(Rule(NOT_FOUND, 1000))
    folder = stored.rpartition("/")[0]
    for ask in (
        lambda: storage.read_bytes(stored),
        lambda: storage.open_input(stored),
        lambda: storage.list_files(folder),
        lambda: storage.exists(folder),
        lambda: storage.replace_if(stored, b"new", tag),
    ):
        with pytest.raises(StorageError, match=r"404.*not S3 but something before it said so: check AWS_ENDPOINT_URL"):
            ask()
    s3_network.plan(Rule(NOT_FOUND, 1, "HEAD"))
    with storage.open_input(stored) as file:
        assert file.read() == CONTENT
    storage.write_bytes_atomic(stored, b"")
    s3_network.plan(Rule(NOT_FOUND, 1, "HEAD"))
    with storage.open_input(stored) as file:
        assert file.read() == b"", "an object of no bytes is there too"


def test_a_bucket_that_does_not_exist_is_said_and_is_no_empty_one(bucket: str) -> None:
    nowhere = f"{bucket}-typo"
    for ask in (storage.list_files, storage.exists, storage.read_bytes, storage.open_input, storage.read_tagged):
        with pytest.raises(BucketError, match=rf"{nowhere}/x at .*bucket '{nowhere[5:]}' does not exist; create it"):
            ask(f"{nowhere}/x")


def test_the_writer_whose_answer_was_lost_learns_that_it_won(bucket: str, s3_network: Network) -> None:
    s3_network.plan(Rule(LOST_ANSWER, 1, "PUT .*lease"))
    assert storage.put_if_absent(f"{bucket}/lease", b"mine")
    assert len([request for request in s3_network.seen if request.startswith("PUT")]) == 2
    assert not storage.put_if_absent(f"{bucket}/lease", b"mine")


def test_the_replacer_whose_answer_was_lost_learns_that_it_won(bucket: str, s3_network: Network) -> None:
    storage.write_bytes_atomic(f"{bucket}/record", b"one")
    _, tag = storage.read_tagged(f"{bucket}/record")
    s3_network.plan(Rule(LOST_ANSWER, 1, "PUT .*record"))
    assert storage.replace_if(f"{bucket}/record", b"two", tag)
    assert not storage.replace_if(f"{bucket}/record", b"three", tag)
    assert storage.read_bytes(f"{bucket}/record") == b"two"


def test_a_conflict_with_a_deletion_is_no_lost_race(bucket: str, s3_network: Network) -> None:
    s3_network.plan(Rule(CONFLICT, 2, "PUT .*lease"))
    assert storage.put_if_absent(f"{bucket}/lease", b"mine")
    s3_network.plan(Rule(CONFLICT, 1000, "PUT .*other"))
    with pytest.raises(StorageError, match="ConditionalRequestConflict"):
        storage.put_if_absent(f"{bucket}/other", b"mine")
    assert len(s3_network.seen) == s3.MAX_ATTEMPTS


def test_a_wrong_clock_is_named_with_the_difference(stored: str, s3_network: Network) -> None:
    s3_network.plan(Rule(WRONG_CLOCK, 1000))
    with pytest.raises(StorageError, match=r"RequestTimeTooSkewed.*clock is 1080\d s ahead of the storage's; set it"):
        storage.read_bytes(stored)
    assert len(s3_network.seen) == 1, "asking again would not help"


@pytest.mark.parametrize("pattern", [r"PUT .*partNumber=2", r"POST .*uploadId"])
def test_an_upload_in_parts_that_fails_in_the_middle_leaves_no_object(
    pattern: str, bucket: str, s3_network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 6 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    content = CONTENT * 1600
    s3_network.plan(Rule(RESET, 1000, pattern))
    with pytest.raises(StorageError, match=f"could not write {bucket}/weights"):
        storage.write_bytes_atomic(f"{bucket}/weights", content)
    s3_network.plan()
    assert storage.list_files(bucket) == [] and not storage.exists(f"{bucket}/weights")
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://")), "parts cost money"
    s3_network.plan(Rule(SLOW_DOWN, 2, r"PUT .*partNumber"), Rule(RESET, 1, r"PUT .*partNumber=1"))
    storage.write_bytes_atomic(f"{bucket}/weights", content)
    assert storage.read_bytes(f"{bucket}/weights") == content


def test_a_file_opened_for_seeking_reads_ranges_through_faults(bucket: str, s3_network: Network) -> None:
    content = CONTENT * 800
    storage.write_bytes_atomic(f"{bucket}/table", content)
    s3_network.plan(Rule(SLOW_DOWN, 1, "GET"), Rule(TRUNCATE, 2, "GET"), Rule(RESET, 1, "GET"))
    with storage.open_input(f"{bucket}/table") as file:
        file.seek(7_000_000)
        assert file.read(1000) == content[7_000_000:7_001_000]
        file.seek(-10, 2)
        assert file.read() == content[-10:]
        file.seek(0)
        assert file.read() == content
    assert len(s3_network.struck) == 4


def test_a_range_that_comes_short_is_refused(stored_without_checksum: str, s3_network: Network) -> None:
    with storage.open_input(stored_without_checksum) as file:
        s3_network.plan(Rule(SHORTEN, 1000, "GET"))
        with pytest.raises(StorageError, match=f"could not read {stored_without_checksum}.*were asked for"):
            file.read()


def test_an_object_replaced_while_it_is_read_is_refused(bucket: str) -> None:
    storage.write_bytes_atomic(f"{bucket}/table", CONTENT * 800)
    with storage.open_input(f"{bucket}/table") as file:
        assert file.read(4) == CONTENT[:4]
        storage.write_bytes_atomic(f"{bucket}/table", bytes(len(CONTENT) * 400))
        file.seek(7_000_000)
        with pytest.raises(StorageError, match="replaced while it was read"):
            file.read(10)


@pytest.mark.parametrize("seed", range(3))
def test_storage_under_random_faults_is_right_or_says_that_it_failed(
    seed: int, bucket: str, s3_network: Network
) -> None:
    for index in range(4):
        storage.write_bytes_atomic(f"{bucket}/{index}", CONTENT + bytes([index]))
    faults = (SLOW_DOWN, RESET, TRUNCATE, SHORTEN, FLIP, LOST_ANSWER)
    s3_network.plan(*(Rule(fault, 1000, "GET", chance=0.08) for fault in faults), seed=seed)
    right = failed = 0
    for index in [*range(4)] * 4:
        try:
            assert storage.read_bytes(f"{bucket}/{index}") == CONTENT + bytes([index])
            right += 1
        except StorageError:
            failed += 1
    assert s3_network.struck and right > failed


def test_secrets_appear_in_no_message_and_no_log_line(
    stored: str, s3_network: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_network.url.replace("//", "//somebody:hunter2secret@"))
    caplog.set_level(logging.DEBUG)
    said = []

    def fail(uri: str) -> None:
        for attempt in (storage.read_bytes, storage.list_files, lambda uri: storage.write_bytes_atomic(uri, b"x")):
            with pytest.raises((StorageError, FileNotFoundError)) as raised:
                attempt(uri)
            said.append(f"{raised.value} {raised.value!r} {raised.value.__cause__}")

    for fault in (SLOW_DOWN, WRONG_CLOCK):
        s3_network.plan(Rule(fault, 1000))
        fail(stored)
    s3_network.plan(Rule(TRUNCATE, 1000))
    with pytest.raises(StorageError):
        storage.read_bytes(stored)
    query = f"X-Amz-Credential=AKIA&X-Amz-Signature=0123456789abcdef&x={SECRET}"
    fail(f"https://bucket.s3.amazonaws.com/key?{query}")
    s3_network.plan(Rule(RESET, 1000))
    fail(f"{stored}?{query}")
    # A line break at the end of a token: the HTTP library refuses the header, quoting it.
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN + "\n")
    fail(stored)
    written = "\n".join([*said, caplog.text])
    assert len(said) == 15 and "attempt 1 of" in caplog.text
    for secret in (SECRET, TOKEN, "hunter2secret", "0123456789abcdef", "X-Amz-Signature"):
        assert secret not in written


def test_threads_share_the_client_and_each_reads_its_own(bucket: str) -> None:
    for index in range(8):
        storage.write_bytes_atomic(f"{bucket}/{index}", bytes([index]) * 1000)
    wrong: list[int] = []

    def read(index: int) -> None:
        if storage.read_bytes(f"{bucket}/{index}") != bytes([index]) * 1000:
            wrong.append(index)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
