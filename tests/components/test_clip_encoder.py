"""The CLIP encoder against transformers' own preprocessing and itself in other batches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from components.clip_encoder import ClipEncoder
from components.contrastive import make_tiny_clip, save_clip
from components.emblems import example
from components.errors import InputError
from components.metrics import clip_score
from components.models import embedded_clip
from components.tokenizer import make_clip_tokenizer

CAPTIONS = ["a small red circle", "two large blue squares on a white background"]


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    tokenizer = make_clip_tokenizer(CAPTIONS, 600, 32)
    save_clip(make_tiny_clip(tokenizer, seed=0), tokenizer, directory)
    return directory


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_clip_encoder_gives_unit_rows_in_order_whatever_the_batch(clip_directory):
    pictures = [picture(seed) for seed in range(5)]
    whole, split = ClipEncoder(clip_directory), ClipEncoder(clip_directory, batch_size=2)
    features = whole.images(pictures)
    assert features.shape == (5, 64) and features.dtype == np.float32
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    assert split.images(pictures) == pytest.approx(features, abs=1e-5)
    texts = CAPTIONS * 2 + ["a caption of another length altogether, much longer than the others are"]
    assert split.texts(texts) == pytest.approx(whole.texts(texts), abs=1e-5)
    assert whole.texts([]).shape == (0, 64)


def test_clip_encoder_cuts_a_long_caption_instead_of_failing(clip_directory):
    features = ClipEncoder(clip_directory).texts(["red " * 200, "red " * 400])
    assert features[0] == pytest.approx(features[1], abs=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (48, 90)])
def test_clip_preprocessing_agrees_with_transformers(clip_directory, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil.from_pretrained(clip_directory)(picture(3, size), return_tensors="np")
    ours = ClipEncoder(clip_directory).preprocessing(picture(3, size))
    assert ours == pytest.approx(np.asarray(theirs["pixel_values"])[0], abs=1e-5)


def test_clip_encoder_identity_follows_weights_and_preprocessing(clip_directory, tmp_path):
    import shutil

    copy = tmp_path / "elsewhere"
    shutil.copytree(clip_directory, copy)
    assert ClipEncoder(copy).identity == ClipEncoder(clip_directory).identity
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.4, 0.5, 0.5]}))
    assert ClipEncoder(copy).identity != ClipEncoder(clip_directory).identity


def test_clip_encoder_leaves_the_global_generator_alone(clip_directory):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ClipEncoder(clip_directory).texts(CAPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


def test_clip_encoder_says_what_is_missing(tmp_path, clip_directory):
    with pytest.raises(InputError, match=r"model\.clip"):
        ClipEncoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="'bert'"):
        ClipEncoder(tmp_path)


def test_clip_score_agrees_with_torchmetrics_on_the_same_pictures():
    from torchmetrics.functional.multimodal import clip_score as theirs
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    encoder = ClipEncoder(embedded_clip())

    class Model(torch.nn.Module):
        """transformers 5 returns an object where the library expects its tensor."""

        config = encoder.model.config

        def get_image_features(self, *values: torch.Tensor) -> torch.Tensor:
            return encoder.model.get_image_features(*values).pooler_output

        def get_text_features(self, *values: torch.Tensor) -> torch.Tensor:
            return encoder.model.get_text_features(*values).pooler_output

    prepare = CLIPImageProcessorPil.from_pretrained(encoder.directory)

    def processor(
        text: list[str] | None = None, images: list[torch.Tensor] | None = None, **settings: object
    ) -> object:
        if images is None:
            return encoder.tokenizer(text, **settings)
        return prepare([image.numpy() for image in images], return_tensors="pt")

    pictures, texts = (list(each) for each in zip(*(example("base", 0, index) for index in range(6)), strict=True))
    tensors = [torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in pictures]
    with torch.no_grad():
        expected = theirs(tensors, texts, lambda: (Model(), processor)).item()
    # it clips the mean at 0, ours every picture: equal where all cosines are positive
    features = encoder.images(pictures), encoder.texts(texts)
    assert (features[0] * features[1]).sum(axis=1).min() > 0
    assert clip_score(*features).value == pytest.approx(expected, rel=1e-5)
