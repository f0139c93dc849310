"""Write a promotion's HTML page and the JSON it was drawn from."""

import re
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from cluster.artifacts import Workspace, write_bytes_atomic, write_json_atomic
from components.decision_page import Judged, make_decision_page
from flows.config import Config

WIDTH_PX = 1100  # of the grid in the page


def write_decision(
    config: Config, workspace: Workspace, judged: Judged, facts: dict[str, str], line: dict[str, Any], grid: str | None
) -> Path:
    """Write `reports/promote-*.html` and, in `.json`, the journal's `line`; return the path of the page."""
    against = f"-against-{judged.champion}" if judged.champion else ""
    stem = re.sub(r"[^A-Za-z0-9._@-]+", "-", f"promote-{config.name}-version-{judged.version}{against}")
    page = workspace.reports / f"{stem}.html"
    settings = {"The gate": yaml.safe_dump(config.gate.model_dump(mode="json"), sort_keys=False, allow_unicode=True)}
    picture = None
    if grid:
        with Image.open(grid) as drawn:
            picture = drawn.convert("RGB")
            picture.thumbnail((WIDTH_PX, WIDTH_PX * 4))
    link = Path(line["evaluation"]).name if line["evaluation"] else ""
    title = f"{config.name} version {judged.version}"
    html = make_decision_page(title, judged, facts, settings, picture, link)
    write_bytes_atomic(page, html.encode())
    write_json_atomic(page.with_suffix(".json"), line)
    return page
