"""promote with real tiny models whose order is known: what the gate lets through, refuses, keeps and writes.

The rehearsal on the serving path has its own tests; here it is stood for, so that no endpoint starts thirty times.
"""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from cluster.artifacts import open_workspace, read_journal, write_record
from cluster.champion import move_champion, set_challenger
from cluster.errors import LeaseLostError, RegistryError
from cluster.registry import (
    CHALLENGER,
    CHAMPION,
    TAG_BASE,
    TAG_DATASET,
    TAG_DECISION,
    TAG_FINGERPRINT,
    TAG_MODEL_FINGERPRINT,
    TAG_PARENT,
    TAG_RETIRED,
    TAG_RUN,
    TAG_SCORECARD,
    Registry,
)
from components.errors import InputError
from components.evidence import Served
from components.models import load_parts, make_tiny, model_fingerprint, save_parts
from components.recipe import DataSection, EvaluateSection, GateSection, ModelSection
from flows import challenge, history, keep, prepare, promote, rollback, status
from flows.config import Config
from flows.models import resolve_model

KILL_LIMIT_S = 300
WORST, MIDDLE, BEST = 4.0, 2.0, 0.0
"""What the denoiser's last layer is multiplied by: a random prediction is the worse the larger it is."""


@pytest.fixture
def config(config: Config, tiny_pipelines: dict[int, Path], clip_directory: Path, examined_here: None) -> Config:
    """80 drawn pictures, examined in this process; a random CLIP, whose scores must not decide."""
    sections = {
        "data": DataSection(source="emblems://base?count=80&seed=3", resolution_px=16, test_fraction=0.25),
        "model": ModelSection(base=str(tiny_pipelines[0]), clip=str(clip_directory)),
        "evaluate": EvaluateSection(prompts=4, sampling_steps=2, bootstrap=100),
        "gate": GateSection(min_test_pictures=5, max_clip_drop=100),
    }
    return config.model_copy(update=sections)


