"""What each stage of a cycle does: snapshot, prepare, search, train, evaluate, gate, deploy, watch.

A stage is a function of the desk (config, ledger, what the stages before returned) that returns JSON. Done twice it
finds what it made: by the frozen arrivals, by fingerprints of datasets, recipes and evaluations, by the journal's line
of the gate. One that returns `ends` ends the cycle with that decision; `reasons` then say why.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

from cluster.artifacts import Workspace, read_journal, read_json, read_record
from cluster.endpoint_numbers import Look
from cluster.errors import RegistryError, StorageError, TrackingError
from cluster.registry import CHAMPION, Registry
from cluster.reigns import PROMOTE
from components.dataset import CARD, DatasetVersion
from components.probation import Decay
from components.triggers import WAIT
from flows import evaluate, grow, prepare, probation, promote, snapshot, train, tune
from flows.config import Config, with_overrides
from flows.console import say
from flows.continual import continued, search_due
from flows.dataset_versions import named_version
from flows.decay import decay_beside
from flows.enough import count_version
from flows.findings import CANNOT_SAY, look_at_source, new_images, parent_of, refused_before, search_steps
from flows.ledger import Cycle, Ledger
from flows.models import ResolvedModel, resolve_model
from flows.serve import endpoint_of

REFUSED, ROLL_BACK = "refused", "roll_back"
REPLACED = "the champion was changed by hand meanwhile"
POLL_S = 0.25


@dataclass(frozen=True)
class Desk:
    """What a stage works with."""

    config: Config
    ledger: Ledger
    cycle: Cycle

    @property
    def workspace(self) -> Workspace:
        return self.ledger.workspace

    @property
    def registry(self) -> Registry:
        return Registry(self.workspace, self.config.placement.tracking_uri)

    @property
    def first(self) -> bool:
        """Whether this cycle makes the first champion."""
        return self.cycle.champion_before is None

    def result(self, stage: str) -> dict[str, Any]:
        return self.cycle.stages[stage]

    def champion(self) -> ResolvedModel:
        """The champion that this cycle began with."""
        return resolve_model(self.config, f"models:/{self.config.name}/{self.cycle.champion_before}")

    def dataset(self) -> DatasetVersion:
        return named_version(self.workspace, self.result("prepare")["dataset"])[0]


def take_snapshot(desk: Desk) -> dict[str, Any]:
    """Freeze what arrived; a first champion is made from what the source holds when `prepare` reads it."""
    begin = probation.look(desk.config)
    desk.cycle.look = None if begin is None else asdict(begin)
    if desk.first:
        return {"parent": None, "new": 0, "snapshot": prepare.source_snapshot(desk.config)}
    number = desk.cycle.champion_before or 0
    parent = parent_of(desk.config, desk.workspace, desk.registry.by_number(desk.config.name, number))
    had = refused_before(desk.workspace, desk.ledger.state, parent)
    found = look_at_source(desk.config, desk.ledger, parent, patient=False, refused=had)
    if found is None:
        return {"parent": parent.id, "new": 0}
    desk.ledger.confirm()
    found = snapshot.freeze(desk.workspace, desk.cycle.id, found)
    return {"parent": parent.id, "new": new_images(found), "counts": found.counts, "source": found.cursor["source"]}


def prepare_version(desk: Desk) -> dict[str, Any]:
    """Grow the champion's dataset by the frozen arrivals, or make the first version."""
    if desk.first:
        dataset = prepare.ensure_dataset(desk.config)
        _tell_of(desk, dataset)
        return {"dataset": dataset.id, "images": len(dataset.items), "added": len(dataset.items)}
    parent, _ = named_version(desk.workspace, desk.result("snapshot")["parent"])
    found = desk.result("snapshot")["new"]
    dataset = grow.grow(desk.config, parent, snapshot.thaw(desk.workspace, desk.cycle.id)) if found else parent
    _tell_of(desk, dataset)
    added = len(dataset.items) - len(parent.items)
    numbers = {"dataset": dataset.id, "images": len(dataset.items), "added": added}
    if not added:
        told = f"none of {found} arrivals is a picture that {parent.id} lacks" if found else "nothing arrived"
        return {**numbers, "ends": REFUSED, "reasons": [f"nothing to learn from: {told}"]}
    champion = desk.registry.by_number(desk.config.name, desk.cycle.champion_before or 0)
    enough, short = count_version(desk.config, (champion, parent), dataset)
    if enough.problem:
        desk.ledger.state.short = {"cycle": desk.cycle.id, **short}
        return {**numbers, "ends": WAIT, "reasons": [enough.problem]}
    return numbers


