"""The painter: rows in, PNG files out, at the size the model was made for."""

import io
import pickle
from pathlib import Path

import pytest
from PIL import Image

from flows.config import Config
from flows.models import resolve_model
from flows.paint import make_painter, painter_arguments


def test_size_is_that_of_the_training_pictures_else_that_of_the_denoiser(
    config: Config, make_run, tiny_pipelines: dict[int, Path]
) -> None:
    make_run("fresco-aaa", 0)
    larger = config.model_copy(update={"data": config.data.model_copy(update={"resolution_px": 128})})
    trained = make_painter(**painter_arguments(larger, resolve_model(config, "fresco-aaa"), "cpu")).info()
    assert (trained["width_px"], trained["height_px"]) == (16, 16)
    assert trained["dataset"] == "emblems@0123456789ab" and trained["run_id"] == "fresco-aaa"
    foreign = painter_arguments(larger, resolve_model(config, str(tiny_pipelines[0])), "cpu")
    assert foreign["resolution_px"] == 0
    painter = make_painter(**foreign)
    assert painter.info()["width_px"] == painter.parts.denoiser.config.sample_size * 4  # the tiny autoencoder's factor
    assert painter.info()["run_id"] is None


def test_arguments_are_plain_values_that_travel(config: Config, make_run) -> None:
    make_run("fresco-aaa", 0)
    arguments = painter_arguments(config, resolve_model(config, "fresco-aaa"), "cpu")
    assert pickle.loads(pickle.dumps(arguments)) == arguments


@pytest.mark.parametrize("n", [1, 3])
def test_each_row_becomes_a_png_of_its_own_size_and_words(config: Config, make_run, n: int) -> None:
    make_run("fresco-aaa", 0)
    painter = make_painter(**painter_arguments(config, resolve_model(config, "fresco-aaa"), "cpu"))
    row = {**painter.info()["warm_up"], "steps": 2}
    rows = [{**row, "prompt": f"Bild № {index}", "seed": index, "width_px": 16 + 8 * index} for index in range(n)]
    pictures = [Image.open(io.BytesIO(png)) for png in painter.draw(rows)]
    assert [picture.size for picture in pictures] == [(row["width_px"], 16) for row in rows]
    assert [picture.text["prompt"] for picture in pictures] == [row["prompt"] for row in rows]
    assert {picture.text["run_id"] for picture in pictures} == {"fresco-aaa"}
