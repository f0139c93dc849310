"""Write a search's HTML report and the JSON it was drawn from."""

from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from cluster import stage
from cluster.artifacts import write_bytes_atomic, write_json_atomic
from components.search_page import Search, make_search_page
from components.search_results import Trial
from flows.config import Config, told_config
from flows.search_record import SearchRecord
from flows.train import Inputs

SHEET_PX = 900  # a sheet in the report is at most so wide


def write_report(config: Config, inputs: Inputs, record: SearchRecord, results: dict[str, Any]) -> Path:
    """Write `reports/search-*.html` and `.json`; return the path of the page."""
    trials = [
        Trial(one.number, one.run_id, one.overrides, one.state, tuple(one.reports), one.reason, one.origin)
        for one in record.trials
    ]
    best = next(trial for trial in trials if trial.run_id == results["best"]["run_id"])
    pictures = {}
    for trial in trials:
        samples = stage.files(inputs.workspace.run_dir(trial.run_id) / "samples", ".png")
        sheets = [path for path in samples if path.name.startswith("step-")]
        if sheets and stage.fetch(sheets[-1]):
            with Image.open(sheets[-1]) as sheet:
                sheet.thumbnail((SHEET_PX, SHEET_PX))
                pictures[trial.number] = sheet.convert("RGB")
    search = Search(trials, best, config.train.steps, results["seconds_between_trials"], pictures)
    facts = {
        "Data": inputs.dataset.id,
        "Base": inputs.base_fingerprint,
        "Sampler and scheduler": f"{config.search.sampler}, {config.search.scheduler}",
        "Time": f"{results['seconds']:.0f} s on {config.placement.workers} workers",
    }
    settings = {
        "Settings": yaml.safe_dump(config.model_dump(include={"data", "model", "train", "search"}), sort_keys=False)
    }
    page = inputs.workspace.reports / f"search-{record.directory.name}.html"
    write_bytes_atomic(page, make_search_page(record.directory.name, search, facts, settings).encode())
    curves = {str(trial.number): trial.curve for trial in trials}
    write_json_atomic(
        page.with_suffix(".json"), {**results, "curves": curves, "config": told_config(config.model_dump())}
    )
    return page
