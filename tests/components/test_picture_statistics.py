"""Picture statistics in closed form: flat colours, and halves of black and white."""

import pytest
from PIL import Image

from components.picture_statistics import PictureStatistics, picture_statistics


@pytest.mark.parametrize(
    ("colour", "brightness", "saturation"),
    [("black", 0, 0), ("white", 1, 0), ("red", 0.299, 1), ((102, 102, 102), 0.4, 0), ((255, 127, 127), 0.649, 0.5)],
)
def test_flat_colour_has_its_luma_and_saturation_and_no_contrast(
    colour: str, brightness: float, saturation: float
) -> None:
    found = picture_statistics(Image.new("RGB", (8, 4), colour))
    # Luma and saturation are rounded to one of 255 levels.
    assert found.brightness == pytest.approx(brightness, abs=1 / 255)
    assert found.saturation == pytest.approx(saturation, abs=1 / 255)
    assert found.contrast == 0


def test_half_black_half_white_has_a_contrast_of_one_half_in_any_mode() -> None:
    picture = Image.new("RGBA", (8, 8), "black")
    picture.paste(Image.new("RGBA", (4, 8), "white"), (0, 0))
    assert picture_statistics(picture) == PictureStatistics(0.5, 0.5, 0.0)
