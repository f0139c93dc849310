"""The request log: one line of JSON each, rotated by size, without prompts, keys or line breaks of clients."""

import json
import os
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest

from cluster import request_log
from cluster.request_log import QUIET_ROUTES, RequestLog, line_of
from cluster.request_watch import EndedRequest
from tests.endpoint import wait_for

SERVED = EndedRequest("req_1", "POST", "/v1/images/generations", 200, 1.23456, None, False, 120, 4567, 2, "7", "team")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def test_line_says_what_came_of_a_request() -> None:
    line = line_of(SERVED, now=0.25)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.250Z",
        "request_id": "req_1",
        "method": "POST",
        "route": "/v1/images/generations",
        "status": 200,
        "seconds": 1.2346,
        "rows": 2,
        "version": "7",
        "key": "team",
        "bytes_in": 120,
        "bytes_out": 4567,
    }
    refused = json.loads(line_of(replace(SERVED, status=429, code="queue_full", gone=True, rows=None), 0))
    assert refused["code"] == "queue_full" and refused["gone"] is True and "rows" not in refused


def test_names_cannot_break_a_line() -> None:
    line = line_of(replace(SERVED, key='a\nb"\u2028\u00e9'), now=0)
    assert line.count(b"\n") == 1 and json.loads(line)["key"] == 'a\nb"\u2028\u00e9'


def test_what_is_logged_has_no_place_for_a_prompt() -> None:
    told = {field.name for field in fields(EndedRequest)}
    assert told == {"request_id", "method", "route", "status", "seconds", "code", "gone", "bytes_in", "bytes_out"} | {
        *("rows", "version", "key"),
        *("began", "phases", "trace"),  # times, and ids of the client's trace
    }


def test_lines_go_to_stderr_without_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    log = RequestLog()
    log.ended(SERVED)
    log.close()
    assert json.loads(capsys.readouterr().err)["request_id"] == "req_1"


def test_probes_are_logged_only_when_they_fail(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "logs" / "requests.jsonl")
    for route in QUIET_ROUTES:
        log.ended(replace(SERVED, route=route))
    log.ended(replace(SERVED, route="/readyz", status=503))
    log.close()
    assert [line["status"] for line in lines(tmp_path / "logs" / "requests.jsonl")] == [503]


def test_file_is_rotated_by_size_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    size = len(line_of(replace(SERVED, request_id="req_00"), now=0))
    log = RequestLog(path, max_bytes=size * 3, keep_files=2)
    for number in range(14):
        log.ended(replace(SERVED, request_id=f"req_{number:02d}"))
    log.close()
    kept = ["requests.jsonl", "requests.jsonl.1", "requests.jsonl.2"]
    assert sorted(file.name for file in tmp_path.iterdir()) == kept
    found = [line["request_id"] for name in reversed(kept) for line in lines(tmp_path / name)]
    assert found == [f"req_{number:02d}" for number in range(6, 14)]
    assert all((tmp_path / name).stat().st_size <= size * 3 for name in kept)


def test_files_of_replicas_that_ended_are_removed_but_for_the_last(tmp_path: Path) -> None:
    """Every restart is another replica: 30 of them leave 8, and none takes the file of one that lives."""
    idle = RequestLog(tmp_path / "requests-idle.jsonl")
    idle.ended(SERVED)
    wait_for(lambda: (tmp_path / "requests-idle.jsonl").exists())
    for number in range(30):
        path = tmp_path / f"requests-{number:02d}.jsonl"
        for file in (path, path.with_name(f"{path.name}.1")):
            file.write_text("{}\n")
            os.utime(file, (number, number))
    os.utime(tmp_path / "requests-idle.jsonl", (0, 0))
    log = RequestLog(tmp_path / "requests-new.jsonl")
    log.ended(SERVED)
    log.close()
    idle.ended(SERVED)
    idle.close()
    last = [f"requests-{number}.jsonl{more}" for number in range(22, 30) for more in ("", ".1")]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [*last, "requests-idle.jsonl", "requests-new.jsonl"]
    )
    assert len(lines(tmp_path / "requests-idle.jsonl")) == 2


def test_disk_that_does_not_answer_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads: opening it blocks the thread that writes, as a dead network disk does."""
    path = tmp_path / "requests.jsonl"
    os.mkfifo(path)
    monkeypatch.setattr(request_log, "MOST_WAITING", 3)
    log = RequestLog(path)
    for _ in range(10):
        log.ended(SERVED)
    assert log.lost >= 6
    with path.open("rb"):  # it answers again
        log.close()
    assert not log._thread.is_alive()


def test_reopened_file_is_continued(tmp_path: Path) -> None:
    for _ in range(2):
        log = RequestLog(tmp_path / "requests.jsonl")
        log.ended(SERVED)
        log.close()
    assert len(lines(tmp_path / "requests.jsonl")) == 2


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.jsonl", max_bytes=10_000, keep_files=100)

    def write(name: str) -> None:
        for number in range(50):
            log.ended(replace(SERVED, request_id=f"{name}-{number}"))

    threads = [threading.Thread(target=write, args=(str(index),)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    found = {str(line["request_id"]) for file in tmp_path.iterdir() for line in lines(file)}
    assert len(found) == 400 and log.lost == 0


def test_file_that_cannot_be_written_loses_lines_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "requests.jsonl"
    path.mkdir()
    log = RequestLog(path)
    log.ended(SERVED)
    log.ended(SERVED)
    log.close()
    assert log.lost == 2
    assert capsys.readouterr().err.count("request log expected to be writable") == 1
