"""The dashboard asks for metrics that exist, with labels they have; every panel says what it shows, in which unit."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.request_watch import EndedRequest
from cluster.role_metrics import RoleTallies
from cluster.serve_metrics import LABELLED_SUMS, LEVELS, SUMS, ServeMetrics

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "infra" / "grafana" / "fresco.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
UNITS = {"none", "s", "reqps", "cps", "percentunit"}


@cache
def exposed() -> dict[str, set[str]]:
    """Every series that a replica can have, with its labels."""
    engine: dict[str, Any] = dict.fromkeys((*SUMS, *LABELLED_SUMS, *LEVELS), 1)
    engine |= {"state": "ready", "versions": {"7": 1}, "model_version": 7, "dataset": "d", "run_id": "r"}
    tallies = RoleTallies()
    tallies.done("champion", 1.0)
    engine |= {"roles": tallies.read(), "role_versions": {"champion": 7}}
    metrics = ServeMetrics("r-1", lambda: engine)
    for gone in (True, False):
        metrics.ended(EndedRequest("id", "POST", "/v1/images/generations", 200, 1.0, "code", gone, 1, 1, 1, "7"))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


@pytest.mark.parametrize(("title", "query"), list(queries()))
def test_query_names_metrics_and_labels_that_exist(title: str, query: str) -> None:
    series = exposed()
    names = set(re.findall(r"fresco_\w+", query))
    assert names and names <= set(series), title
    for name, selector in re.findall(r"(fresco_\w+)\{([^}]*)\}", query):
        assert set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector)) <= series[name], title
    for grouped in re.findall(r"by \(([^)]*)\)", query):
        assert set(grouped.split(", ")) <= set().union(*(series[name] for name in names)), title
    assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


def test_counters_are_read_as_rates_and_levels_bridge_scrapes_of_other_replicas() -> None:
    for title, query in queries():
        for name, before in [(match[2], match[1]) for match in re.finditer(r"(\w*)\(?(fresco_\w+)\{", query)]:
            counted = name.endswith(("_total", "_bucket"))
            assert before in (("rate", "increase") if counted else ("last_over_time",)), title


def test_panels_have_titles_units_and_a_place_of_their_own() -> None:
    assert len({panel["title"] for panel in PANELS}) == len(PANELS) and all(panel["title"] for panel in PANELS)
    assert all(panel["fieldConfig"]["defaults"]["unit"] in UNITS for panel in PANELS)
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_every_metric_is_on_the_dashboard() -> None:
    asked = {name for _, query in queries() for name in re.findall(r"fresco_\w+", query)}
    families = {name for name in exposed() if not name.endswith(("_created", "_sum", "_count"))}
    assert families - asked == set()
