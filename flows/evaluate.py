"""`fresco evaluate MODEL`: a scorecard with intervals on the test split, and a report beside another model.

Find the model, the one to compare with (the base it came from, or --against) and the dataset version; measure both on
the same pictures, prompts and seeds; score; write the page, the grid and, last, the record. A repeated call with the
same inputs says so and stops.
"""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from cluster import stage
from cluster.artifacts import Workspace, open_workspace, read_json, read_record, write_bytes_atomic, write_json_atomic
from cluster.errors import RegistryError
from cluster.registry import TAG_BASE, TAG_COMMIT
from components.clip_encoder import ClipEncoder
from components.compare import Paired
from components.dataset import DatasetVersion
from components.errors import InputError
from components.evaluation import decided
from components.evaluation_page import make_grid, make_page
from components.metrics import Estimate
from components.models import embedded_base, embedded_clip, load_parts
from components.plots import Curve
from components.report import rounded
from components.scorecard import ADHERENCE, CLIP, KID, LOSS, TITLES
from flows.config import Config, told_config
from flows.console import say, step
from flows.dataset_versions import named_version
from flows.drawing import fingerprint_of, to_png
from flows.measure import VERSION, HeldOut, draw_seeds, held_out, measure
from flows.models import ResolvedModel, resolve_model
from flows.prepare import ensure_dataset
from flows.score import numbers_of, score


def run(config: Config, model: str, dataset: str = "", against: str = "") -> dict[str, Any]:
    """Measure `model` on the test split of a dataset version; says so when that was done before.

    `dataset` (name@fingerprint) chooses the version; empty takes the one the model was trained on, and where that is
    not in this workspace the present one of data.source. `against` is the model to compare with, as MODEL is named;
    empty takes the base that the model came from.
    """
    workspace = open_workspace(config.workspace)
    found = resolve_model(config, model)
    other = _against(config, against, found) if against else _base_of(config, workspace, found)
    own = found.dataset if found.dataset and read_record(workspace.dataset_dir(found.dataset)) else ""
    config, version = _dataset(config, workspace, dataset or own)
    data = held_out(config, workspace, version)
    encoder = ClipEncoder(config.model.clip or embedded_clip())
    paths = _paths(workspace, found, other if against else None, data)
    inputs = [found.fingerprint, other.fingerprint if other else "", against, data.dataset.id, encoder.identity]
    fingerprint = fingerprint_of([VERSION, *inputs, config.evaluate.model_dump()])
    record = read_json(paths["json"])
    if record and record["fingerprint"] == fingerprint and all(stage.fetch(path) for path in paths.values()):
        say(f"evaluation of {_reference(found)} on {data.dataset.id}: complete, nothing to do")
        _tell(record, paths)
        return _result(record, paths)

    step(f"evaluate {_reference(found)} on the {len(data.pictures)} test pictures of {data.dataset.id}")
    performances = []
    for each in (found, other):
        if each is not None:
            performance = measure(config, workspace, each.directory, each.fingerprint, data)
            by_seed = draw_seeds(config, workspace, each.directory, each.fingerprint, performance.drawn, data)
            performances.append((each, replace(performance, by_seed=by_seed)))
    comparable = other is not None and same_latents(found.directory, other.directory)
    evaluation = score(config, workspace, data, encoder, performances, comparable)
    evaluation = replace(evaluation, against=_reference(other) if against and other else "")

    facts = _facts(found, data, encoder, other, bool(against))
    curves = _curves(workspace.run_dir(found.run_id)) if found.run_id else []
    page = make_page(_label(found), evaluation, facts, curves, _settings(config, workspace, found))
    write_bytes_atomic(paths["html"], page.encode())
    write_bytes_atomic(paths["png"], to_png(make_grid(evaluation)))
    record = {
        "fingerprint": fingerprint,
        "model": _reference(found),
        "against": evaluation.against,
        "dataset": data.dataset.id,
        "facts": facts,
        "config": told_config(config.model_dump()),
        **numbers_of(evaluation),
    }
    write_json_atomic(paths["json"], record)
    _tell(record, paths)
    return _result(record, paths)


def _against(config: Config, text: str, found: ResolvedModel) -> ResolvedModel:
    """The model that --against names; InputError when it is the same one."""
    other = resolve_model(config, text)
    if other.fingerprint == found.fingerprint:
        raise InputError(
            f"--against expected another model than {_reference(found)}, found the same weights ({found.fingerprint})"
            f" under {text!r}; name another run, version or folder"
        )
    return other


def _dataset(config: Config, workspace: Workspace, wanted: str) -> tuple[Config, DatasetVersion]:
    """Return the dataset version with the config at its resolution; InputError when a named one is not here."""
    if not wanted:
        return config, ensure_dataset(config)
    dataset, record = named_version(workspace, wanted)
    section = config.data.model_copy(update={"resolution_px": record["config"]["resolution_px"]})
    return config.model_copy(update={"data": section}), dataset


