"""A model and its info: the size it draws and the solvers it draws with."""

from pathlib import Path

from flows.config import Config
from flows.loaded_model import load_model, model_arguments
from flows.models import resolve_model


def test_size_is_that_of_the_training_pictures_else_that_of_the_denoiser(
    config: Config, make_run, tiny_pipelines: dict[int, Path]
) -> None:
    make_run("fresco-aaa", 0)
    larger = config.model_copy(update={"data": config.data.model_copy(update={"resolution_px": 128})})
    trained = load_model(**model_arguments(larger, resolve_model(config, "fresco-aaa"), "cpu")).info
    assert (trained["width_px"], trained["height_px"]) == (16, 16)
    assert trained["dataset"] == "emblems@0123456789ab" and trained["run_id"] == "fresco-aaa"
    foreign = model_arguments(larger, resolve_model(config, str(tiny_pipelines[0])), "cpu")
    assert foreign["resolution_px"] == 0
    loaded = load_model(**foreign)
    assert loaded.info["width_px"] == loaded.parts.denoiser.config.sample_size * 4  # the tiny autoencoder's factor
    assert loaded.info["run_id"] is None


def test_solvers_are_those_of_the_models_prediction(config: Config, tiny_z_image: Path, tiny_base: Path) -> None:
    def solvers(directory: Path) -> list[str]:
        found: list[str] = load_model(**model_arguments(config, resolve_model(config, str(directory)), "cpu")).info[
            "schedulers"
        ]
        return found

    assert solvers(tiny_z_image) == ["euler", "dpm++2m"] and solvers(tiny_base)[0] == "ddim"
