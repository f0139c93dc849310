"""A cancellation reaches the replica that draws, through a folder, and nothing else comes of it."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.cancel_files import ABANDONED_S, ASKED, CancelFiles
from tests.endpoint import wait_for


class Replica:
    """Requests at work by id, with the names of their keys."""

    def __init__(self, **at_work: str) -> None:
        self.at_work = at_work

    def cancel(self, request_id: str, key: str) -> bool:
        return self.at_work.get(request_id) == key and self.at_work.pop(request_id) == key


@pytest.fixture
def asker(tmp_path: Path) -> CancelFiles:
    return CancelFiles(tmp_path, Replica().cancel)


@pytest.fixture
def drawing(tmp_path: Path) -> Iterator[list[Replica]]:
    replicas = [Replica(request_1="anna"), Replica(request_2="", request_3="ben")]
    with ExitStack() as stack:
        for replica in replicas:
            files = CancelFiles(tmp_path, replica.cancel)
            files.start()
            stack.callback(files.close)
        yield replicas


def test_the_replica_that_draws_ends_the_request(asker: CancelFiles, drawing: list[Replica]) -> None:
    assert asker.ask("request_3", "ben")
    assert drawing[1].at_work == {"request_2": ""}
    assert list(asker.folder.iterdir()) == []


@pytest.mark.parametrize(("request_id", "key"), [("request_1", "ben"), ("request_9", "anna"), ("../../x_y_z_w", "")])
def test_requests_of_others_and_of_nobody_stay(
    asker: CancelFiles, drawing: list[Replica], monkeypatch: pytest.MonkeyPatch, request_id: str, key: str
) -> None:
    monkeypatch.setattr("cluster.cancel_files.ANSWER_LIMIT_S", 0.5)
    assert not asker.ask(request_id, key)
    assert drawing[0].at_work == {"request_1": "anna"}
    assert list(asker.folder.iterdir()) == []


def test_files_of_replicas_that_ended_and_files_that_are_none_do_no_harm(
    asker: CancelFiles, drawing: list[Replica]
) -> None:
    old = asker.folder / f"request_9.0{ASKED}"
    old.write_text('{"id": "request_9", "key": ""}')
    then = time.time() - 2 * ABANDONED_S
    os.utime(old, (then, then))
    (asker.folder / f"broken.0{ASKED}").write_text("{")
    wait_for(lambda: not old.exists(), 20)
    assert asker.ask("request_2", "")
