"""May this prompt be drawn, and may this picture be handed out? A blocklist first, then a classifier of your own.

A classifier is named as `module:function` or `path/to/file.py:function`; the function is called once with the options
as keyword arguments and returns an object with `judge_prompts(texts)`, `judge_pictures(pictures)` or both, each giving
one category (refused) or None (allowed) for each item. `clip_classifier` below is one: zero-shot by a CLIP directory.
Decisions name a category, never the words that led to it. The defaults refuse nothing.
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.blocklist import Blocklist, read_blocklist
from components.clip_encoder import ClipEncoder
from components.errors import InputError

JUDGES = ("judge_prompts", "judge_pictures")
EMBEDDED_CLIP = Path(__file__).parent / "assets" / "clip-tiny"


class SafetyError(RuntimeError):
    """The classifier could not judge; tells the kind of its error and never its words."""

    exit_code = 1


@dataclass(frozen=True)
class Decision:
    """Whether something passes; a refusal says which stage refused and as what."""

    allowed: bool
    stage: Literal["", "blocklist", "classifier"] = ""
    category: str = ""


ALLOWED = Decision(True)


class Safety:
    """The stages in order; either may be missing."""

    def __init__(self, blocklist: Blocklist | None = None, classifier: Any = None) -> None:
        self.blocklist, self.classifier = blocklist, classifier

    def check_prompt(self, prompt: str) -> Decision:
        category = self.blocklist.category_of(prompt) if self.blocklist else None
        if category is not None:
            return Decision(False, "blocklist", category)
        return self._judged("judge_prompts", [prompt])[0]

    def check_pictures(self, pictures: Sequence[Image.Image]) -> list[Decision]:
        """Judge finished pictures (RGB), one decision for each."""
        return self._judged("judge_pictures", pictures)

    def _judged(self, judge: str, items: Sequence[Any]) -> list[Decision]:
        if not items or not hasattr(self.classifier, judge):
            return [ALLOWED] * len(items)
        try:
            categories = list(getattr(self.classifier, judge)(list(items)))
        except Exception as error:  # foreign code: its message may hold the prompt, so may what it was raised from
            message = (
                f"the classifier's {judge} expected to answer, found {type(error).__name__}; nothing was let through"
            )
            raise SafetyError(message) from None
        if len(categories) != len(items):
            raise RuntimeError(f"the classifier's {judge} expected {len(items)} answers, found {len(categories)}")
        return [ALLOWED if found is None else Decision(False, "classifier", str(found)) for found in categories]


def open_safety(blocklist_file: str = "", classifier: str = "", options: Mapping[str, Any] | None = None) -> Safety:
    """Read the list and load the classifier, once; empty names leave a stage out. InputError says what is wrong."""
    blocklist = read_blocklist(Path(blocklist_file).expanduser()) if blocklist_file else None
    return Safety(blocklist, load_classifier(classifier, options or {}) if classifier else None)


def load_classifier(name: str, options: Mapping[str, Any]) -> Any:
    """Import `module:function` or `file.py:function` and call it with the options."""
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function.isidentifier():
        raise InputError(f"serve.safety_classifier expected module:function or file.py:function, found {name!r}")
    module = _module_of_file(Path(place).expanduser()) if place.endswith(".py") else _module(place)
    factory = getattr(module, function, None)
    if not callable(factory):
        raise InputError(f"serve.safety_classifier expected a function {function!r} in {place}, found none")
    classifier = factory(**options)
    if not any(callable(getattr(classifier, judge, None)) for judge in JUDGES):
        raise InputError(f"serve.safety_classifier expected {name!r} to return an object with {' or '.join(JUDGES)}")
    return classifier


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"serve.safety_classifier expected an importable module, found {error}") from error


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"serve.safety_classifier expected a Python file, found nothing at {path}")
    spec = importlib.util.spec_from_file_location(f"safety_classifier_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ClipClassifier:
    """Zero-shot: an item is refused as the category whose text is nearest, when its probability reaches a threshold.

    Probabilities are a softmax over all texts, refused and allowed, of cosine times the CLIP's own logit scale
    (Radford et al. 2021, arXiv:2103.00020, section 3.1).
    """

    def __init__(
        self, encoder: ClipEncoder, refuse: Mapping[str, str], allow: Sequence[str], threshold: float = 0.5
    ) -> None:
        """`refuse` names a text for each category, `allow` texts of what is welcome; threshold in (0, 1]."""
        if not refuse or not allow:
            raise InputError("serve.safety_options expected texts to refuse and texts to allow, found one side empty")
        if not 0 < threshold <= 1:
            raise InputError(f"serve.safety_options.threshold expected above 0 and at most 1, found {threshold}")
        self.encoder, self.threshold = encoder, threshold
        self.categories = list(refuse)
        self._labels_LD = encoder.texts([*refuse.values(), *allow])

    def judge_prompts(self, prompts: list[str]) -> list[str | None]:
        return self._judge(self.encoder.texts(prompts))

    def judge_pictures(self, pictures: list[Image.Image]) -> list[str | None]:
        return self._judge(self.encoder.images(pictures))

    def _judge(self, features_ND: NDArray[np.float32]) -> list[str | None]:
        logits_NL = self.encoder.logit_scale * features_ND @ self._labels_LD.T
        weights_NL = np.exp(logits_NL - logits_NL.max(axis=1, keepdims=True))
        refused_NC = (weights_NL / weights_NL.sum(axis=1, keepdims=True))[:, : len(self.categories)]
        return [self.categories[row.argmax()] if row.max() >= self.threshold else None for row in refused_NC]


def clip_classifier(
    refuse: Mapping[str, str], allow: Sequence[str], threshold: float = 0.5, clip: str = ""
) -> ClipClassifier:
    """Make the zero-shot classifier; `clip` is a CLIP directory, empty takes the embedded one, which knows emblems."""
    return ClipClassifier(ClipEncoder(Path(clip).expanduser() if clip else EMBEDDED_CLIP), refuse, allow, threshold)
