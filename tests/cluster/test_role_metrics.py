"""Numbers of champion, challenger and shadow, read back with Prometheus' own parser."""

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.role_metrics import BUCKETS_S, STATISTICS, RoleTallies
from cluster.serve_metrics import ServeMetrics

Labels = tuple[tuple[str, str], ...]


def series(tallies: RoleTallies, versions: dict[str, int]) -> dict[tuple[str, Labels], float]:
    metrics = ServeMetrics("r-1", lambda: {"roles": tallies.read(), "role_versions": versions})
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("replica") == "r-1" and family.documentation
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def test_roles_are_told_apart_and_means_are_sums_over_pictures() -> None:
    tallies = RoleTallies()
    for seconds in (0.2, 0.4, 400.0):
        tallies.done("champion", seconds)
    for brightness in (0.25, 0.75):
        tallies.picture("challenger", dict.fromkeys(STATISTICS, 0.5) | {"brightness": brightness})
    tallies.ended("challenger", "failed")
    tallies.ended("shadow", "dropped")
    found = series(tallies, {"champion": 4, "shadow": 5})
    champion, challenger, shadow = (("role", role) for role in ("champion", "challenger", "shadow"))
    assert found["fresco_role_seconds_count", (champion,)] == 3
    assert found["fresco_role_seconds_sum", (champion,)] == pytest.approx(400.6)
    counts = {labels[0][1]: n for (name, labels), n in found.items() if (name, labels[1:]) == (BUCKET, (champion,))}
    assert (counts["0.1"], counts["0.25"], counts["0.5"], counts["300.0"], counts["+Inf"]) == (0, 1, 2, 2, 3)
    assert len(counts) == len(BUCKETS_S) + 1
    assert found["fresco_role_pictures_total", (challenger,)] == 2
    assert found["fresco_role_brightness_total", (challenger,)] == 1.0
    assert found["fresco_role_requests_total", (("outcome", "failed"), challenger)] == 1
    assert found["fresco_role_requests_total", (("outcome", "dropped"), shadow)] == 1
    assert found["fresco_role_requests_total", (("outcome", "failed"), champion)] == 0, "no error is a number too"
    assert found["fresco_role_version", (shadow, ("version", "5"))] == 1


BUCKET = "fresco_role_seconds_bucket"


def test_a_second_that_is_a_bound_is_inside_it() -> None:
    tallies = RoleTallies()
    tallies.done("shadow", BUCKETS_S[0])
    assert series(tallies, {})[BUCKET, (("le", str(BUCKETS_S[0])), ("role", "shadow"))] == 1


def test_nothing_told_has_no_series() -> None:
    assert not [name for name, _ in series(RoleTallies(), {}) if name.startswith("fresco_role")]


def test_counts_are_right_when_threads_count_at_once() -> None:
    tallies = RoleTallies()

    def work() -> None:
        for _ in range(500):
            tallies.done("champion", 1.0)
            tallies.picture("champion", dict.fromkeys(STATISTICS, 1.0))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally = tallies.read()["champion"]
    assert tally["outcomes"]["done"] == tally["pictures"] == 4000 == tally["statistics"]["contrast"]
