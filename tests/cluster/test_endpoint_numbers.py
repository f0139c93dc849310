"""Metrics of a running endpoint, read back: what each role did since a look, over replicas that come and go."""

import json
from dataclasses import asdict
from pathlib import Path

from fastapi import FastAPI, Response

from cluster.endpoint_numbers import Look, counted_between, draws_everywhere, is_drained, look_at, numbers_of, parse
from cluster.metric_files import MetricFiles, merge
from cluster.role_metrics import STATISTICS, STEP_BUCKETS_S, RoleTallies
from cluster.serve_metrics import ServeMetrics
from tests.endpoint import listening


class Replica:
    """The numbers of one replica, as its engine and its roles tell them."""

    def __init__(self, name: str, **roles: int) -> None:
        self.tallies, self.roles = RoleTallies(), roles
        self.loaded = {f"{version} (1)": 0 for version in roles.values()}
        self.failures, self.denoise_s, self.row_steps = 0, 0.0, 0
        self.metrics = ServeMetrics(name, self.read)

    def read(self) -> dict[str, object]:
        sums = {"swap_failures": self.failures, "stepping_s": self.denoise_s, "row_steps": self.row_steps}
        return {**sums, "roles": self.tallies.read(), "role_versions": self.roles, "versions": self.loaded}

    def draw(self, role: str, step_s: float, brightness: float = 0.5, requests: int = 1) -> None:
        for _ in range(requests):
            self.tallies.done(role, 10 * step_s, step_s)  # type: ignore[arg-type]
            self.tallies.picture(role, dict.fromkeys(STATISTICS, 0.5) | {"brightness": brightness})  # type: ignore[arg-type]


def seen(*replicas: Replica) -> Look:
    return parse(merge([replica.metrics.exposition().decode() for replica in replicas]).decode())


def test_what_a_role_did_since_a_look_is_summed_over_replicas_that_come_and_go() -> None:
    first, second = Replica("r-1", champion=4), Replica("r-2", champion=4)
    first.draw("champion", 0.02, requests=5)
    second.draw("champion", 0.02, requests=7)
    begin = seen(first, second)
    first.draw("champion", 0.02, brightness=0.25, requests=2)
    first.tallies.ended("champion", "failed")
    first.tallies.ended("champion", "cancelled")
    first.tallies.refused("champion", 1)
    first.draw("challenger", 0.3)
    first.denoise_s, first.row_steps = 3.0, 30
    third = Replica("r-3", champion=4)
    third.draw("champion", 0.04)
    found = numbers_of("champion", counted_between(begin, seen(first, third)))
    assert (found["requests"], found["errors"], found["pictures"], found["refused"]) == (4, 1, 3, 1)
    assert found["row_step_s"] == 0.1 and found["edges_s"] == STEP_BUCKETS_S
    assert sum(found["times"]) == 3 and len(found["times"]) == len(STEP_BUCKETS_S) + 1
    places = [place for place, count in enumerate(found["times"]) if count]
    for place, step_s in zip(places, (0.02, 0.04), strict=True):
        assert STEP_BUCKETS_S[place - 1] < step_s <= STEP_BUCKETS_S[place]
    assert found["sums"]["brightness"] == (1.0, 2 * 0.25**2 + 0.25)
    assert numbers_of("challenger", counted_between(begin, seen(first, third)))["requests"] == 1
    assert numbers_of("champion", counted_between(begin, begin))["requests"] == 0


def test_look_is_plain_values() -> None:
    replica = Replica("r-1", champion=4)
    replica.draw("champion", 0.02)
    look = seen(replica)
    read = Look(**json.loads(json.dumps(asdict(look))))
    assert counted_between(read, look) == dict.fromkeys(counted_between(look, look), 0.0)


def test_version_draws_where_every_replica_has_it_and_none_holds_another() -> None:
    first, second = Replica("r-1", champion=5), Replica("r-2", champion=4)
    assert not draws_everywhere(seen(first, second), "champion", 5) and draws_everywhere(seen(first), "champion", 5)
    assert not draws_everywhere(parse(""), "champion", 5), "an endpoint that sleeps draws with nothing"
    second.roles = {"champion": 5, "challenger": 6}
    assert draws_everywhere(seen(first, second), "champion", 5)
    assert not draws_everywhere(seen(first, second), "challenger", 6)
    assert not is_drained(seen(first, second)), "version 4 still finishes its rows"
    second.loaded = {"5 (2)": 1, "6 (1)": 0}
    assert is_drained(seen(first, second))


def test_endpoint_is_read_over_http_and_by_its_files_where_a_key_is_needed(tmp_path: Path) -> None:
    replica, answers = Replica("r-1", champion=4), FastAPI()
    replica.draw("champion", 0.02)
    status = {"code": 200}

    @answers.get("/metrics")
    def metrics() -> Response:
        return Response(replica.metrics.exposition() if status["code"] == 200 else b"", status_code=status["code"])

    with listening(answers) as url:
        look = look_at(url, tmp_path)
        assert look is not None and look.roles == {"r-1": {"champion": "4"}}
        status["code"] = 401
        assert look_at(url, tmp_path) is None
        files = [MetricFiles(tmp_path, one.metrics) for one in (replica, Replica("r-2", champion=4))]
        for file in files:
            file.write()
        look = look_at(url, tmp_path)
        assert look is not None and set(look.roles) == {"r-1", "r-2"}
        assert numbers_of("champion", counted_between(parse(""), look))["requests"] == 1
        status["code"] = 503
        assert look_at(url, tmp_path) is None
    assert look_at(url, tmp_path) is None, "nothing listens any more"