def _base_of(config: Config, workspace: Workspace, found: ResolvedModel) -> ResolvedModel | None:
    """What the model was trained from, or None where that is the model itself or cannot be had any more."""
    record = (read_record(workspace.run_dir(found.run_id)) or {}) if found.run_id else {}
    trained_from = record.get("inputs", {}).get("base_path") or config.model.base or str(embedded_base())
    try:
        base = resolve_model(config, trained_from)
    except (InputError, RegistryError) as error:
        say(f"no comparison with the base: {error}")
        return None
    expected = found.lineage.get(TAG_BASE, base.fingerprint)
    if base.fingerprint != expected:
        say(f"no comparison with the base: {base.directory} holds {base.fingerprint}, training started from {expected}")
        return None
    return None if base.fingerprint == found.fingerprint else base


def same_latents(one: Path, other: Path) -> bool:
    """Losses compare only in one latent space and for one prediction target (whatever precision the files have)."""
    first, second = (load_parts(directory, only={"vae"}) for directory in (one, other))
    weights, others = first.vae.state_dict(), second.vae.state_dict()
    same_vae = first.vae.config.scaling_factor == second.vae.config.scaling_factor and weights.keys() == others.keys()
    return (
        first.prediction == second.prediction
        and same_vae
        and all(torch.equal(weight, others[name]) for name, weight in weights.items())
    )


def _facts(
    found: ResolvedModel, data: HeldOut, encoder: ClipEncoder, other: ResolvedModel | None, against: bool
) -> dict[str, str]:
    """Who, what and when; only what is known."""
    name = (_reference(other) if against else other.name) if other else ""
    facts = {
        "Model": _reference(found),
        "Run": found.run_id if found.version is not None else None,
        "Weights": found.fingerprint,
        "Other model" if against else "Base": f"{name} ({other.fingerprint})" if other else None,
        "Test data": data.dataset.id,
        "Trained on": found.dataset,
        "Encoder": f"{encoder.directory.name} ({encoder.identity})",
        "Code": found.lineage.get(TAG_COMMIT),
        "Measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    return {name: value for name, value in facts.items() if value}


def _curves(run_directory: Path) -> list[Curve]:
    """The run's losses by step, from its metrics.jsonl."""
    path = run_directory / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if stage.fetch(path) else []
    curves = []
    for key, name, dense in (("train/loss", "training", True), ("eval/loss", "validation", False)):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if len(points) >= 2:
            steps, values = zip(*points, strict=True)
            curves.append(Curve(name, steps, values, dense=dense, accent=not dense))
    return curves


def _settings(config: Config, workspace: Workspace, found: ResolvedModel) -> dict[str, str]:
    """YAML for the curious: this evaluation's config, and the run's."""
    settings = {"Configuration of this evaluation": told_config(config.model_dump())}
    record = read_record(workspace.run_dir(found.run_id)) if found.run_id else None
    if record and "config" in record:
        settings["Configuration of the run"] = told_config(record["config"])
    return {title: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) for title, tree in settings.items()}


def _paths(workspace: Workspace, found: ResolvedModel, other: ResolvedModel | None, data: HeldOut) -> dict[str, Path]:
    models = _label(found) + (f"-against-{_label(other)}" if other else "")
    stem = re.sub(r"[^A-Za-z0-9._@-]+", "-", f"evaluate-{models}-{data.dataset.id}")
    return {kind: workspace.reports / f"{stem}.{kind}" for kind in ("html", "png", "json")}


def _label(found: ResolvedModel) -> str:
    """What names a model in a file name and a title."""
    if found.version is not None:
        return f"{found.name} version {found.version}"
    return found.run_id or f"{Path(found.name).name} {found.fingerprint}"


def _reference(found: ResolvedModel) -> str:
    """What names a model on the command line."""
    if found.version is not None:
        return f"models:/{found.name}/{found.version}"
    return found.run_id or str(found.directory)


def _tell(record: dict[str, Any], paths: dict[str, Path]) -> None:
    name = "other" if record["against"] else "base"
    for key in (LOSS, CLIP, KID, ADHERENCE):
        if key in record["scorecard"]:
            value, low, high = rounded(Estimate(**record["scorecard"][key]))
            before = (record["base_scorecard"] or {}).get(key)
            change = record["change"].get(key)
            compared = f"; {name} {rounded(Estimate(**before))[0]}" if before else ""
            if change:
                items = "pictures" if key == LOSS else "prompts"
                compared += f", {decided(_paired(change), items)}"
            say(f"  {TITLES[key]:<17} {value} ({low} to {high}, {record['scorecard'][key]['n']} items{compared})")
        else:
            say(f"  {TITLES[key]:<17} not measured: {record['not_measured'][key]}")
    say(f"report: {paths['html']}")


def _paired(change: dict[str, Any]) -> Paired:
    return Paired(change["value"], *(change[name] for name in ("low", "high", "p_value", "n", "needed")))


def _result(record: dict[str, Any], paths: dict[str, Path]) -> dict[str, Any]:
    numbers = {key: record[key] for key in ("model", "against", "dataset", "scorecard", "not_measured", "change")}
    other = {"other_scorecard": record["base_scorecard"]}
    return {**numbers, **other, "report": str(paths["html"]), "grid": str(paths["png"])}
