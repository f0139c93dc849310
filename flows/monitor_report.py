"""Explain an alarm and write the monitor's HTML page with the JSON it was drawn from."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from cluster.artifacts import Workspace, write_bytes_atomic, write_json_atomic
from components.drift import Explanation, Look, explain
from components.drift_page import Drifted, Group, make_drift_page
from components.drift_plots import PastLook
from components.drift_streams import CAPTIONS, PROMPTS
from components.encode import read_pictures
from components.errors import DataError
from flows.compare_window import Compared
from flows.config import Config
from flows.dataset_versions import pixel_store

SHOWN = 4
"""Pictures of a group, and as many of the reference beside them."""
Explained = Mapping[str, Explanation]


def explanations(found: Look, compared: Compared) -> dict[str, Explanation]:
    """What drifted, for each stream that did."""
    return {
        one.stream: explain(compared.reference, compared.arrivals, one)
        for one in found.streams
        if one.verdict == "drift"
    }


def attributions(explained: Explained, compared: Compared) -> dict[str, Any]:
    """The same for the JSON: hashes of the pictures that drifted most, cluster by cluster, and the words."""
    told = {}
    for stream, one in explained.items():
        groups = [list(cluster.members) for cluster in one.clusters]
        told[stream] = {
            "clusters": []
            if stream == PROMPTS
            else [[compared.arrival_keys[place] for place in group] for group in groups],
            "words": [
                {"word": word.text, "deviations": word.deviations, "reference": word.reference, "window": word.arrivals}
                for word in one.words
            ],
        }
    return told


def write_report(
    config: Config,
    workspace: Workspace,
    test: tuple[Look, Compared, Explained],
    result: Mapping[str, Any],
    journaled: Sequence[Mapping[str, Any]],
) -> Path:
    """Write `reports/monitor-*.html` and `.json`; a page that tells of drift is kept, others make room for the next."""
    found, compared, explained = test
    reference = result["reference"]
    stamp = "-" + re.sub(r"[^0-9TZ]", "", result["looked_at"]) if found.verdict == "drift" else ""
    stem = re.sub(r"[^A-Za-z0-9._@-]+", "-", f"monitor-{config.name}-version-{reference['version']}{stamp}")
    facts = {
        "Champion": f"models:/{config.name}/{reference['version']}",
        "Its data": reference["dataset"],
        "Reference": f"{len(compared.reference)} held-out pictures, {reference['sha256'][:12]}",
        "Window": f"{len(compared.arrivals)} of {result['new_images']} pictures, {result['window']['prompts']} prompts",
        "Encoder": reference["encoder"],
        "Looked": result["looked_at"].replace("T", " ").replace("Z", " UTC"),
    }
    drifted = {
        stream: Drifted(tuple(_groups(config, workspace, stream, one, compared)), one.words)
        for stream, one in explained.items()
    }
    past = [_past(line) for line in [*journaled, result] if line.get("tested") and _same(line, reference)]
    settings = {"The monitor": yaml.safe_dump(config.monitor.model_dump(mode="json"), sort_keys=False)}
    html = make_drift_page(
        f"Arrivals beside {config.name} version {reference['version']}",
        found,
        config.monitor.smallest_effect,
        facts,
        drifted,
        past,
        config.monitor.false_alarms_per_year,
        settings,
    )
    page = workspace.reports / f"{stem}.html"
    write_bytes_atomic(page, html.encode())
    write_json_atomic(page.with_suffix(".json"), {**result, "look": found.as_dict()})
    return page


def _same(line: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    return bool(line["reference"]["sha256"] == reference["sha256"])


def _past(line: Mapping[str, Any]) -> PastLook:
    """What the plots over time need of a journaled look, or of this one."""
    at = datetime.strptime(line["looked_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    streams = {
        name: (one["p_value"], one["threshold"], one["effect"])
        for name, one in line["streams"].items()
        if one["p_value"] is not None
    }
    return PastLook(at.timestamp(), line["verdict"] == "drift", line["spent"], streams)


def _groups(config: Config, workspace: Workspace, stream: str, one: Explanation, compared: Compared) -> list[Group]:
    """The clusters with their pictures (prompts: their texts), beside the nearest ones of the reference."""
    if stream == PROMPTS and compared.arrivals.prompts is not None:
        rows, texts = compared.arrivals.prompts.rows_ND, compared.arrivals.prompts.texts
        known = compared.reference.captions.rows_ND
    else:
        rows, texts = compared.arrivals.picture_rows_ND, compared.arrivals.captions.texts
        known = compared.reference.picture_rows_ND
    if stream == CAPTIONS:
        rows, known = compared.arrivals.captions.rows_ND, compared.reference.captions.rows_ND
    groups = []
    for cluster in one.clusters:
        members = list(cluster.members[:SHOWN])
        near = np.argsort(-(known @ rows[cluster.medoid]), kind="stable")[:SHOWN].tolist()
        nearest = _shown(config, workspace, compared.reference_keys, compared.reference.captions.texts, near)
        keys = [] if stream == PROMPTS else compared.arrival_keys
        groups.append(Group(len(cluster.members), _shown(config, workspace, keys, texts, members), nearest))
    return groups


def _shown(
    config: Config, workspace: Workspace, keys: Sequence[str], texts: Sequence[str], places: Sequence[int]
) -> tuple[tuple[str, Image.Image | None], ...]:
    """(caption, picture) of some items; None where there is no picture, or its pixels are gone."""
    pictures: list[Any] = [None] * len(places)
    if keys:
        try:
            pictures = list(read_pictures(pixel_store(config, workspace).directory, [keys[place] for place in places]))
        except DataError:
            pass
    return tuple((texts[place], picture) for place, picture in zip(places, pictures, strict=True))
