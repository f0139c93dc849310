"""fresco promote: register a model, let the gate compare it with the champion, and make it the champion or say why not.

In order: find it, register it (without an alias), start it on the real serving path, have its scorecard, measure it
beside the champion, decide (`components/policy.py`), move the aliases, write card, tags and journal, let old versions
retire. Where another promotion came first, the comparison is made again with the new champion.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.artifacts import Workspace, append_journal, open_workspace, read_journal
from cluster.champion import NO_CHAMPION, Move, drop_challenger, move_champion, settle
from cluster.errors import ChampionMovedError, RegistryError
from cluster.judging import judging
from cluster.registry import CHAMPION, PREVIOUS, TAG_DATASET, Registry, Version
from cluster.reigns import PROMOTE
from components import decision_page
from components.errors import NonFiniteError
from components.evidence import Champion, Evidence, NewData
from components.policy import CANARY, Check, Decision, Outcome, decide, with_check
from components.scorecard import SLICE
from flows import evaluate
from flows.config import Config
from flows.console import program, say, step
from flows.decision_report import write_decision
from flows.gather import Contest, gather
from flows.keep import has_card, has_evidence, keep_with_champion, write_card, write_evidence
from flows.models import ResolvedModel, register_version, resolve_model
from flows.rehearse import rehearse

ATTEMPTS = 3
"""Comparisons made again because the champion changed meanwhile."""
Confirm = Callable[[], object]
Tryout = Callable[[int], dict[str, Any]]
"""Tries a version that passed the gate on traffic, before it is champion: `probation.try_out` without its config."""
FORCED = "forced: promoted in spite of the gate, on request"


@dataclass(frozen=True)
class Judged:
    """A candidate version with what the gate said about it."""

    version: Version
    model: ResolvedModel
    decision: Decision
    evaluated: dict[str, Any]
    champion: int
    """The version it was compared with; 0 for none."""

    @property
    def passed(self) -> bool:
        return self.decision.verdict == "promote"


def run(
    config: Config, model: str, force: bool = False, tryout: Tryout | None = None, confirm: Confirm = lambda: None
) -> dict[str, Any]:
    """Make `model` the champion if the gate lets it through, or with `force` anyway.

    With `tryout`, what the gate let through against a champion is tried on traffic first; one that fails is rejected.
    `confirm` is called before the decision is acted on, and under the alias's lock; where it raises, nothing changes.
    """
    workspace = open_workspace(config.workspace)
    registry = Registry(workspace, config.placement.tracking_uri)
    for repair in settle(registry, config.name):
        say(repair)
    found = resolve_model(config, model)
    step(f"promote {found.name} (weights {found.fingerprint})")
    version = register_version(config, registry, found)
    champion = registry.by_alias(config.name, CHAMPION)
    if champion is not None and champion.number == version.number:
        return _unchanged(config, registry, champion, evaluate.run(config, model))
    with judging(registry, config.name, version.number, notify=say):
        candidate = replace(found, version=version.number)
        return _contest(config, workspace, registry, candidate, (model, force, tryout, confirm))


def plan(config: Config) -> list[str]:
    """Say what `run` would do."""
    gate = config.gate
    return [
        f"find the model and register it as a version of {config.name} with its lineage",
        f"start it on the serving path, ask for pictures (at most {gate.time_budget_s:g} s), compare with the sampler",
        "evaluate it, unless its scorecard is there",
        "measure it beside the champion: new data, the champion's own data, anchor prompts",
        f"decide: forgetting at most {gate.max_forgetting:.1%}, improvement more than {gate.min_improvement:.1%} at"
        f" significance {gate.significance:g}, CLIP score not more than {gate.max_clip_drop:g} lower, coverage",
        f"if it passes, move {CHAMPION} to it and {PREVIOUS} to what serves now; write card, tags and journal",
    ]


def _contest(
    config: Config,
    workspace: Workspace,
    registry: Registry,
    found: ResolvedModel,
    asked: tuple[str, bool, Tryout | None, Confirm],
) -> dict[str, Any]:
    """Judge, perhaps try, and act; again when somebody else's promotion came in between. `asked` is `run`'s."""
    model, force, tryout, confirm = asked
    served = rehearse(config, found)
    for attempt in range(1, ATTEMPTS + 1):
        judged = _judge(config, workspace, registry, found, model, served)
        if judged.passed and judged.champion != NO_CHAMPION and tryout is not None:
            judged = _tried(judged, tryout)
        wanted = judged.passed or (force and not served.problem)
        line = _line(config, workspace, judged, forced=wanted and not judged.passed)
        try:
            confirm()
            if wanted:
                number, old = judged.version.number, judged.champion
                move = move_champion(registry, config.name, number, line, old, notify=say, proof=confirm)
                return _promoted(config, registry, judged, move, line)
            return _refused(config, workspace, registry, judged, line)
        except ChampionMovedError as error:
            if attempt == ATTEMPTS:
                raise
            say(f"{error}; comparing with that one")
    raise AssertionError("unreachable")


def _tried(judged: Judged, tryout: Tryout) -> Judged:
    """Add what the traffic says; where nothing could be shown, the gate's word stands."""
    found = tryout(judged.version.number)
    shown = found["decision"] if found["numbers"] or found["decision"] == "roll_back" else "nothing"
    outcomes: dict[str, Outcome] = {"keep": "pass", "roll_back": "fail"}
    check = Check(CANARY, outcomes.get(shown, "skipped"), "on traffic: " + "; ".join(found["reasons"]))
    return replace(judged, decision=with_check(judged.decision, check))


