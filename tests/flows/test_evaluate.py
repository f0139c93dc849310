"""`evaluate` with tiny real models and drawn pictures: what it measures, keeps, compares and writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.artifacts import open_workspace, read_json, write_record
from components.emblems import example
from components.encode import read_pictures
from components.errors import InputError, NonFiniteError
from components.metrics import mean_with_bootstrap
from components.models import encode_images, encode_text, family_named, load_parts, make_tiny, save_parts
from components.noise import validation_draws
from components.objective import NUM_BANDS, make_objective, noised, timesteps_of
from components.recipe import DataSection, EvaluateSection, ModelSection
from components.standing import RetrainSection
from flows import drawing, evaluate, measure, prepare
from flows.config import Config


@pytest.fixture
def config(config: Config, tiny_pipelines: dict[int, Path], clip_directory: Path, examined_here: None) -> Config:
    """The flow tests' config with 80 drawn pictures, examined in this process instead of on Ray actors."""
    sections = {
        "data": DataSection(source="emblems://base?count=80&seed=3", resolution_px=16, test_fraction=0.25),
        "model": ModelSection(base=str(tiny_pipelines[0]), clip=str(clip_directory)),
        "evaluate": EvaluateSection(prompts=8, sampling_steps=2, bootstrap=200, diversity_prompts=3),
    }
    return config.model_copy(update=sections)


def test_scorecard_of_a_run_has_every_metric_with_interval_and_count(config, make_run):
    make_run("emblems-1", 1)
    result = evaluate.run(config, "emblems-1")
    num_test = len(prepare.ensure_dataset(config).split("test"))
    assert result["model"] == "emblems-1" and result["dataset"].startswith("fresco@")
    bands = [f"denoising_loss_band_{band}" for band in range(NUM_BANDS)]
    of_pictures = {"clip_score", "kid", "cmmd", "fid", "coverage", "density", "prompt_diversity", "prompt_adherence"}
    assert set(result["scorecard"]) == {"denoising_loss", *bands, *of_pictures}
    # the run of the fixture names another dataset version than the one that is measured
    assert "trained on emblems@0123456789ab" in result["not_measured"]["copying"]
    assert "no classes given" in result["not_measured"]["inception_score"]
    assert "biased" in result["scorecard"]["fid"]["warning"]
    assert len(result["scorecard"]["kid"]["encoder"]) == 12
    for estimate in result["scorecard"].values():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    counts = {name: estimate["n"] for name, estimate in result["scorecard"].items()}
    assert counts["denoising_loss"] == num_test > 8 and counts["clip_score"] == counts["kid"] == 8
    assert counts["prompt_diversity"] == 3
    assert result["scorecard"]["prompt_diversity"]["low"] > 1e-5  # another seed is another picture
    assert result["scorecard"]["prompt_adherence"]["value"] == 0  # random weights draw no emblem
    band_mean = np.mean([result["scorecard"][band]["value"] for band in bands])
    assert result["scorecard"]["denoising_loss"]["value"] == pytest.approx(band_mean)


def test_denoising_loss_agrees_with_one_picture_at_a_time(config, make_run):
    run = make_run("emblems-1", 1)
    value = evaluate.run(config, "emblems-1")["scorecard"]["denoising_loss"]["value"]
    parts = load_parts(run / "pipeline")
    goal = make_objective(parts.prediction, parts.scheduler)
    data = measure.held_out(config, open_workspace(config.workspace), prepare.ensure_dataset(config))
    losses = []
    for item in data.pictures:
        [picture] = read_pictures(data.pixels, [item.sha256])
        pixels_BCHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents_BCHW, _ = encode_images(parts.vae, pixels_BCHW)
        noise_BCHW, level_B = validation_draws(item.sha256, NUM_BANDS, tuple(latents_BCHW.shape[1:]))
        timestep_B = timesteps_of(goal, level_B)
        noisy_BCHW, target_BCHW = noised(goal, latents_BCHW.repeat(NUM_BANDS, 1, 1, 1), noise_BCHW, timestep_B)
        text = encode_text(parts, [item.caption] * NUM_BANDS)
        with torch.no_grad():
            prediction = family_named(parts.family).call_denoiser(parts.denoiser, noisy_BCHW, timestep_B, text)
        losses.append((prediction - target_BCHW).square().mean().item())
    # batches of 16 and of 1 differ in the order of float32 sums
    assert value == pytest.approx(np.mean(losses), rel=1e-4)
    assert value == pytest.approx(mean_with_bootstrap(losses, 0).value, rel=1e-4)


def test_the_model_is_compared_with_its_base_picture_by_picture(config, make_run):
    make_run("emblems-1", 1)
    record = json_beside(evaluate.run(config, "emblems-1"))
    # the fixture's two models have different autoencoders: their losses live in different latent spaces
    assert not [name for name in record["change"] if name.startswith("denoising_loss")]
    assert {"clip_score", "kid", "cmmd", "coverage", "prompt_diversity", "prompt_adherence"} <= record["change"].keys()
    difference = record["scorecard"]["clip_score"]["value"] - record["base_scorecard"]["clip_score"]["value"]
    change = record["change"]["clip_score"]
    assert change["value"] == pytest.approx(difference)
    assert change["low"] <= change["value"] <= change["high"] and 0 < change["p_value"] <= 1


