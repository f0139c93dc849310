"""promote: what it registers, what it refuses, and that doing it twice changes nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.artifacts import open_workspace, read_journal
from cluster.registry import (
    CHAMPION,
    PREVIOUS,
    TAG_BASE,
    TAG_DATASET,
    TAG_FINGERPRINT,
    TAG_MODEL_FINGERPRINT,
    TAG_PARENT,
    TAG_RUN,
    Registry,
)
from components.errors import InputError
from components.models import load_parts, model_fingerprint, save_parts
from flows import evaluate, promote
from flows.config import Config
from flows.models import resolve_model


@pytest.fixture(autouse=True)
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand where the scorecard is made (it has its own tests) and note which models were asked about."""
    asked: list[str] = []

    def answer(config: Config, model: str) -> dict[str, Any]:
        asked.append(model)
        scorecard = {"loss": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}
        return {"model": model, "dataset": "emblems@0123456789ab", "scorecard": scorecard, "report": f"{model}.html"}

    monkeypatch.setattr(evaluate, "run", answer)
    return asked


def test_first_promotion_registers_with_lineage_and_says_there_is_no_gate(
    config: Config, make_run, evaluated: list[str]
) -> None:
    run = make_run("fresco-aaa", 0)
    result = promote.run(config, "fresco-aaa")
    assert result["decision"] == "promote" and result["report"] == "fresco-aaa.html"
    assert (result["version"], result["champion"], result["previous"]) == (1, 1, None)
    assert any("statistical gate is not part of this version" in reason for reason in result["reasons"])
    assert "there was no champion before" in result["reasons"]
    assert evaluated == ["fresco-aaa"]
    champion = Registry(open_workspace(config.workspace)).by_alias("fresco", CHAMPION)
    assert champion is not None
    assert champion.tags[TAG_RUN] == "fresco-aaa" and champion.tags[TAG_DATASET] == "emblems@0123456789ab"
    assert champion.tags[TAG_FINGERPRINT] == "recipe000000"
    assert champion.tags[TAG_MODEL_FINGERPRINT] == model_fingerprint(run / "pipeline")
    assert resolve_model(config, "models:/fresco@champion").directory == run / "pipeline"


def test_second_promotion_keeps_the_first_as_previous_and_names_its_parent(config: Config, make_run) -> None:
    first = make_run("fresco-aaa", 0)
    make_run("fresco-bbb", 1)
    promote.run(config, "fresco-aaa")
    result = promote.run(config, "fresco-bbb")
    assert (result["version"], result["champion"], result["previous"]) == (2, 2, 1)
    champion = Registry(open_workspace(config.workspace)).by_alias("fresco", CHAMPION)
    assert champion is not None
    assert champion.tags[TAG_BASE] == model_fingerprint(first / "pipeline")
    assert champion.tags[TAG_PARENT] == "models:/fresco/1"


def test_promoting_the_champion_again_changes_nothing_and_says_so(config: Config, make_run) -> None:
    make_run("fresco-aaa", 0)
    make_run("fresco-bbb", 1)
    for run_id in ("fresco-aaa", "fresco-bbb"):
        promote.run(config, run_id)
    workspace = open_workspace(config.workspace)
    journal = read_journal(workspace)
    again = promote.run(config, "fresco-bbb")
    assert again["reasons"] == ["version 2 is the champion already: nothing changed"]
    assert (again["decision"], again["champion"], again["previous"]) == ("promote", 2, 1)
    assert promote.run(config, "models:/fresco@champion")["champion"] == 2
    assert read_journal(workspace) == journal
    assert len(Registry(workspace).versions("fresco")) == 2


def test_journal_has_every_move_with_its_numbers_even_after_a_crash_before_the_line(config: Config, make_run) -> None:
    make_run("fresco-aaa", 0)
    promote.run(config, "fresco-aaa")
    workspace = open_workspace(config.workspace)
    line = read_journal(workspace)[-1]
    assert (line["event"], line["decision"], line["champion"], line["previous"]) == ("promote", "promote", 1, None)
    assert line["scorecard"] == {"loss": 0.5} and line["dataset"] == "emblems@0123456789ab" and line["reasons"]
    workspace.journal.unlink()
    promote.run(config, "fresco-aaa")
    assert [entry["champion"] for entry in read_journal(workspace)] == [1]


def test_model_that_draws_nothing_finite_is_rejected_and_the_champion_stays(config: Config, make_run) -> None:
    make_run("fresco-aaa", 0)
    promote.run(config, "fresco-aaa")
    broken = make_run("fresco-bbb", 1) / "pipeline"
    parts = load_parts(broken)
    with torch.no_grad():
        parts.denoiser.conv_out.bias.fill_(float("nan"))
    shutil.rmtree(broken)
    save_parts(parts, broken)
    result = promote.run(config, "fresco-bbb")
    assert (result["decision"], result["version"], result["champion"]) == ("reject", None, 1)
    assert "the model does not draw: expected finite pixels" in result["reasons"][0]
    workspace = open_workspace(config.workspace)
    assert len(Registry(workspace).versions("fresco")) == 1
    assert read_journal(workspace)[-1]["decision"] == "reject"


def test_going_back_to_an_older_version_makes_the_newer_one_previous(config: Config, make_run) -> None:
    make_run("fresco-aaa", 0)
    make_run("fresco-bbb", 1)
    for run_id in ("fresco-aaa", "fresco-bbb", "fresco-aaa"):
        result = promote.run(config, run_id)
    assert (result["version"], result["champion"], result["previous"]) == (1, 1, 2)
    previous = Registry(open_workspace(config.workspace)).by_alias("fresco", PREVIOUS)
    assert previous is not None and previous.number == 2


def test_model_from_outside_the_workspace_survives_the_loss_of_its_folder(
    config: Config, tiny_pipelines: dict[int, Path], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(tiny_pipelines[0], outside)
    promote.run(config, str(outside))
    shutil.rmtree(outside)
    champion = resolve_model(config, "models:/fresco@champion")
    assert champion.version == 1 and champion.run_id is None
    assert champion.directory.is_relative_to(open_workspace(config.workspace).root)


def test_folder_that_is_no_pipeline_changes_nothing(config: Config, tmp_path: Path, evaluated: list[str]) -> None:
    with pytest.raises(InputError, match="found a folder without it"):
        promote.run(config, str(tmp_path))
    assert evaluated == [] and read_journal(open_workspace(config.workspace)) == []
