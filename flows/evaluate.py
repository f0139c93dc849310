"""`fresco evaluate MODEL`: a scorecard with intervals on the test split, and a report beside the base it came from.

Find the model, its base and the dataset version; measure both on the same pictures, prompts and seeds; average; write
the page, the grid and, last, the record. A repeated call with the same inputs says so and stops.
"""

import json
import re
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from cluster.artifacts import Workspace, open_workspace, read_json, read_record, write_bytes_atomic, write_json_atomic
from cluster.errors import RegistryError
from cluster.registry import TAG_BASE, TAG_COMMIT
from components.dataset import DatasetVersion, load_dataset
from components.encode import read_pictures
from components.errors import InputError
from components.evaluation_page import Evaluation, Side, make_grid, make_page
from components.metrics import ClipEncoder, Estimate
from components.models import embedded_base, embedded_clip, load_parts
from components.plots import Curve
from components.report import rounded
from components.scorecard import (
    ADHERENCE,
    CLIP,
    KID,
    LOSS,
    TITLES,
    Measurement,
    Reference,
    make_scorecard,
    paired_change,
)
from flows.config import Config
from flows.console import say, step
from flows.measure import VERSION, HeldOut, Performance, fingerprint_of, held_out, measure, shown, to_png
from flows.models import ResolvedModel, resolve_model
from flows.prepare import ensure_dataset


def run(config: Config, model: str, dataset: str = "") -> dict[str, Any]:
    """Measure `model` on the test split of a dataset version; says so when that was done before.

    `dataset` (name@fingerprint) chooses the version; empty takes the one the model was trained on, and where that is
    not in this workspace the present one of data.source.
    """
    workspace = open_workspace(config.workspace)
    found = resolve_model(config, model)
    own = found.dataset if found.dataset and read_record(workspace.dataset_dir(found.dataset)) else ""
    config, version = _dataset(config, workspace, dataset or own)
    data = held_out(config, workspace, version)
    encoder = ClipEncoder(config.model.clip or embedded_clip())
    base = _base_of(config, workspace, found)
    paths = _paths(workspace, found, data)
    inputs = [found.fingerprint, base.fingerprint if base else "", data.dataset.id, encoder.identity]
    fingerprint = fingerprint_of([VERSION, *inputs, config.evaluate.model_dump()])
    record = read_json(paths["json"])
    if record and record["fingerprint"] == fingerprint and all(path.exists() for path in paths.values()):
        say(f"evaluation of {_reference(found)} on {data.dataset.id}: complete, nothing to do")
        _tell(record, paths)
        return _result(record, paths)

    step(f"evaluate {_reference(found)} on the {len(data.pictures)} test pictures of {data.dataset.id}")
    performances = {"model": measure(config, workspace, found.directory, found.fingerprint, data)}
    if base:
        performances["base"] = measure(config, workspace, base.directory, base.fingerprint, data)
    comparable = base is not None and same_latents(found.directory, base.directory)
    evaluation = _average(config, data, encoder, performances, comparable)

    facts = _facts(found, data, encoder, base)
    curves = _curves(workspace.run_dir(found.run_id)) if found.run_id else []
    page = make_page(_label(found), evaluation, facts, curves, _settings(config, workspace, found))
    write_bytes_atomic(paths["html"], page.encode())
    write_bytes_atomic(paths["png"], to_png(make_grid(evaluation)))
    record = {
        "fingerprint": fingerprint,
        "model": _reference(found),
        "dataset": data.dataset.id,
        "facts": facts,
        "config": config.model_dump(),
        **_numbers(evaluation),
    }
    write_json_atomic(paths["json"], record)
    _tell(record, paths)
    return _result(record, paths)


def _dataset(config: Config, workspace: Workspace, wanted: str) -> tuple[Config, DatasetVersion]:
    """Return the dataset version with the config at its resolution; InputError when a named one is not here."""
    if not wanted:
        return config, ensure_dataset(config)
    directory = workspace.dataset_dir(wanted)
    record = read_record(directory)
    if record is None:
        known = sorted(path.parent.name for path in workspace.data.glob("*/record.json"))
        raise InputError(
            f"expected dataset version {wanted!r} in {str(workspace.data)!r}, found {', '.join(known) or 'none'};"
            " name one of those with --dataset"
        )
    section = config.data.model_copy(update={"resolution_px": record["config"]["resolution_px"]})
    return config.model_copy(update={"data": section}), load_dataset(directory)


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