def test_losses_are_compared_where_the_autoencoder_is_the_same(config, make_run, tiny_pipelines):
    run = make_run("emblems-1", 0)
    slightly_changed(run / "pipeline", run / "pipeline")
    record = json_beside(evaluate.run(config, "emblems-1"))
    difference = record["scorecard"]["denoising_loss"]["value"] - record["base_scorecard"]["denoising_loss"]["value"]
    assert record["change"]["denoising_loss"]["value"] == pytest.approx(difference)


def test_the_base_itself_is_measured_without_a_comparison(config, tiny_pipelines):
    result = evaluate.run(config, str(tiny_pipelines[0]))
    record = json_beside(result)
    assert record["base_scorecard"] is None and record["change"] == {}
    assert "fine-tuned" not in Path(result["report"]).read_text()


def test_a_repeated_call_measures_nothing_and_says_so(config, make_run, monkeypatch, capsys):
    make_run("emblems-1", 1)
    first = evaluate.run(config, "emblems-1")
    written = Path(first["report"]).stat().st_mtime_ns
    monkeypatch.setattr(evaluate, "measure", forbidden)
    capsys.readouterr()
    assert evaluate.run(config, "emblems-1") == first
    assert "nothing to do" in capsys.readouterr().err
    assert Path(first["report"]).stat().st_mtime_ns == written


def test_only_what_other_settings_change_is_done_again(config, make_run, monkeypatch):
    make_run("emblems-1", 1)
    evaluate.run(config, "emblems-1")
    loaded: list[str] = []
    for module in (measure, drawing):
        name = module.__name__
        monkeypatch.setattr(
            module, "load_parts", lambda path, name=name, **options: loaded.append(name) or load_parts(path, **options)
        )
    evaluate.run(with_settings(config, bootstrap=300), "emblems-1")
    assert loaded == []  # only the intervals are new
    evaluate.run(with_settings(config, seed=5), "emblems-1")
    assert loaded == ["flows.drawing"] * 4  # model and base draw prompts and seeds, their losses are kept
    loaded.clear()
    evaluate.run(with_settings(config, seeds_per_prompt=3), "emblems-1")
    assert loaded == ["flows.drawing"] * 2  # only the further seeds


def test_what_was_drawn_is_found_again_under_another_dataset_name(config, make_run, monkeypatch):
    make_run("emblems-1", 1)
    first = evaluate.run(config, "emblems-1")
    for module in (measure, drawing):
        monkeypatch.setattr(module, "load_parts", forbidden)
    renamed = evaluate.run(config.model_copy(update={"name": "other"}), "emblems-1")
    assert renamed["dataset"] != first["dataset"] and renamed["scorecard"] == first["scorecard"]


def test_the_same_weights_give_the_same_numbers_in_another_workspace(config, make_run, tiny_pipelines, tmp_path):
    here = evaluate.run(config, str(tiny_pipelines[1]))
    elsewhere = config.model_copy(update={"workspace": str(tmp_path / "elsewhere")})
    assert evaluate.run(elsewhere, str(tiny_pipelines[1]))["scorecard"] == here["scorecard"]


def test_a_half_written_measurement_is_not_taken_for_whole(config, make_run):
    make_run("emblems-1", 1)
    first = evaluate.run(config, "emblems-1")
    reports = open_workspace(config.workspace).reports
    for record in reports.glob("measured/*/record.json"):
        record.unlink()
        (record.parent / "00000.png").write_bytes(b"half")
    Path(first["report"]).unlink()
    assert evaluate.run(config, "emblems-1")["scorecard"] == first["scorecard"]