def _tell_of(desk: Desk, dataset: DatasetVersion) -> None:
    """Journal a version whose maker was killed just after it was complete."""
    card = read_json(dataset.directory / CARD) or {}
    numbers = {"images": len(dataset.items), "rejected": len(card.get("rejected_items", []))}
    parent = {"parent": card["parent"]} if "parent" in card else {}
    desk.ledger.tell("dataset", {"dataset": dataset.id}, **numbers, **parent)


def search_recipe(desk: Desk) -> dict[str, Any]:
    """Search the recipe where it is due; what was found is used by this training and those after it."""
    state, every = desk.ledger.state, desk.config.retrain.search_every
    if not search_due(desk.config.retrain, state.searched, desk.cycle.turn):
        why = "not asked for" if not every else f"last searched in turn {state.searched}, every {every} turns"
        return {"searched": False, "why": why}
    desk.ledger.confirm()
    config = run_config(desk, recipe={})
    planned = search_steps(config, config.train.steps)
    with desk.ledger.charging(desk.cycle.id, "search", planned, gpus_of(config)):
        found = tune.run(config)
    overrides = found["best"]["overrides"]
    state.recipe, state.searched = overrides, desk.cycle.turn
    hours = desk.ledger.gpu_hours_of(desk.cycle.id, "search")
    desk.ledger.spend(desk.cycle.id, "search", found["steps"], hours)  # of the steps planned, those that were made
    keys = ("run_id", "eval_loss")
    best = {key: found["best"][key] for key in keys}
    return {"searched": True, "overrides": overrides, **best, "steps": found["steps"], "report": found["report"]}


def train_run(desk: Desk) -> dict[str, Any]:
    """Train, going on where a killed run stopped; an attempt that was refused before is not made again."""
    config = run_config(desk, desk.ledger.state.recipe)
    run_id = desk.cycle.run_id = train.open_inputs(config).run_id(config)
    for attempt in desk.ledger.state.refused:
        if attempt["run_id"] == run_id:
            why = f"the same recipe and data were refused in {attempt['cycle']}: {attempt['reasons'][0]}"
            return {"run_id": run_id, "repeated": True, "ends": REFUSED, "reasons": [why]}
    if read_record(desk.workspace.run_dir(run_id)) is None:  # what failed, or is not lived to see, has cost as much
        with desk.ledger.charging(desk.cycle.id, "train", config.train.steps, gpus_of(config)):
            result = train.run(config)
        hours = desk.ledger.gpu_hours_of(desk.cycle.id, "train")
        desk.ledger.spend(desk.cycle.id, "train", result["steps"], hours)
    else:
        desk.ledger.save()
        result = train.run(config)
    keys = ("run_id", "steps", "eval_loss_first", "eval_loss_last", "images_per_s")
    facts = {"base": config.model.base or "embedded", "anchor": not desk.first and not config.train.replay_of}
    replay = {"replay_fraction": config.train.replay_fraction, "drift": desk.cycle.drift}
    return {**{key: result.get(key) for key in keys}, **facts, **replay}


def run_config(desk: Desk, recipe: dict[str, Any]) -> Config:
    """Return the config of this cycle's training, with the recipe that a search found."""
    config = with_overrides(desk.config, recipe)
    dataset = desk.dataset()
    if desk.first:
        return with_overrides(config, {"data.version": dataset.id})
    parent, _ = named_version(desk.workspace, desk.result("snapshot")["parent"])
    return continued(config, desk.champion(), parent, dataset, desk.cycle.drift, desk.cycle.turn)


def gpus_of(config: Config) -> float:
    return config.placement.workers * config.placement.gpus_per_worker


def evaluate_run(desk: Desk) -> dict[str, Any]:
    """Measure the run beside the champion; the gate finds it done."""
    against = ""
    run_id = desk.result("train")["run_id"]
    if not desk.first:
        try:
            champion = desk.champion()
            same = champion.fingerprint == resolve_model(desk.config, run_id).fingerprint
            against = "" if same else f"models:/{desk.config.name}/{desk.cycle.champion_before}"
        except RegistryError as error:
            say(f"no comparison with the champion: {error}")
    found = evaluate.run(desk.config, run_id, against=against)
    numbers = {metric: card["value"] for metric, card in found["scorecard"].items() if "_slice_" not in metric}
    return {"scorecard": numbers, "against": found["against"], "report": found["report"]}