def _average(
    config: Config, data: HeldOut, encoder: ClipEncoder, performances: dict[str, Performance], comparable: bool
) -> Evaluation:
    """From what was done to what is claimed."""
    plan = config.evaluate
    real = read_pictures(data.pixels, [item.sha256 for item in data.prompts])
    reference = Reference(encoder.texts(data.captions), encoder.images(real), plan.seed, plan.bootstrap)
    measured, sides = {}, {}
    for name, performance in performances.items():
        shows_P = shown(data.captions, performance.drawn)
        measured[name] = Measurement(performance.losses_NK, encoder.images(performance.drawn), shows_P)
        sides[name] = Side(make_scorecard(measured[name], reference), performance.drawn, shows_P)
    change = paired_change(measured["model"], measured["base"], reference, comparable) if "base" in measured else {}
    seeds = [plan.seed + index for index in range(len(data.prompts))]
    return Evaluation(sides["model"], sides.get("base"), change, data.captions, seeds, real)


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "scorecard": evaluation.model.card.as_dict(),
        "not_measured": dict(evaluation.model.card.not_measured),
        "base_scorecard": evaluation.base.card.as_dict() if evaluation.base else None,
        "change": {name: estimate.as_dict() for name, estimate in evaluation.change.items()},
    }


def _facts(found: ResolvedModel, data: HeldOut, encoder: ClipEncoder, base: ResolvedModel | None) -> dict[str, str]:
    """Who, what and when; only what is known."""
    facts = {
        "Model": _reference(found),
        "Run": found.run_id if found.version is not None else None,
        "Weights": found.fingerprint,
        "Test data": data.dataset.id,
        "Trained on": found.dataset,
        "Base": f"{base.name} ({base.fingerprint})" if base else None,
        "Encoder": f"{encoder.directory.name} ({encoder.identity})",
        "Code": found.lineage.get(TAG_COMMIT),
        "Measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    return {name: value for name, value in facts.items() if value}


def _curves(run_directory: Path) -> list[Curve]:
    """The run's losses by step, from its metrics.jsonl."""
    path = run_directory / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    curves = []
    for key, name, dense in (("train/loss", "training", True), ("eval/loss", "validation", False)):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if len(points) >= 2:
            steps, values = zip(*points, strict=True)
            curves.append(Curve(name, steps, values, dense=dense, accent=not dense))
    return curves


def _settings(config: Config, workspace: Workspace, found: ResolvedModel) -> dict[str, str]:
    """YAML for the curious: this evaluation's config, and the run's."""
    settings = {"Configuration of this evaluation": config.model_dump()}
    record = read_record(workspace.run_dir(found.run_id)) if found.run_id else None
    if record and "config" in record:
        settings["Configuration of the run"] = record["config"]
    return {title: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) for title, tree in settings.items()}


def _paths(workspace: Workspace, found: ResolvedModel, data: HeldOut) -> dict[str, Path]:
    stem = re.sub(r"[^A-Za-z0-9._@-]+", "-", f"evaluate-{_label(found)}-{data.dataset.id}")
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
    for key in (LOSS, CLIP, KID, ADHERENCE):
        if key in record["scorecard"]:
            value, low, high = rounded(Estimate(**record["scorecard"][key]))
            before = (record["base_scorecard"] or {}).get(key)
            compared = f"; base {rounded(Estimate(**before))[0]}" if before else ""
            say(f"  {TITLES[key]:<17} {value} ({low} to {high}, {record['scorecard'][key]['n']} items{compared})")
        else:
            say(f"  {TITLES[key]:<17} not measured: {record['not_measured'][key]}")
    say(f"report: {paths['html']}")


def _result(record: dict[str, Any], paths: dict[str, Path]) -> dict[str, Any]:
    numbers = {key: record[key] for key in ("model", "dataset", "scorecard")}
    return {**numbers, "report": str(paths["html"]), "grid": str(paths["png"])}
