"""Alert rules ask for metrics and labels that exist, in every form in which they are kept."""

import re
from typing import Any

import pytest
import yaml

from tests.infra.manifests import INFRA, KUBERNETES, load_all, of_kind
from tests.infra.test_grafana import exposed

RULES = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
OTHERS = {
    "up": {"job", "instance"},
    # kube-state-metrics' documentation of cronjobs, jobs and deployments.
    "kube_cronjob_status_last_successful_time": {"namespace", "cronjob"},
    "kube_job_status_failed": {"namespace", "job_name", "reason"},
    "kube_deployment_status_replicas_available": {"namespace", "deployment"},
}
FUNCTIONS = {"sum", "max", "rate", "increase", "last_over_time", "count", "time"}
WORDS = {"by", "on", "and", "unless", "offset"}


def problems(expression: str) -> list[str]:
    """Names, labels, functions and brackets of one PromQL expression."""
    series = exposed() | OTHERS
    found = []
    plain = re.sub(r'"[^"]*"', '""', expression)
    for opening, closing in ("()", "{}", "[]"):
        if plain.count(opening) != plain.count(closing):
            found.append(f"brackets {opening}{closing} do not match")
    for name, selector in re.findall(r"(\w+)\{([^}]*)\}", plain):
        labels = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector))
        if name in series and not labels <= series[name]:
            found.append(f"{name} has no label {sorted(labels - series[name])}")
    asked = set().union(*(series.get(name, set()) for name in re.findall(r"\w+", plain)))
    for grouped in re.findall(r"(?:by|on) \(([^)]*)\)", plain):
        if not set(filter(None, grouped.split(", "))) <= asked:
            found.append(f"grouped by {grouped}, which none of its series has")
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|(?:by|on) \([^)]*\)|\boffset \w+", " ", plain)
    for word in re.findall(r"[A-Za-z_]\w*", bare):
        if word not in series and word not in FUNCTIONS | WORDS:
            found.append(f"there is no metric {word}")
    for counter in re.findall(r"(\w+)\((fresco_\w+_total)", plain):
        if counter[0] not in ("rate", "increase"):
            found.append(f"{counter[1]} is a counter: a rate of it says something")
    return found


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alert_asks_for_what_exists(rule: dict[str, Any]) -> None:
    assert problems(rule["expr"]) == []
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m")) and rule["labels"]["severity"] in ("page", "warn")
    for name in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
        assert name in rule["expr"] or name in ("instance", "replica", "job_name"), name


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("fresco_backlog_seconds", "fresco_backlog_second", "no metric fresco_backlog_second"),
        ('status=~"5.."', 'code=~"5.."', "fresco_requests_total has no label"),
        ("increase(fresco_swap_failures_total", "max(fresco_swap_failures_total", "is a counter"),
        ("by (model_version)", "by (model)", "grouped by model"),
        ("last_over_time(fresco_ready[1m]) ==", "last_over_time(fresco_ready[1m] ==", "do not match"),
        ("kube_job_status_failed", "kube_job_failed_count", "no metric kube_job_failed_count"),
        ("cronjob=", "cron=", "has no label"),
    ],
)
def test_broken_alert_is_found(right: str, wrong: str, told: str) -> None:
    broken = [rule["expr"].replace(right, wrong) for rule in ALERTS if right in rule["expr"]]
    assert broken and all(told in "\n".join(problems(expression)) for expression in broken)


def test_names_are_different_and_every_kind_of_trouble_has_one() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)
    asked = "".join(rule["expr"] for rule in ALERTS)
    for wanted in ("requests_total", "backlog", "ready", "model_info", "cronjob", "job_status_failed"):
        assert wanted in asked


def test_the_operators_form_has_the_same_rules_and_scrapes_one_target() -> None:
    [rule] = of_kind(load_all(), "PrometheusRule")
    assert rule["spec"] == RULES, "infra/kubernetes/monitoring.yaml repeats infra/prometheus/alerts.yaml"
    [monitor] = of_kind(load_all(), "PodMonitor")
    [scrape] = monitor["spec"]["podMetricsEndpoints"]
    assert {"targetLabel": "job", "replacement": "fresco"} in scrape["relabelings"]
    assert monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"] == "head"
    [service] = of_kind(load_all(), "RayService")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    opened = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    assert opened[scrape["port"]] == 8000 and scrape["path"] == "/metrics"
    assert monitor["spec"]["selector"]["matchLabels"].items() - head["metadata"]["labels"].items() == {
        ("ray.io/node-type", "head")
    }, "KubeRay adds that one"


def test_the_plain_form_names_the_job_that_the_rules_ask_for() -> None:
    told = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text())
    [scrape] = told["scrape_configs"]
    assert scrape["job_name"] == "fresco" and scrape["metrics_path"] == "/metrics"
    assert len(scrape["static_configs"][0]["targets"]) == 1
    assert all((INFRA / "prometheus" / name).is_file() for name in told["rule_files"])
    assert set(told) == {"scrape_configs", "rule_files"} and KUBERNETES.is_dir()
