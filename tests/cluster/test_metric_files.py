"""Several replicas, one scrape: every replica's numbers, in a form that Prometheus' parser reads."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metric_files import FORGET_S, REMOVE_S, MetricFiles, merge
from cluster.request_watch import EndedRequest
from cluster.serve_metrics import ServeMetrics

SERVED = EndedRequest("req_1", "POST", "/v1/images/generations", 200, 0.4, None, False, 10, 20, 2, "7")


def replica(folder: Path, name: str, requests: int) -> MetricFiles:
    metrics = ServeMetrics(name, lambda: {"state": "ready", "steps": requests, "versions": {"7": 1}})
    for _ in range(requests):
        metrics.began()
        metrics.ended(SERVED)
    return MetricFiles(folder, metrics, every_s=0.01)


def requests_of(exposition: bytes) -> dict[str, float]:
    """Replica -> requests; a family must come in one block."""
    found, names = {}, []
    for family in text_string_to_metric_families(exposition.decode()):
        names.append(family.name)
        found.update({s.labels["replica"]: s.value for s in family.samples if s.name == "fresco_requests_total"})
    assert len(set(names)) == len(names)
    return found


def age(files: MetricFiles, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(files.path, (then, then))


def test_scrape_of_one_replica_tells_of_all(tmp_path: Path) -> None:
    one, other = replica(tmp_path, "images#ab/1", 3), replica(tmp_path, "images#cd", 5)
    one.write()
    other.write()
    assert requests_of(one.exposition()) == requests_of(other.exposition()) == {"images#ab/1": 3, "images#cd": 5}


def test_own_numbers_are_as_they_are_now(tmp_path: Path) -> None:
    one, other = replica(tmp_path, "a", 1), replica(tmp_path, "b", 1)
    one.write()
    other.write()
    one.metrics.ended(SERVED)
    assert requests_of(one.exposition()) == {"a": 2, "b": 1}
    assert requests_of(other.exposition()) == {"a": 1, "b": 1}


def test_merging_changes_no_sample() -> None:
    files = [ServeMetrics(name, lambda: {"steps": 3}) for name in ("a", "b")]
    for number, metrics in enumerate(files):
        metrics.ended(replace(SERVED, seconds=number))
    texts = [metrics.exposition().decode() for metrics in files]

    def samples(text: str) -> set[str]:
        return {line for line in text.splitlines() if not line.startswith("#")}

    assert samples(merge(texts).decode()) == samples(texts[0]) | samples(texts[1])
    kinds = {line for line in merge(texts).decode().splitlines() if line.startswith("# TYPE")}
    assert kinds == {line for line in texts[0].splitlines() if line.startswith("# TYPE")}


def test_replica_that_ended_is_forgotten_and_its_file_removed_later(tmp_path: Path) -> None:
    one, ended = replica(tmp_path, "a", 1), replica(tmp_path, "b", 1)
    ended.write()
    age(ended, FORGET_S + 5)
    one.write()
    assert requests_of(one.exposition()) == {"a": 1} and ended.path.exists()
    age(ended, REMOVE_S + 5)
    one.write()
    assert not ended.path.exists() and one.path.exists()


def test_replica_that_closes_takes_its_file_away(tmp_path: Path) -> None:
    one = replica(tmp_path, "a", 1)
    one.start()
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_leaves_the_own_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    one = replica(tmp_path / "file" / "metrics", "a", 1)
    one.write()
    one.write()
    assert requests_of(one.exposition()) == {"a": 1}
    assert capsys.readouterr().err.count("a scrape tells of one replica") == 1


def test_scrapes_while_replicas_write_see_whole_files(tmp_path: Path) -> None:
    writers = [replica(tmp_path, name, 2) for name in ("a", "b", "c")]
    for files in writers:
        files.write()
        files.start()
    seen: list[dict[str, float]] = []

    def scrape() -> None:
        for _ in range(20):
            seen.append(requests_of(writers[0].exposition()))

    threads = [threading.Thread(target=scrape) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for files in writers:
        files.close()
    assert len(seen) == 60 and all(found == {"a": 2, "b": 2, "c": 2} for found in seen)
