"""From what models did to what is claimed of them: features, reference, scorecards and the paired differences.

The copy check speaks of a model only beside the training pictures of its own dataset version; a model that knows no
version (the embedded base, a folder from elsewhere) is measured there as well, and shows what not copying looks like.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from cluster.artifacts import Workspace
from components.clip_encoder import ClipEncoder
from components.copies import Nearest, nearest_rows, pixel_distances
from components.dataset import TRAIN
from components.encode import read_pictures
from components.evaluation import CopyPair, Evaluation, Side
from components.scorecard import Measurement, Reference, make_scorecard, paired_change, slice_key
from components.slices import caption_slices
from flows.config import Config
from flows.measure import HeldOut, Performance, features_of, shown
from flows.models import ResolvedModel

MAX_TRAINING = 10_000
"""Training pictures that copies are looked for among, the first by hash."""
MAX_UNSEEN = 500
"""Test pictures that say how near an unseen picture comes."""
PICTURES_AT_ONCE = 100
NEAREST_SHOWN = 6


def score(
    config: Config,
    workspace: Workspace,
    data: HeldOut,
    encoder: ClipEncoder,
    performances: Sequence[tuple[ResolvedModel, Performance]],
    same_latents: bool,
) -> Evaluation:
    """Average what one or two models did (the one that is asked about first); nothing is drawn here."""
    plan = config.evaluate
    real = read_pictures(data.pixels, [item.sha256 for item in data.prompts])
    reference = Reference(
        text_features_PD=encoder.texts(data.captions),
        real_features_PD=encoder.images(real),
        seed=plan.seed,
        resamples=plan.bootstrap,
        encoder=encoder.identity,
        slices=caption_slices([item.caption for item in data.pictures]),
        class_features_CD=encoder.texts(list(plan.classes)) if plan.classes else None,
        logit_scale=encoder.logit_scale,
    )
    copies = _CopyCheck(workspace, data, encoder)
    measured, sides = [], []
    for model, performance in performances:
        own = replace(reference, **copies.reference(model))
        shows_P = shown(data.captions, performance.drawn)
        features_PD = encoder.images(performance.drawn)
        nearest = copies.nearest(performance.drawn, features_PD) if own.unseen is not None else None
        by_seed = [encoder.images(pictures) for pictures in performance.by_seed]
        features_QSD = np.stack(by_seed) if by_seed else None
        measured.append((Measurement(performance.losses_NK, features_PD, shows_P, features_QSD, nearest), own))
        pairs = copies.pairs(nearest) if nearest is not None and model.dataset else []
        sides.append(Side(make_scorecard(*measured[-1]), performance.drawn, shows_P, pairs))
    change, apart_P = {}, None
    if len(measured) > 1:
        (model_measured, own), (other_measured, _) = measured
        change = paired_change(model_measured, other_measured, own, same_latents)
        apart_P = 1 - (model_measured.features_PD * other_measured.features_PD).sum(axis=1)
    seeds = [plan.seed + index for index in range(len(data.prompts))]
    names = [name for name in reference.slices if slice_key(name) in sides[0].card.estimates]
    other = sides[1] if len(sides) > 1 else None
    return Evaluation(sides[0], other, change, data.captions, seeds, real, apart_P, slices=names)


class _CopyCheck:
    """The training pictures of one dataset version, encoded when they are first needed."""

    def __init__(self, workspace: Workspace, data: HeldOut, encoder: ClipEncoder) -> None:
        self.workspace, self.data, self.encoder = workspace, data, encoder
        self.keys = [item.sha256 for item in data.dataset.split(TRAIN)[:MAX_TRAINING]]
        self.unseen: Nearest | None = None

    def reference(self, model: ResolvedModel) -> dict[str, Any]:
        """What the reference says of copying for this model: the unseen pictures, or why there is no check."""
        if model.dataset not in (None, self.data.dataset.id):
            return {"no_copy_check": f"the model was trained on {model.dataset}, and measured on another version"}
        if not self.keys:
            return {"no_copy_check": "the dataset version has no training pictures"}
        if self.unseen is None:
            unseen = [item.sha256 for item in self.data.pictures[:MAX_UNSEEN]]
            features_ND = features_of(self.workspace, self.encoder, self.data.pixels, unseen)
            index_N, distance_N = nearest_rows(features_ND, self._training())
            parts = []
            for start in range(0, len(unseen), PICTURES_AT_ONCE):
                rows = slice(start, start + PICTURES_AT_ONCE)
                parts.append(pixel_distances(self._read(unseen[rows]), self._trained(index_N[rows])))
            self.unseen = Nearest(index_N, distance_N, np.concatenate(parts))
        return {"unseen": self.unseen}

    def nearest(self, drawn: list[Image.Image], features_PD: np.ndarray) -> Nearest:
        index_N, distance_N = nearest_rows(features_PD, self._training())
        return Nearest(index_N, distance_N, pixel_distances(drawn, self._trained(index_N)))

    def pairs(self, nearest: Nearest) -> list[CopyPair]:
        """The drawn pictures that come nearest to training ones, with those."""
        order = np.argsort(nearest.distance_N, kind="stable")[:NEAREST_SHOWN]
        pictures = self._trained(nearest.index_N[order])
        return [
            CopyPair(int(row), picture, float(nearest.distance_N[row]), float(nearest.pixels_N[row]))
            for row, picture in zip(order, pictures, strict=True)
        ]

    def _training(self) -> np.ndarray:
        return features_of(self.workspace, self.encoder, self.data.pixels, self.keys)

    def _trained(self, index_N: np.ndarray) -> list[Image.Image]:
        return self._read([self.keys[index] for index in index_N.tolist()])

    def _read(self, keys: list[str]) -> list[Image.Image]:
        return read_pictures(self.data.pixels, keys)


def numbers_of(evaluation: Evaluation) -> dict[str, Any]:
    """What the record keeps."""
    changes = {
        name: {
            "value": change.difference,
            "low": change.low,
            "high": change.high,
            "n": change.n,
            "p_value": change.p_value,
            "needed": change.needed,
        }
        for name, change in evaluation.change.items()
    }
    return {
        "scorecard": evaluation.model.card.as_dict(),
        "not_measured": dict(evaluation.model.card.not_measured),
        "base_scorecard": evaluation.base.card.as_dict() if evaluation.base else None,
        "change": changes,
    }
