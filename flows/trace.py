"""fresco trace: where does this picture come from? Request, model version, decision, run, dataset version, arrivals.

It begins with what the endpoint signed into the file, and only where that is valid; every further step is looked up in
the workspace and must agree with the step before. What is not there is said, in `missing`, and never guessed. Nothing
is changed.
"""

from typing import Any

from cluster.artifacts import Workspace, open_workspace, read_journal
from flows import verify
from flows.config import Config
from flows.console import say
from flows.making import arrivals_of, dataset_of, run_of
from flows.origin import decision_of, request_of, version_of
from flows.verify import plain

NOT_TRACED = {
    "changed": "it was changed after it was drawn, so nothing in it can be believed",
    "not signed": "it holds no record of this endpoint: drawn elsewhere, or its metadata were stripped on the way",
    "unknown key": "it was signed by the endpoint of another workspace; run this with that --workspace, or trust its"
    " key with --key FILE",
}
STEPS = ("request", "version", "decision", "run", "dataset", "arrivals")


def run(config: Config, file: str, key: str | None = None) -> dict[str, Any]:
    """Tell the chain of one file; what the file itself says counts only when its signature does."""
    judged = verify.judge(config, file, key)
    found: dict[str, Any] = {"image": judged, **dict.fromkeys(STEPS), "missing": []}
    if judged["verdict"] != "valid":
        found["missing"] = [f"{NOT_TRACED[judged['verdict']]} ({judged['reason']})"]
        say(f"{plain(judged['file'])}: {judged['verdict']}: {plain(found['missing'][0])}")
        return found
    workspace = open_workspace(config.workspace)
    _follow(config, workspace, found)
    _tell(found)
    return found


def _follow(config: Config, workspace: Workspace, found: dict[str, Any]) -> None:
    """Fill in one step after the other; each says what it misses."""
    facts, missing = found["image"]["facts"], found["missing"]
    journal = [
        line for line in read_journal(workspace) if isinstance(line, dict) and isinstance(line.get("event"), str)
    ]
    found["request"] = request_of(workspace, facts, missing)
    if facts.get("model_version") is None:
        missing.append("the record names no model version: the picture is an unfinished one, shown while it was drawn")
        return
    found["version"] = version_of(config, workspace, journal, facts, missing)
    at = found["request"]["time"]
    found["decision"] = decision_of(journal, found["version"], at, missing)
    found["run"] = run_of(workspace, found["version"]["run_id"], missing)
    dataset = found["version"]["dataset"]
    found["dataset"] = dataset_of(workspace, dataset, missing)
    found["arrivals"] = arrivals_of(workspace, journal, found["dataset"], found["version"], missing)


def _tell(found: dict[str, Any]) -> None:
    say(f"image     {plain(found['image']['file'])}: valid, signed with key {found['image']['key']}")
    for name, told in (("request", _request), ("version", _version), ("decision", _decision), ("run", _run)):
        _say(name, told(found[name]) if found[name] else [])
    _say("dataset", _dataset(found["dataset"]) if found["dataset"] else [])
    _say("arrivals", _arrivals(found["arrivals"]) if found["arrivals"] else [])
    for text in found["missing"]:
        say(f"missing   {plain(text)}")


def _say(name: str, lines: list[str]) -> None:
    for number, line in enumerate(lines):
        say(f"{name if number == 0 else '':<9} {plain(line)}")


def _request(request: dict[str, Any]) -> list[str]:
    drawn = ", ".join(
        f"{key.replace('_', ' ')} {request[key]}" for key in ("seed", "steps", "guidance_scale") if key in request
    )
    when = f"at {request['time']}" if request["time"] else "at a time that is not known"
    took = f", {request['seconds']} s" if request.get("seconds") is not None else ""
    return [f"{request['id']} {when}: {drawn}{took}"]


def _version(version: dict[str, Any]) -> list[str]:
    serving = [
        f"served from {reign['since']} to {reign['until'] or 'now'} (by {reign['event']})"
        for reign in version["served"]
    ]
    name = f"models:/{version['name']}/{version['number']}" if version["name"] else f"version {version['number']}"
    return [name + (f", weights {version['weights']}" if version.get("weights") else ""), *serving]


def _decision(decision: dict[str, Any]) -> list[str]:
    forced = ", forced" if decision["forced"] else ""
    report = [f"report: {decision['report']}"] if decision["report"] else []
    return [f"{decision['decision']}{forced} at {decision['time']}", *decision["reasons"], *report]


def _run(run: dict[str, Any]) -> list[str]:
    recipe = ", ".join(f"{key} {value}" for key, value in run["recipe"].items())
    losses = [f"validation loss {run['eval_loss_first']} -> {run['eval_loss_last']}"] if run["eval_loss_last"] else []
    return [
        ", ".join([f"{run['id']}: {run['steps']} steps", *losses]),
        f"recipe: {recipe or 'not in the record'}",
        f"base: {run['base']}, finished {run['finished']}",
    ]


def _dataset(dataset: dict[str, Any]) -> list[str]:
    grown = " <- ".join(dataset["grown_from"])
    return [
        f"{dataset['id']}: {dataset['images']} pictures, made {dataset['created']}",
        *([f"grown from {grown}"] if grown else []),
    ]


def _arrivals(arrivals: dict[str, Any]) -> list[str]:
    lines = [f"{arrivals['pictures']} pictures, first seen {arrivals['first']} to {arrivals['last']}"]
    lines += [f"from {source}: {number}" for source, number in arrivals["sources"].items()]
    if arrivals["trigger"]:
        lines.append(f"{arrivals['trigger']['cycle']} began at {arrivals['trigger']['time']}:")
        lines += arrivals["trigger"]["reasons"]
    return lines