def _judge(
    config: Config, workspace: Workspace, registry: Registry, found: ResolvedModel, model: str, served: Any
) -> Judged:
    """Measure against the present champion and decide; a model that breaks while it is measured does not serve."""
    old = registry.by_alias(config.name, CHAMPION)
    facts, champion = _champion(config, old, found)
    version = registry.by_number(config.name, found.version or 0)
    evaluated: dict[str, Any] = {"report": None, "scorecard": {}, "dataset": found.dataset or "", "grid": None}
    against = old.uri if old is not None and champion is not None and not (facts and facts.same_weights) else ""
    evidence = Evidence(NewData(evaluated["dataset"], 0), served, facts)
    if not served.problem:
        try:
            evaluated = evaluate.run(config, model, against=against)
            contest = Contest(found, evaluated["dataset"], champion, facts)
            evidence = gather(config, workspace, contest, served, evaluated)
        except NonFiniteError as error:
            evidence = replace(evidence, served=replace(served, problem=str(error)))
    decision = decide(evidence, config.gate)
    return Judged(version, found, decision, evaluated, old.number if old else NO_CHAMPION)


def _champion(
    config: Config, old: Version | None, found: ResolvedModel
) -> tuple[Champion | None, ResolvedModel | None]:
    if old is None:
        return None, None
    try:
        champion = resolve_model(config, old.uri)
    except RegistryError as error:
        return Champion(old.number, old.tags.get(TAG_DATASET), problem=str(error)), None
    same = champion.fingerprint == found.fingerprint
    return Champion(old.number, champion.dataset, same_weights=same), champion


def _line(config: Config, workspace: Workspace, judged: Judged, forced: bool) -> dict[str, Any]:
    """Write the decision's page; return what the journal keeps: verdict, reasons, checks' numbers, lineage."""
    reasons = [FORCED] if forced else []
    line = {
        "decision": "promote" if forced else judged.decision.verdict,
        "forced": forced,
        "reasons": [*reasons, *judged.decision.reasons],
        "checks": [asdict(check) for check in judged.decision.checks],
        "version": judged.version.number,
        "model": judged.model.name,
        "run_id": judged.model.run_id,
        "dataset": judged.evaluated["dataset"],
        "scorecard": {
            metric: card["value"]
            for metric, card in judged.evaluated["scorecard"].items()
            if not metric.startswith(SLICE)  # one for each kind of caption: the report has them
        },
        "evaluation": judged.evaluated["report"],
        "gate": config.gate.model_dump(include={"significance", "min_improvement", "max_forgetting"}),
    }
    told = decision_page.Judged(judged.version.number, judged.champion, judged.decision, forced)
    page = write_decision(config, workspace, told, _facts(config, judged), line, judged.evaluated["grid"])
    return {**line, "report": str(page)}


