"""Three numbers of a picture that say at a glance whether two models draw alike: brightness, contrast, saturation.

Cheap enough for every picture that is served. They are no measure of quality: a model whose means move away from the
champion's draws something else, and the scorecard says whether that is better.
"""

from dataclasses import dataclass

from PIL import Image, ImageStat


@dataclass(frozen=True)
class PictureStatistics:
    """Of one picture, each in [0, 1]."""

    brightness: float
    """Mean of its luma (ITU-R 601)."""
    contrast: float
    """Standard deviation of its luma; 0.5 is half black and half white."""
    saturation: float
    """Mean saturation, as in HSV."""


def picture_statistics(picture: Image.Image) -> PictureStatistics:
    """Return the statistics of a picture of any mode; transparency is left out."""
    coloured = picture.convert("RGB")
    luma = ImageStat.Stat(coloured.convert("L"))
    saturation = ImageStat.Stat(coloured.convert("HSV").getchannel("S"))
    return PictureStatistics(luma.mean[0] / 255, luma.stddev[0] / 255, saturation.mean[0] / 255)
