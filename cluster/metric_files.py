"""How does one scrape tell of all replicas, when it reaches one? Each leaves its numbers in a folder that all can read.

Every few seconds a replica writes its exposition there, whole or not at all; whoever is scraped answers with its own
numbers as they are now and those of the others as they were last written. A file that was not renewed for a while is
of a replica that has ended: it is left out, and removed later. Ages are differences between times of files, so clocks
of machines need not agree. Who cannot write there tells of itself alone, and says so once.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from cluster.artifacts import write_bytes_atomic
from cluster.errors import StorageError
from cluster.serve_metrics import MODEL_INFO, ServeMetrics

EVERY_S = 5.0
LIVING_S = 15.0
"""A replica whose file is older than the newest one by more is not asked which model it draws with."""
FORGET_S = 30.0
REMOVE_S = 600.0
SUFFIX = ".prom"


class MetricFiles:
    """One replica's part: `start` writes in a thread of its own until `close`; `exposition` is what a scrape gets."""

    def __init__(self, folder: Path, metrics: ServeMetrics, every_s: float = EVERY_S) -> None:
        self.folder, self.metrics, self.every_s = folder, metrics, every_s
        safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in metrics.replica)
        self.path = folder / f"{safe}{SUFFIX}"
        self._closing = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._run, name="metric-files", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop writing and take the own file away."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def write(self) -> None:
        """Write the own numbers, and remove what replicas left that ended long ago."""
        try:
            write_bytes_atomic(self.path, self.metrics.exposition())
            for path in self._others(FORGET_S, older=True):
                if self._age_s(path) > REMOVE_S:
                    path.unlink(missing_ok=True)
        except (StorageError, OSError) as error:
            if not self._told:
                print(f"metrics expected to be written, found: {error}; a scrape tells of one replica", file=sys.stderr)
            self._told = True

    def exposition(self) -> bytes:
        """Return the own numbers and those of every other replica that lives."""
        texts = [self.metrics.exposition().decode()]
        for path in self._others(FORGET_S):
            with suppress(OSError):  # it ended while we read
                texts.append(path.read_text("utf-8"))
        return merge(texts) if len(texts) > 1 else texts[0].encode()

    def _run(self) -> None:
        self.write()
        while not self._closing.wait(self.every_s):
            self.write()

    def _others(self, age_s: float, older: bool = False) -> list[Path]:
        found = sorted(path for path in self.folder.glob(f"*{SUFFIX}") if path != self.path)
        return [path for path in found if (self._age_s(path) > age_s) == older]

    def _age_s(self, path: Path) -> float:
        """Seconds since a file was renewed, by the clock that dates our own; infinite where it has gone."""
        try:
            now = self.path.stat().st_mtime if self.path.exists() else time.time()
            return now - path.stat().st_mtime
        except OSError:
            return float("inf")


def metrics_folder(workspace: Path, application: str) -> Path:
    """Return where the replicas of an application of Ray Serve leave their numbers."""
    return workspace / "serving" / application / "metrics"


def versions_of_replicas(folder: Path) -> set[str]:
    """Return the model versions with which the replicas that live draw, as they last wrote them down."""
    written: dict[Path, float] = {}
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):  # it ended while we looked
            written[path] = path.stat().st_mtime
    found: set[str] = set()
    for path, at in written.items():
        if max(written.values()) - at <= LIVING_S:
            with suppress(OSError):
                families = text_string_to_metric_families(path.read_text("utf-8"))
                samples = [sample for family in families if family.name == MODEL_INFO for sample in family.samples]
                found |= {sample.labels["model_version"] for sample in samples}
    return found


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        yield from self.families


def merge(texts: Iterable[str]) -> bytes:
    """Put several expositions into one, as the format asks: one block for each family, whoever it comes from."""
    families: dict[str, Metric] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            if family.name in families:
                families[family.name].samples.extend(family.samples)
            else:
                families[family.name] = family
    registry = CollectorRegistry()
    registry.register(_Merged(families.values()))
    return generate_latest(registry)