def _facts(config: Config, judged: Judged) -> dict[str, str]:
    facts = {
        "Candidate": f"models:/{config.name}/{judged.version.number}",
        "Champion": f"models:/{config.name}/{judged.champion}" if judged.champion else "none",
        "Run": judged.model.run_id or str(judged.model.name),
        "Weights": judged.model.fingerprint,
        "Measured on": judged.evaluated["dataset"],
        "Decided": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    return {name: value for name, value in facts.items() if value}


def _promoted(config: Config, registry: Registry, judged: Judged, move: Move, line: dict[str, Any]) -> dict[str, Any]:
    result = _result(line, judged.evaluated["scorecard"], judged.version, move.champion, move.previous)
    keep_with_champion(config, registry, judged.version, judged.evaluated, line)
    _tell(config, result)
    return result


def _refused(
    config: Config, workspace: Workspace, registry: Registry, judged: Judged, line: dict[str, Any]
) -> dict[str, Any]:
    write_evidence(registry, judged.version, line)
    number = judged.version.number
    if line["decision"] == "reject" and drop_challenger(
        registry, config.name, number, [f"version {number} was rejected"]
    ):
        say(f"version {number} is the challenger no more")
    champion, previous = (registry.by_alias(config.name, alias) for alias in (CHAMPION, PREVIOUS))
    result = _result(line, judged.evaluated["scorecard"], judged.version, champion, previous)
    numbers = {key: result[key] for key in ("version", "champion", "previous")}
    append_journal(workspace, PROMOTE, name=config.name, **{**line, **numbers})
    _tell(config, result)
    return result


def _unchanged(config: Config, registry: Registry, champion: Version, evaluated: dict[str, Any]) -> dict[str, Any]:
    reasons = [f"version {champion.number} is the champion already: nothing changed"]
    line = {"decision": "promote", "reasons": reasons, "report": evaluated["report"], "evaluation": evaluated["report"]}
    told = _promotion_of(registry, champion)
    if told is not None and not has_evidence(champion, told):  # a crash came after the move
        keep_with_champion(config, registry, champion, evaluated, told)
    elif not has_card(registry, champion):
        write_card(config, registry, champion, evaluated, ["see the journal: the card was written later"])
    previous = registry.by_alias(config.name, PREVIOUS)
    result = _result(line, evaluated["scorecard"], champion, champion, previous)
    _tell(config, result)
    return result


def _promotion_of(registry: Registry, champion: Version) -> dict[str, Any] | None:
    """Find the journal's line of the gate's last word on a version; None where that did not let it through."""
    lines = [line for line in read_journal(registry.workspace) if line["event"] == PROMOTE and "scorecard" in line]
    last = [line for line in lines if (line["name"], line["version"]) == (champion.name, champion.number)][-1:]
    return last[0] if last and last[0]["decision"] == "promote" else None


def _result(
    line: dict[str, Any],
    scorecard: dict[str, Any],
    version: Version,
    champion: Version | None,
    previous: Version | None,
) -> dict[str, Any]:
    versions = {"version": version, "champion": champion, "previous": previous}
    return {
        "decision": line["decision"],
        "reasons": line["reasons"],
        "checks": line.get("checks", []),
        "forced": line.get("forced", False),
        **{key: entry.number if entry else None for key, entry in versions.items()},
        "report": line["report"],
        "evaluation": line["evaluation"],
        "scorecard": scorecard,
    }


def _tell(config: Config, result: dict[str, Any]) -> None:
    marks = {"pass": "pass", "fail": "FAIL", "inconclusive": "open", "skipped": "  - "}
    for check in result["checks"]:
        say(f"  {marks[check['outcome']]}  {check['sentence']}")
    told = {"promote": "promoted", "hold": "held: the evidence decides nothing yet", "reject": "rejected"}
    say(f"version {result['version']} {told[result['decision']]}" + (f" ({FORCED})" if result["forced"] else ""))
    if result["report"]:
        say(f"report: {result['report']}")
    say(f"champion of {config.name}: version {result['champion'] or 'unset'}; previous: {result['previous'] or 'none'}")
    if result["decision"] == "promote":
        say(f"next: {program()} serve --detach --workspace {config.workspace}")