@pytest.fixture(autouse=True)
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand where the candidate is started on the serving path, and note which ones were."""
    asked: list[str] = []

    def answer(config: Config, model: Any) -> Served:
        asked.append(model.name)
        return Served(ready_s=1.0, answer_s=0.1, pictures=3, memory_bytes=2**20)

    monkeypatch.setattr(promote, "rehearse", answer)
    return asked


@pytest.fixture
def make_model(config: Config) -> Callable[..., Path]:
    """Lay down a finished run whose model is worse the larger `scale` is."""

    def make(run_id: str, scale: float, dataset: str | None = None) -> Path:
        parts = make_tiny("stable_diffusion", seed=0)
        with torch.no_grad():
            parts.denoiser.conv_out.weight.mul_(scale)
            parts.denoiser.conv_out.bias.mul_(scale)
        directory = open_workspace(config.workspace).run_dir(run_id)
        save_parts(parts, directory / "pipeline")
        inputs = {"dataset": dataset or prepare.ensure_dataset(config).id, "base": "ba5e00000000"}
        record = {
            "fingerprint": "recipe000000",
            "inputs": inputs,
            "config": config.model_dump(mode="json"),
            "provenance": {"commit": "abc1234"},
            "pipeline": "pipeline",
        }
        write_record(directory, record)
        return directory

    return make


def registry_of(config: Config) -> Registry:
    return Registry(open_workspace(config.workspace))


def challenger_of(config: Config) -> int | None:
    found = registry_of(config).by_alias("fresco", CHALLENGER)
    return found.number if found else None


def promote_and_die(config: Config, model: str) -> None:
    """Kill this process, as the kernel would, while the candidate is judged."""
    promote.rehearse = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    promote.run(config, model)


def outcomes(result: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in result["checks"]}


def test_first_model_passes_as_its_own_case_and_is_registered_with_its_lineage(config, make_model, rehearsed) -> None:
    run = make_model("fresco-a", MIDDLE)
    result = promote.run(config, "fresco-a")
    assert (result["decision"], result["version"], result["champion"], result["previous"]) == ("promote", 1, 1, None)
    assert any("there was no champion before" in reason for reason in result["reasons"])
    assert outcomes(result) == {"data": "pass", "serving": "pass", "champion": "skipped"}
    assert rehearsed == ["fresco-a"] and Path(result["report"]).is_file()
    tags = registry_of(config).by_number("fresco", 1).tags
    assert tags[TAG_RUN] == "fresco-a" and tags[TAG_DATASET] == prepare.ensure_dataset(config).id
    assert tags[TAG_FINGERPRINT] == "recipe000000" and tags[TAG_BASE] == "ba5e00000000"
    assert tags[TAG_MODEL_FINGERPRINT] == model_fingerprint(run / "pipeline")
    assert tags[TAG_DECISION] == "promote" and json.loads(tags[TAG_SCORECARD])["denoising_loss"] > 0


def test_better_model_replaces_the_champion_with_its_numbers_in_the_journal(config, make_model) -> None:
    first = make_model("fresco-a", WORST)
    promote.run(config, "fresco-a")
    run = make_model("fresco-b", BEST)
    record = json.loads((run / "record.json").read_text())
    record["inputs"]["base"] = model_fingerprint(first / "pipeline")
    write_record(run, record)
    result = promote.run(config, "fresco-b")
    assert (result["decision"], result["champion"], result["previous"]) == ("promote", 2, 1), result["reasons"]
    found = outcomes(result)
    assert found["improvement"] == "pass" and found["forgetting"] == "skipped", "one data version"
    line = read_journal(open_workspace(config.workspace))[-1]
    assert (line["event"], line["decision"], line["champion"], line["forced"]) == ("promote", "promote", 2, False)
    numbers = next(check["numbers"] for check in line["checks"] if check["name"] == "improvement")
    page = Path(result["report"])
    assert (
        page.name == "promote-fresco-version-2-against-1.html" and "Version 2 replaces version 1." in page.read_text()
    )
    assert Path(result["evaluation"]).name in page.read_text(), "a link to the whole comparison"
    assert json.loads(page.with_suffix(".json").read_text())["checks"] == line["checks"]
    assert numbers["high"] < -0.01 and numbers["n"] == len(prepare.ensure_dataset(config).split("test"))
    assert line["scorecard"]["denoising_loss"] > 0 and line["dataset"] and line["run_id"] == "fresco-b"
    assert not [metric for metric in line["scorecard"] if "_slice_" in metric], "the report has them"
    assert registry_of(config).by_number("fresco", 2).tags[TAG_PARENT] == "models:/fresco/1"


def test_worse_model_is_rejected_and_remembered(config, make_model) -> None:
    for run_id, scale in (("fresco-a", MIDDLE), ("fresco-b", WORST)):
        make_model(run_id, scale)
        result = promote.run(config, run_id)
    assert (result["decision"], result["version"], result["champion"]) == ("reject", 2, 1)
    assert "shown not to be" in result["reasons"][0]
    assert registry_of(config).by_number("fresco", 2).tags[TAG_DECISION] == "reject"
    assert read_journal(open_workspace(config.workspace))[-1]["decision"] == "reject"
    told = history.run(config)
    assert [entry["champion"] for entry in told["entries"]] == [1]
    assert [(line["version"], line["decision"]) for line in told["refused"]] == [(2, "reject")]


def test_force_promotes_a_worse_model_and_says_so_for_ever(config, make_model) -> None:
    for run_id, scale in (("fresco-a", MIDDLE), ("fresco-b", WORST)):
        make_model(run_id, scale)
        result = promote.run(config, run_id, force=run_id == "fresco-b")
    assert (result["decision"], result["forced"], result["champion"]) == ("promote", True, 2)
    assert result["reasons"][0].startswith("forced")
    assert read_journal(open_workspace(config.workspace))[-1]["forced"] is True
    assert registry_of(config).by_number("fresco", 2).tags[TAG_DECISION] == "forced"
    assert status.run(config)["champion"]["evidence"]["forced"] is True


@pytest.mark.parametrize("force", [False, True])
def test_model_that_does_not_serve_is_rejected_even_by_force(config, make_model, monkeypatch, force) -> None:
    monkeypatch.setattr(promote, "rehearse", lambda *_: Served(problem="endpoint expected to load its model"))
    make_model("fresco-a", MIDDLE)
    result = promote.run(config, "fresco-a", force)
    assert (result["decision"], result["champion"], result["evaluation"]) == ("reject", None, None)
    assert "Version 1 is rejected. There is still no champion." in Path(result["report"]).read_text()
    assert "it does not serve: endpoint expected" in result["reasons"][0]


def test_the_champions_weights_under_another_run_gain_nothing(config, make_model) -> None:
    for run_id in ("fresco-a", "fresco-b"):
        make_model(run_id, MIDDLE)
        result = promote.run(config, run_id)
    assert result["decision"] == "reject" and "nothing to gain" in result["reasons"][0]


def test_champion_whose_files_are_gone_holds_the_candidate(config, make_model) -> None:
    shutil.rmtree(make_model("fresco-a", WORST) / "checkpoints", ignore_errors=True)
    promote.run(config, "fresco-a")
    shutil.rmtree(open_workspace(config.workspace).run_dir("fresco-a"))
    make_model("fresco-b", BEST)
    result = promote.run(config, "fresco-b")
    assert (result["decision"], result["champion"]) == ("hold", 1)
    assert "champion 1 cannot be loaded" in result["reasons"][0]


def test_candidate_on_other_data_is_measured_on_the_champions_data_too(config, make_model) -> None:
    make_model("fresco-a", MIDDLE)
    promote.run(config, "fresco-a")
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"source": "emblems://drifted?count=80&seed=4"})}
    )
    make_model("fresco-b", BEST, prepare.ensure_dataset(other).id)
    result = promote.run(other, "fresco-b")
    assert result["decision"] == "promote", result["reasons"]
    forgetting = next(check for check in result["checks"] if check["name"] == "forgetting")
    assert forgetting["outcome"] == "pass" and forgetting["numbers"]["change"] < 0
    assert prepare.ensure_dataset(config).id in forgetting["sentence"]
    assert outcomes(result)["anchors"] == "pass"


def test_promotion_that_was_overtaken_is_compared_with_the_new_champion(config, make_model, monkeypatch) -> None:
    for run_id, scale in (("fresco-a", WORST), ("fresco-b", MIDDLE), ("fresco-c", BEST)):
        make_model(run_id, scale)
    promote.run(config, "fresco-a")
    promote.run(config, "fresco-b")
    move_champion(registry_of(config), "fresco", 1)
    real, overtaken = promote.move_champion, []

    def overtake(registry: Registry, *arguments: Any, **names: Any) -> Any:
        if not overtaken:
            overtaken.append(True)
            move_champion(registry, "fresco", 2)
        return real(registry, *arguments, **names)

    monkeypatch.setattr(promote, "move_champion", overtake)
    result = promote.run(config, "fresco-c")
    assert (result["decision"], result["champion"], result["previous"]) == ("promote", 3, 2)
    assert any("compared with champion 2" in reason for reason in result["reasons"])


def test_promotion_whose_asker_was_replaced_while_it_waited_for_the_lock_moves_nothing(config, make_model) -> None:
    make_model("fresco-a", MIDDLE)
    asked: list[bool] = []

    def confirm() -> None:
        asked.append(True)
        if len(asked) == 2:  # the first is before the lock
            raise LeaseLostError("an heir works here")

    with pytest.raises(LeaseLostError, match="an heir"):
        promote.run(config, "fresco-a", confirm=confirm)
    assert registry_of(config).by_alias("fresco", CHAMPION) is None


def test_late_loop_refuses_nothing_any_more(config, make_model) -> None:
    for run_id, scale in (("fresco-a", MIDDLE), ("fresco-b", WORST)):
        make_model(run_id, scale)
    promote.run(config, "fresco-a")
    challenge.run(config, "fresco-b")
    journal = read_journal(open_workspace(config.workspace))

    def confirm() -> None:
        raise LeaseLostError("an heir works here")

    with pytest.raises(LeaseLostError, match="an heir"):
        promote.run(config, "fresco-b", confirm=confirm)
    assert challenger_of(config) == 2 and read_journal(open_workspace(config.workspace)) == journal
    assert TAG_DECISION not in registry_of(config).by_number("fresco", 2).tags


def test_promoting_the_champion_again_changes_nothing_but_a_missing_card(config, make_model) -> None:
    card = make_model("fresco-a", MIDDLE) / "pipeline" / "README.md"
    promote.run(config, "fresco-a")
    journal = read_journal(open_workspace(config.workspace))
    card.unlink()
    for model in ("fresco-a", "models:/fresco@champion"):
        again = promote.run(config, model)
        assert again["reasons"] == ["version 1 is the champion already: nothing changed"]
        assert (again["decision"], again["champion"], again["previous"]) == ("promote", 1, None)
    assert read_journal(open_workspace(config.workspace)) == journal and card.is_file()
    assert len(registry_of(config).versions("fresco")) == 1


@pytest.mark.parametrize("dies_at", ["move_champion", "write_card", "pin_reference", "retire_older"])
def test_promoter_killed_after_the_move_leaves_what_the_next_one_completes(
    config, make_model, monkeypatch, dies_at
) -> None:
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"keep_versions": 0})})
    for run_id, scale in (("fresco-a", WORST), ("fresco-b", MIDDLE), ("fresco-c", BEST)):
        make_model(run_id, scale)
    for run_id in ("fresco-a", "fresco-b"):
        promote.run(config, run_id)
    owner = promote if dies_at == "move_champion" else keep
    effect = getattr(owner, dies_at)

    def act_and_die(*given: Any, **named: Any) -> None:
        effect(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, dies_at, act_and_die)
        promote.run(config, "fresco-c")
    moved = read_journal(open_workspace(config.workspace))
    result = promote.run(config, "fresco-c")
    assert result["reasons"] == ["version 3 is the champion already: nothing changed"]
    version = registry_of(config).by_number("fresco", 3)
    (line,) = (line for line in moved if line["event"] == "promote" and line["version"] == 3)
    assert version.tags[TAG_DECISION] == "promote" and json.loads(version.tags[TAG_SCORECARD])["denoising_loss"] > 0
    workspace = open_workspace(config.workspace)
    assert line["reasons"][0] in (workspace.run_dir("fresco-c") / "pipeline" / "README.md").read_text()
    assert (workspace.root / "monitor" / "reference" / "fresco" / "version-3" / "record.json").is_file()
    assert registry_of(config).by_number("fresco", 1).tags.get(TAG_RETIRED)
    journal = read_journal(workspace)
    assert [line["event"] for line in journal].count("retire") == 1
    assert promote.run(config, "fresco-c") == result and read_journal(workspace) == journal


def test_model_card_stands_beside_the_weights_which_open_in_diffusers_and_keep_their_fingerprint(
    config, make_model
) -> None:
    pipeline = make_model("fresco-a", MIDDLE) / "pipeline"
    before = model_fingerprint(pipeline)
    promote.run(config, "fresco-a")
    card = (pipeline / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers") and "abc1234" in card and "recipe000000" in card
    assert "(samples.png)" in card and (pipeline / "samples.png").is_file()
    assert model_fingerprint(pipeline) == before
    assert resolve_model(config, "models:/fresco@champion").fingerprint == before
    DiffusionPipeline.from_pretrained(pipeline)


@pytest.mark.parametrize("delete", [False, True])
def test_retention_marks_and_deletes_only_when_asked(config, make_model, delete, capsys) -> None:
    gate = config.gate.model_copy(update={"keep_versions": 0, "delete_retired": delete})
    config = config.model_copy(update={"gate": gate})
    for run_id, scale in (("fresco-a", WORST), ("fresco-b", MIDDLE), ("fresco-c", BEST)):
        make_model(run_id, scale)
        assert promote.run(config, run_id)["decision"] == "promote"
    workspace = open_workspace(config.workspace)
    marked = [bool(version.tags.get(TAG_RETIRED)) for version in registry_of(config).versions("fresco")]
    assert marked == [True, False, False]
    assert (workspace.run_dir("fresco-a") / "pipeline").is_dir() is not delete
    assert (workspace.run_dir("fresco-a") / "record.json").is_file()
    assert load_parts(workspace.run_dir("fresco-b") / "pipeline")
    line = read_journal(workspace)[-1]
    assert (line["event"], line["versions"], bool(line["deleted"])) == ("retire", [1], delete)
    assert "retired versions [1]" in capsys.readouterr().err


def test_rollback_and_history_tell_who_served_when_and_why(config, make_model) -> None:
    for run_id, scale in (("fresco-a", WORST), ("fresco-b", BEST)):
        make_model(run_id, scale)
        promote.run(config, run_id)
    assert rollback.run(config, "users complain") == {"champion": 1, "previous": 2}
    entries = history.run(config)["entries"]
    assert [(entry["event"], entry["champion"]) for entry in entries] == [
        ("promote", 1),
        ("promote", 2),
        ("rollback", 1),
    ]
    assert entries[2]["reasons"] == ["users complain"] and entries[2]["run_id"] == "fresco-a"
    assert entries[1]["until"] == entries[2]["since"] and entries[2]["until"] is None
    assert entries[1]["checks"] and entries[1]["scorecard"]["denoising_loss"] > 0
    champion = status.run(config)["champion"]
    assert champion["version"] == 1 and champion["evidence"]["checks"]


def test_model_from_outside_the_workspace_survives_the_loss_of_its_folder(
    config, tiny_pipelines: dict[int, Path], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(tiny_pipelines[0], outside)
    promote.run(config, str(outside))
    shutil.rmtree(outside)
    champion = resolve_model(config, "models:/fresco@champion")
    assert champion.version == 1 and champion.run_id is None
    assert champion.directory.is_relative_to(open_workspace(config.workspace).root)


def test_folder_that_is_no_pipeline_changes_nothing(config, tmp_path: Path, rehearsed: list[str]) -> None:
    with pytest.raises(InputError, match="found a folder without it"):
        promote.run(config, str(tmp_path))
    assert rehearsed == [] and registry_of(config).by_alias("fresco", CHAMPION) is None


def test_candidate_has_no_alias_while_the_gate_decides_and_another_challenger_stays(
    config, make_model, monkeypatch
) -> None:
    for run_id, scale in (("fresco-a", MIDDLE), ("fresco-b", WORST), ("fresco-c", BEST)):
        make_model(run_id, scale)
    promote.run(config, "fresco-a")
    assert challenge.run(config, "fresco-b") == {"challenger": 2, "champion": 1}
    seen: list[tuple[Any, Any, Any]] = []

    def look(*_: Any) -> Served:
        found = status.run(config)
        seen.append((found["champion"]["version"], found["challenger"]["version"], found["judging"]))
        return Served(ready_s=1.0, answer_s=0.1, pictures=3)

    monkeypatch.setattr(promote, "rehearse", look)
    assert promote.run(config, "fresco-c")["champion"] == 3
    assert seen == [(1, 2, [3])]
    assert challenger_of(config) == 2 and status.run(config)["judging"] == []


@pytest.mark.slow
def test_promote_killed_while_it_judges_leaves_no_alias_and_nothing_judged(config, make_model) -> None:
    for run_id, scale in (("fresco-a", MIDDLE), ("fresco-b", BEST)):
        make_model(run_id, scale)
    promote.run(config, "fresco-a")
    process = multiprocessing.get_context("spawn").Process(target=promote_and_die, args=(config, "fresco-b"))
    process.start()
    process.join(KILL_LIMIT_S)
    assert process.exitcode == -signal.SIGKILL
    found = status.run(config)
    assert (found["champion"]["version"], found["challenger"], found["judging"]) == (1, None, [])
    assert len(registry_of(config).versions("fresco")) == 2, "it was registered, and was being judged"
    assert promote.run(config, "fresco-b")["champion"] == 2


def test_challenger_that_is_rejected_or_promoted_is_one_no_more(config, make_model, capsys) -> None:
    for run_id, scale in (("fresco-a", MIDDLE), ("fresco-b", WORST), ("fresco-c", BEST)):
        make_model(run_id, scale)
    promote.run(config, "fresco-a")
    for run_id, decision in (("fresco-b", "reject"), ("fresco-c", "promote")):
        challenge.run(config, run_id)
        assert promote.run(config, run_id)["decision"] == decision and challenger_of(config) is None
    told = capsys.readouterr().err
    assert "version 2 is the challenger no more" in told and "rollback --challenger" in told


def test_challenger_is_named_and_unnamed_by_hand(config, make_model, capsys) -> None:
    for run_id, scale in (("fresco-a", MIDDLE), ("fresco-b", BEST)):
        make_model(run_id, scale)
    promote.run(config, "fresco-a")
    with pytest.raises(RegistryError, match="found 1, which serves already"):
        challenge.run(config, "models:/fresco@champion")
    with pytest.raises(InputError, match="expected without --force"):
        challenge.run(config, "fresco-b", force=True)
    challenge.run(config, "fresco-b")
    assert challenger_of(config) == 2 and "it draws nothing" in capsys.readouterr().err
    for told in ("version 2 is the challenger no more", "no challenger of fresco"):
        assert challenge.stop(config, "seen enough") == {"challenger": None, "champion": 1}
        assert told in capsys.readouterr().err
    journal = read_journal(open_workspace(config.workspace))
    assert [line["reasons"] for line in journal if line["event"] == "challenger"] == [
        ["tried on request"],
        ["seen enough"],
    ]
    set_challenger(registry_of(config), "fresco", 2)
    assert rollback.plan(config) and challenge.plan(config)


def tryout_of(decision: str, numbers: dict[str, Any], asked: list[int]) -> Callable[[int], dict[str, Any]]:
    def tryout(number: int) -> dict[str, Any]:
        asked.append(number)
        return {"decision": decision, "reasons": ["12 of 40 requests failed"], "numbers": numbers}

    return tryout


@pytest.mark.parametrize(
    ("told", "numbers", "decision", "outcome"),
    [
        ("keep", {"after": {}}, "promote", "pass"),
        ("roll_back", {"after": {}}, "reject", "fail"),
        ("not_enough_requests", {"after": {}}, "promote", "skipped"),
        ("keep", {}, "promote", "skipped"),
    ],
)
def test_candidate_that_fails_on_traffic_is_rejected(config, make_model, told, numbers, decision, outcome) -> None:
    asked: list[int] = []
    for run_id, scale in (("fresco-a", WORST), ("fresco-b", BEST)):
        make_model(run_id, scale)
        result = promote.run(config, run_id, tryout=tryout_of(told, numbers, asked))
    assert asked == [2], "the first champion has nothing to be compared with"
    assert result["decision"] == decision and outcomes(result)["canary"] == outcome
    assert result["champion"] == (2 if decision == "promote" else 1)
    assert (result["reasons"][0] == "on traffic: 12 of 40 requests failed") == (decision == "reject")
    assert "A share of the traffic" in Path(result["report"]).read_text()


def test_what_the_gate_refuses_is_not_tried_on_traffic(config, make_model) -> None:
    asked: list[int] = []
    for run_id, scale in (("fresco-a", MIDDLE), ("fresco-b", WORST)):
        make_model(run_id, scale)
        result = promote.run(config, run_id, tryout=tryout_of("keep", {}, asked))
    assert result["decision"] == "reject" and asked == [] and "canary" not in outcomes(result)


def test_promotion_pins_the_monitors_reference_and_stands_where_that_fails(config, make_model, capsys) -> None:
    make_model("fresco-a", WORST)
    promote.run(config, "fresco-a")
    pinned = open_workspace(config.workspace).root / "monitor" / "reference" / "fresco"
    assert (pinned / "version-1" / "record.json").is_file()
    make_model("fresco-b", BEST)
    astray = config.model_copy(update={"monitor": config.monitor.model_copy(update={"encoder": "nowhere"})})
    assert promote.run(astray, "fresco-b")["champion"] == 2
    assert "the reference of version 2 is not pinned yet" in capsys.readouterr().err
    assert not (pinned / "version-2").exists()
