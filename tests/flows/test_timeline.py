"""timeline: page and JSON of real and generated workspaces, torn and moved ones too, and a browser that opens it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster.artifacts import append_journal, open_workspace
from cluster.champion import move_champion, roll_back
from cluster.registry import TAG_MODEL_FINGERPRINT, TAG_RUN, Registry
from flows import timeline
from flows.config import Config
from tests.journals import story_lines, write_journal


@pytest.fixture
def long(tmp_path: Path) -> Config:
    """A year of 10,000 lines, every 97th torn, with the reports that it names and the pictures of its runs."""
    root = tmp_path / "workspace"
    lines = story_lines(7, 10_000)
    write_journal(root / "journal.jsonl", lines, torn_every=97)
    (root / "reports").mkdir()
    for line in lines:
        if line["event"] == "promote":
            (root / "reports" / Path(line["report"]).name).write_text("a report")
            samples = root / "runs" / line["run_id"] / "samples"
            samples.mkdir(parents=True)
            Image.new("RGB", (900, 600), "teal").save(samples / "step-00000600.png")
            Image.new("RGB", (900, 600), "red").save(samples / "step-00000000.png")
    return Config(workspace=str(root), name="icons")


def test_long_and_torn_journal_becomes_one_page_with_links_and_pictures(long: Config) -> None:
    found = timeline.run(long)
    html, told = Path(found["report"]).read_text(), json.loads(Path(found["data"]).read_text())
    assert 9800 < found["lines"] < 10_000 and found["looks"] == len(told["looks"]) > 4000
    assert found["waits"] == sum(group["number"] for group in told["waits"]) and told["lead"] in html.replace(
        "&#x27;", "'"
    )
    newest = told["judgements"][-1]["report"].rpartition("/")[2]
    assert f'href="{newest}"' in html and html.count('src="data:image/webp') == 6 and ">step 600<" in html
    assert len(html) < 2_000_000


def test_same_workspace_gives_the_same_data(long: Config) -> None:
    first = Path(timeline.run(long)["data"]).read_bytes()
    assert Path(timeline.run(long)["data"]).read_bytes() == first


def test_todays_workspace_is_told_by_its_own_moves(config: Config, capsys: Any) -> None:
    workspace = open_workspace(config.workspace)
    registry = Registry(workspace)
    append_journal(workspace, "dataset", dataset="fresco@a", images=60, rejected=0)
    for run_id in ("a", "b"):
        directory = workspace.run_dir(run_id) / "pipeline"
        directory.mkdir(parents=True)
        version = registry.register("fresco", directory, {TAG_RUN: run_id, TAG_MODEL_FINGERPRINT: run_id}).number
        line = {"decision": "promote", "reasons": ["lower"], "version": version, "run_id": run_id}
        move_champion(registry, "fresco", version, line)
    roll_back(registry, "fresco", {"reasons": ["users complain"]})
    found = timeline.run(config)
    assert (found["reigns"], found["judgements"], found["datasets"], found["cycles"]) == (3, 2, 1, 0)
    told = json.loads(Path(found["data"]).read_text())
    assert [(reign["version"], reign["event"]) for reign in told["reigns"]] == [
        (1, "promote"),
        (2, "promote"),
        (1, "rollback"),
    ]
    assert "users complain" in Path(found["report"]).read_text()
    assert "Version 1 serves since" in capsys.readouterr().err


def test_workspace_without_a_journal_gets_a_page_that_says_so(config: Config, capsys: Any) -> None:
    found = timeline.run(config)
    assert "No champion so far." in Path(found["report"]).read_text() and found["lines"] == 0
    assert "the journal tells nothing of fresco so far" in capsys.readouterr().err


def test_links_lead_only_to_files_that_are_there(config: Config) -> None:
    workspace = open_workspace(config.workspace)
    workspace.reports.mkdir()
    (workspace.reports / "a b%.html").write_text("x")
    link = timeline.link_from(workspace)
    assert link("/before/it/was/moved/reports/a b%.html") == "a%20b%25.html"
    assert [link(named) for named in ("", "none.html", "javascript:alert(1)", "../../etc/passwd")] == ["", "", "", ""]


def test_picture_that_cannot_be_read_is_left_out(long: Config) -> None:
    for sheet in open_workspace(long.workspace).runs.glob("*/samples/step-00000600.png"):
        sheet.write_bytes(b"no picture")
    assert "What they drew" not in Path(timeline.run(long)["report"]).read_text()


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no Chromium found")
def test_browser_shows_the_page_whole_on_a_desk_and_on_a_phone(long: Config, tmp_path: Path) -> None:
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    page = Path(timeline.run(long)["report"]).as_uri()
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Service(shutil.which("chromedriver")))
    try:
        for width in (1280, 500):
            driver.set_window_size(width, 1000)
            driver.get(page)
            wide = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide[0] <= wide[1], "nothing sticks out at the side"
            assert driver.execute_script("return document.querySelectorAll('.lane').length") == 7
            assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
        told = [line for line in driver.get_log("browser") if "favicon" not in line["message"]]
        assert told == []
    finally:
        driver.quit()
