"""fresco timeline: a page that tells the whole story of the model that serves, from the journal and what it points to.

Writes `reports/timeline.html`, with nothing to fetch, and `timeline.json`, which has all of it. It changes nothing
else: it can be made at any time, also while the loop works, and from a workspace that was moved.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from cluster import stage
from cluster.artifacts import Workspace, open_workspace, read_journal, write_bytes_atomic, write_json_atomic
from cluster.reigns import reigns
from components.report import Card
from components.story import Story
from components.timeline import tell
from components.timeline_page import lead, make_timeline_page
from components.timeline_words import Link, when
from flows.config import Config
from flows.console import program, say

MOST_PICTURES = 6
PICTURE_PX = 480
LARGEST_PIXELS = 50_000_000


def run(config: Config) -> dict[str, Any]:
    """Read the journal, write page and JSON, say where they are."""
    workspace = open_workspace(config.workspace)
    lines = [line for line in read_journal(workspace) if isinstance(line, dict) and isinstance(line.get("event"), str)]
    story = tell(lines, config.name, reigns(lines, config.name))
    html = workspace.reports / "timeline.html"
    cards = _pictures(workspace, story)
    page = make_timeline_page(story, _facts(workspace, story), cards, link_from(workspace))
    numbers = _numbers(story)
    write_json_atomic(html.with_suffix(".json"), {**numbers, "lead": lead(story), **asdict(story)})
    write_bytes_atomic(html, page.encode())
    say(lead(story))
    say(f"timeline: {html}")
    if not story.entries:
        say(f"the journal tells nothing of {config.name} so far; next: {program()} train")
    return {"report": str(html), "data": str(html.with_suffix(".json")), **numbers}


def plan(config: Config) -> list[str]:
    """Say what `run` would do."""
    return [f"read the journal of {config.name}", "write reports/timeline.html and reports/timeline.json"]


def link_from(workspace: Workspace) -> Link:
    """Return what makes addresses, relative to the page, of files that the journal names.

    Journals hold absolute paths: in a workspace that was moved, the file of the same name in `reports` is meant.
    """
    folder = workspace.reports
    there = {path.name for path in stage.files(folder)}

    def link(named: str) -> str:
        name = Path(named).name
        return quote(name) if name in there else ""

    return link


def _facts(workspace: Workspace, story: Story) -> dict[str, str]:
    first, last = story.span
    told = {"From": when(first), "To": when(last)} if story.entries else {}
    made = when(time.time())
    return {"Workspace": workspace.uri.rpartition("/")[2], **told, "Made": f"{made} UTC"}


def _numbers(story: Story) -> dict[str, int]:
    """How much there is of everything."""
    kinds = ("looks", "cycles", "judgements", "reigns", "datasets")
    waits = sum(group.number for group in story.waits)
    return {**{kind: len(getattr(story, kind)) for kind in kinds}, "waits": waits, "lines": story.lines}


def _pictures(workspace: Workspace, story: Story) -> list[Card]:
    """The last sample sheet of the newest champions' runs, each run once."""
    found: list[Card] = []
    seen: set[str] = set()
    for reign in reversed(story.reigns):
        if reign.run_id and reign.run_id not in seen and len(found) < MOST_PICTURES:
            seen.add(reign.run_id)
            sheets = _sheets(workspace.runs / Path(reign.run_id).name / "samples")
            picture = _small(sheets)
            if picture is not None:
                label = f"step {int(sheets[-1].stem.removeprefix('step-'))}"
                found.append(Card(f"Version {reign.version}", reign.run_id, ((label, picture),)))
    return found


def _sheets(folder: Path) -> list[Path]:
    """The sample sheets of a run in order, the last one on this machine."""
    sheets = [path for path in stage.files(folder, ".png") if re.fullmatch(r"step-\d+", path.stem)]
    return sheets if sheets and stage.fetch(sheets[-1]) else []


def _small(sheets: Sequence[Path]) -> Image.Image | None:
    """The last of the pictures, no wider than it is shown; None where there is none that can be read."""
    if not sheets:
        return None
    try:
        with Image.open(sheets[-1]) as sheet:
            if sheet.width * sheet.height > LARGEST_PIXELS:
                return None
            small = sheet.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((PICTURE_PX, PICTURE_PX))
    return small