def test_the_report_shows_grid_curves_and_lineage_and_fetches_nothing(config, make_run):
    run = make_run("emblems-1", 1)
    lines = [{"step": step, "train/loss": 1 / (1 + step)} for step in range(5)] + [
        {"step": 0, "eval/loss": 0.9},
        {"step": 4, "eval/loss": 0.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    secret = {"webhook": "https://chat.example/hooks/not-to-be-told", "command": "/opt/tell --token not-to-be-told"}
    told = RetrainSection(**secret, webhook_secret_file="hook.key")
    result = evaluate.run(config.model_copy(update={"retrain": told}), "emblems-1")
    html = Path(result["report"]).read_text()
    for text in (html, Path(result["report"]).with_suffix(".json").read_text()):
        assert "not-to-be-told" not in text and "https://chat.example" in text
    html = html.replace("https://chat.example", "")
    assert html.count("data:image/png;base64,") == 3 * 8  # base, fine-tuned, real
    for text in ("Loss by step", "emblems-1", result["dataset"], "differ most", "Configuration of the run"):
        assert text in html
    for fetched in ("http://", "https://", "<link", "<script", "@import"):
        assert fetched not in html.replace("http://www.w3.org/", "")
    assert Path(result["report"]).name == f"evaluate-emblems-1-{result['dataset']}.html"
    with Image.open(result["grid"]) as grid:
        assert grid.width > 3 * 16


def test_captions_nobody_can_check_leave_adherence_out_with_the_reason(config, make_run, tmp_path):
    source = tmp_path / "pictures"
    source.mkdir()
    for index in range(40):
        example("base", 9, index)[0].save(source / f"{index}.png")
        (source / f"{index}.txt").write_text(f"portrait number {index}")
    make_run("emblems-1", 1)
    data = config.data.model_copy(update={"source": str(source)})
    record = json_beside(evaluate.run(config.model_copy(update={"data": data}), "emblems-1"))
    assert "prompt_adherence" not in record["scorecard"]
    assert "built-in" in record["not_measured"]["prompt_adherence"]


def test_no_test_pictures_is_an_input_error_that_names_the_setting(config, make_run):
    make_run("emblems-1", 1)
    data = config.data.model_copy(update={"test_fraction": 1e-6})
    with pytest.raises(InputError, match=r"data\.test_fraction"):
        evaluate.run(config.model_copy(update={"data": data}), "emblems-1")


def test_broken_weights_are_an_error_and_leave_no_record(config, tmp_path):
    parts = make_tiny("stable_diffusion", seed=2)
    next(iter(parts.denoiser.parameters())).fill_(float("nan"))
    save_parts(parts, tmp_path / "broken")
    with pytest.raises(NonFiniteError, match="broken"):
        evaluate.run(config, str(tmp_path / "broken"))
    assert not list(open_workspace(config.workspace).reports.glob("*.json"))


def test_a_base_that_changed_since_is_not_compared_with(config, make_run, capsys):
    run = make_run("emblems-1", 1)
    record = read_json(run / "record.json")
    record["inputs"]["base"] = "000000000000"
    write_record(run, record)
    assert json_beside(evaluate.run(config, "emblems-1"))["base_scorecard"] is None
    assert "training started from 000000000000" in capsys.readouterr().err


def test_two_models_are_compared_on_one_version(config, make_run, tiny_pipelines, capsys):
    run = make_run("emblems-1", 1)
    with_base = evaluate.run(config, "emblems-1")
    close = slightly_changed(run / "pipeline", run.parent.parent / "close")
    result = evaluate.run(config, str(close), against="emblems-1")
    assert result["against"] == "emblems-1" and result["report"] != with_base["report"]
    assert Path(result["report"]).name.startswith("evaluate-close-") and "-against-emblems-1-" in result["report"]
    change = result["change"]["denoising_loss"]
    theirs = with_base["scorecard"]["denoising_loss"]["value"]
    assert change["value"] == pytest.approx(result["scorecard"]["denoising_loss"]["value"] - theirs)
    assert change["low"] <= change["value"] <= change["high"]
    record = json_beside(result)
    assert record["base_scorecard"]["clip_score"] == with_base["scorecard"]["clip_score"]
    html = Path(result["report"]).read_text()
    assert "the other model" in html and "Other model" in html and "fine-tuned" not in html
    assert "; other " in capsys.readouterr().err
    assert evaluate.run(config, str(close), against="emblems-1") == result
    assert evaluate.run(config, "emblems-1") == with_base  # its own report is untouched


def test_a_model_is_not_compared_with_itself(config, make_run, tiny_pipelines):
    make_run("emblems-1", 1)
    with pytest.raises(InputError, match="--against expected another model"):
        evaluate.run(config, "emblems-1", against=str(tiny_pipelines[1]))
    with pytest.raises(InputError, match="nobody"):
        evaluate.run(config, "emblems-1", against="nobody")


def test_classes_give_an_inception_score_by_the_named_encoder(config, tiny_pipelines):
    asked = with_settings(config, classes=("a red circle", "a blue square", "a green ring"))
    score = evaluate.run(asked, str(tiny_pipelines[0]))["scorecard"]["inception_score"]
    assert 1 <= score["low"] <= score["value"] <= 3 and score["n"] == 8
    assert "5,000" in score["warning"] and score["encoder"]


def test_one_seed_a_prompt_leaves_diversity_out_with_its_reason(config, tiny_pipelines):
    result = evaluate.run(with_settings(config, seeds_per_prompt=1), str(tiny_pipelines[0]))
    assert "evaluate.seeds_per_prompt" in result["not_measured"]["prompt_diversity"]


def with_settings(config: Config, **settings: Any) -> Config:
    section = EvaluateSection(**{**config.evaluate.model_dump(), **settings})
    return config.model_copy(update={"evaluate": section})


def slightly_changed(pipeline: Path, target: Path) -> Path:
    parts = load_parts(pipeline)
    torch.manual_seed(0)
    for parameter in parts.denoiser.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    save_parts(parts, target, dtype=torch.float32)
    return target


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing should be measured")


def json_beside(result: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(result["report"]).with_suffix(".json").read_text())
    return record