def pass_gate(desk: Desk) -> dict[str, Any]:
    """Let the gate decide, once: what the journal says of this run in this cycle is its decision."""
    run_id = desk.result("train")["run_id"]
    line = gate_line(desk, run_id)
    if line is None or is_champion(desk, line["version"]):  # of the champion it only completes what a crash left out
        desk.ledger.confirm()
        result = promote.run(
            desk.config, run_id, tryout=lambda version: _tryout(desk, version), confirm=desk.ledger.confirm
        )
        line = gate_line(desk, run_id) or result  # no line: it was made champion by hand before this cycle began
    keys = ("decision", "version", "reasons", "report")
    numbers = {key: line.get(key) for key in keys}
    return {**numbers, "ends": REFUSED} if refused(line) else numbers


def _tryout(desk: Desk, version: int) -> dict[str, Any]:
    """Try the version on traffic; note what the champion did meanwhile, or since the cycle began."""
    desk.ledger.confirm()
    tried = probation.try_out(desk.config, version, say)
    before = tried["numbers"].get("before")
    if before is None and desk.cycle.look is not None:
        before = probation.since(desk.config, Look(**desk.cycle.look))
    desk.cycle.before = before
    desk.ledger.save()
    return tried


def is_champion(desk: Desk, version: int) -> bool:
    champion = desk.registry.by_alias(desk.config.name, CHAMPION)
    return champion is not None and champion.number == version


def refused(line: dict[str, Any]) -> bool:
    return line.get("decision") != "promote"


def gate_line(desk: Desk, run_id: str) -> dict[str, Any] | None:
    """Find the gate's line about a run since this cycle began."""
    since: list[dict[str, Any]] = []
    for line in read_journal(desk.workspace):
        if line["event"] == "trigger" and line.get("cycle") == desk.cycle.id:
            since = []
        since.append(line)
    own = [line for line in since if line["event"] == PROMOTE and line.get("name") == desk.config.name]
    found = [line for line in own if line.get("run_id") == run_id and "decision" in line]
    return found[-1] if found else None


def deploy(desk: Desk) -> dict[str, Any]:
    """Wait until the running endpoint draws with the new version; it follows the registry by itself."""
    number, began = desk.result("gate")["version"], time.monotonic()
    limit_s = desk.config.serve.ready_limit_s * desk.config.serve.max_replicas  # those of one machine load in turns
    told = False
    while (running := endpoint_of(desk.workspace)) is not None:
        if running["model_version"] == number:
            return {"url": running["url"], "model_version": number}
        if not is_champion(desk, number):
            return {"url": running["url"], "model_version": running["model_version"], "why": REPLACED}
        waited = time.monotonic() - began
        if waited > limit_s:
            why = f"the endpoint did not draw with version {number} within {limit_s:.0f} s; its log says why"
            return {"url": running["url"], "model_version": running["model_version"], "watch": ROLL_BACK, "why": why}
        if not told:
            say(f"waiting at most {limit_s:.0f} s until {running['url']} draws with version {number}")
            told = True
        time.sleep(POLL_S)
    say("no endpoint runs: the new champion serves when one is started")
    return {"url": None, "model_version": None, "why": "no endpoint runs"}


def watch(desk: Desk) -> dict[str, Any]:
    """Watch the new champion at the endpoint; one that must not stay is rolled back when the cycle ends."""
    version = desk.result("gate")["version"]
    if not is_champion(desk, version):
        return {"verdict": probation.KEEP, "why": REPLACED, "compared": {}}
    found = probation.watch(desk.config, version, desk.cycle.before, say, lambda: _decay_since(desk, version))
    numbers = {"verdict": found["decision"], "why": "; ".join(found["reasons"]), "compared": found["numbers"]}
    return {**numbers, "watch": ROLL_BACK} if found["decision"] == probation.ROLL_BACK else numbers


def _decay_since(desk: Desk, version: int) -> Decay | None:
    """Losses of both champions on what arrived since the data was frozen; None where they cannot be had."""
    if desk.first:
        return None
    try:
        seen = look_at_source(desk.config, desk.ledger, desk.dataset(), patient=False)
        new = resolve_model(desk.config, f"models:/{desk.config.name}/{version}")
        return None if seen is None else decay_beside(desk.config, desk.workspace, (desk.champion(), new), seen)
    except (*CANNOT_SAY, StorageError, TrackingError) as error:
        say(f"decay is not measured: {error}")
        return None


STAGES = {
    "snapshot": take_snapshot,
    "prepare": prepare_version,
    "search": search_recipe,
    "train": train_run,
    "evaluate": evaluate_run,
    "gate": pass_gate,
    "deploy": deploy,
    "watch": watch,
}
NEED_RAY = ("prepare", "search", "train", "evaluate", "gate")
