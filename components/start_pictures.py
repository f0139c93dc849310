"""An edit begins with a picture: what the denoiser sees of it, which cells are drawn anew, what is kept to the pixel.

Sizes are those of the rows that start from it; a picture of another size is scaled. Shape letters: B rows, C channels,
H, W height and width (of pixels or latents, as the other side of the equation says).
"""

import numpy as np
import torch
from PIL import Image

from components.draw_requests import StartPicture
from components.images import to_pixels
from components.models import Parts, encode_images, latent_factor


def make_start(
    parts: Parts, picture: Image.Image, mask: Image.Image | None, size: tuple[int, int], strength: float
) -> StartPicture:
    """Encode a picture (RGB) and its mask (L, 255 where it is drawn anew) for rows of `size` (width_px, height_px)."""
    vae = parts.vae
    pixels_BCHW = torch.from_numpy(to_pixels([_scaled(picture, size)]))
    latents_1CHW, _ = encode_images(vae, pixels_BCHW.to(vae.device, vae.dtype))
    return StartPicture(
        latents_1CHW.float().cpu(),
        strength,
        None if mask is None else latent_mask(_scaled(mask, size), latent_factor(parts)),
    )


def latent_mask(mask: Image.Image, factor: int) -> torch.Tensor:
    """Return mask_11HW: 1 for a latent cell of which any pixel is drawn anew, else the seam would keep what must go."""
    drawn_11HW = torch.from_numpy(np.asarray(mask, np.float32) / 255)[None, None]
    return (torch.nn.functional.max_pool2d(drawn_11HW, factor) > 0.5).float()


def paste_kept(drawn: Image.Image, picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the drawn picture with the original's own pixels where the mask keeps them."""
    return Image.composite(drawn, _scaled(picture, drawn.size), _scaled(mask, drawn.size))


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
