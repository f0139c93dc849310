"""What an edit starts from: scaled to the rows, encoded, masked by cells, and kept to the pixel outside the mask."""

import numpy as np
import pytest
import torch
from PIL import Image

from components.images import to_pixels
from components.models import encode_images, make_tiny
from components.start_pictures import latent_mask, make_start, paste_kept


@pytest.mark.parametrize("family", ["stable_diffusion", "z_image"])
def test_start_is_the_encoded_picture_at_the_rows_size(family: str) -> None:
    parts = make_tiny(family)
    picture = Image.linear_gradient("L").resize((32, 16)).convert("RGB")
    start = make_start(parts, picture, None, (32, 16), 0.5)
    expected, _ = encode_images(parts.vae, torch.from_numpy(to_pixels([picture])))
    assert torch.equal(start.latents_1CHW, expected) and start.strength == 0.5 and start.mask_11HW is None
    scaled = make_start(parts, picture, Image.new("L", picture.size, 255), (16, 16), 0.5)
    assert scaled.mask_11HW is not None and scaled.mask_11HW.min() == 1
    assert scaled.mask_11HW.shape[2:] == scaled.latents_1CHW.shape[2:]


def test_cell_is_drawn_anew_when_any_of_its_pixels_is() -> None:
    mask = Image.new("L", (16, 8), 0)
    mask.putpixel((5, 2), 255)
    assert latent_mask(mask, 4).tolist() == [[[[0, 1, 0, 0], [0, 0, 0, 0]]]]


def test_kept_pixels_are_the_originals() -> None:
    drawn, picture = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    pasted = np.asarray(paste_kept(drawn, picture, mask))
    assert (pasted[:, :4] == (255, 0, 0)).all() and (pasted[:, 4:] == (0, 0, 255)).all()
