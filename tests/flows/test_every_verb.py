"""Both families with tiny random weights through prepare, train, evaluate, promote, serve, generate and status."""

from pathlib import Path

import pytest
from PIL import Image

from flows import evaluate, generate, prepare, promote, serve, status, train
from flows.config import Config, load_config


def config_of(base: Path, workspace: Path) -> Config:
    return load_config(
        overrides=[
            f"model.base={base}",
            "name=story",
            "data.source=emblems://base?count=60&seed=3",
            "data.resolution_px=16",
            "data.test_fraction=0.2",
            "train.steps=4",
            "train.global_batch=4",
            "train.freezing=denoiser",
            "train.gradient_checkpointing=true",
            "train.eval_every_steps=4",
            "evaluate.prompts=4",
            "evaluate.sampling_steps=2",
            "evaluate.bootstrap=100",
            "placement.workers=1",
            "placement.engine=torch",
            "serve.default_steps=2",
        ],
        workspace=str(workspace),
    )


@pytest.mark.slow  # training, evaluation, promotion, an endpoint
@pytest.mark.parametrize("family", ["tiny_base", "tiny_z_image"])
def test_family_goes_through_every_verb(
    family: str, request: pytest.FixtureRequest, ray_session: None, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(family)
    config = config_of(base, tmp_path / "workspace")
    prepared = prepare.run(config)
    assert prepared["images"] == prepared["train"] + prepared["validation"] + prepared["test"] == 60
    trained = train.run(config)
    assert trained["steps"] == 4
    measured = evaluate.run(config, trained["run_id"])
    assert measured["dataset"] == prepared["dataset"]
    assert {"denoising_loss", "clip_score", "kid", "prompt_adherence"} <= set(measured["scorecard"])
    promoted = promote.run(config, trained["run_id"])
    assert (promoted["decision"], promoted["champion"], promoted["previous"]) == ("promote", 1, None)
    assert status.run(config)["champion"]["run_id"] == trained["run_id"]
    wish = generate.Wish(seed=5, steps=2)
    local = generate.run(config, ["a red circle"], str(tmp_path / "local"), wish, model="models:/story@champion")
    if family == "tiny_base":
        return  # its endpoint is tested in test_serve.py; starting one takes half a minute
    served = serve.run(config, detach=True)
    try:
        remote = generate.run(config, ["a red circle"], str(tmp_path / "remote"), wish)
        assert remote["model_version"] == served["model_version"] == 1
        with Image.open(local["files"][0]) as here, Image.open(remote["files"][0]) as there:
            assert there.size == (16, 16)
            assert here.tobytes() == there.tobytes(), "the endpoint draws what the sampler draws"
    finally:
        serve.run(config, stop=True)
