"""The README.md of a promoted model, as the Hugging Face hub reads it: front matter in YAML, then words for people.

Only what is known is said. The card is no part of a model's fingerprint, so it can be written after the weights.
Format: huggingface/hub-docs, `modelcard.md` (metadata with a `model-index`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

CARD, PICTURE = "README.md", "samples.png"
LICENSE_NOTE = "Set `license` above before publishing: it follows from the base model and the pictures."


@dataclass(frozen=True)
class CardFacts:
    """What a card tells; `lineage` and `recipe` are shown as they come, in order."""

    name: str
    version: int
    dataset: str
    resolution_px: int
    scorecard: Mapping[str, Mapping[str, float]]
    reasons: Sequence[str]
    lineage: Mapping[str, str]
    recipe: Mapping[str, object] = field(default_factory=dict)
    has_picture: bool = False


def make_card(facts: CardFacts) -> str:
    """Return the whole file."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n\n# {_plain(facts.name)}, version {facts.version}",
        f"A text-to-image model for {facts.resolution_px} px pictures, fine-tuned and promoted by Fresco.",
        f"![Pictures drawn from test captions]({PICTURE})" if facts.has_picture else "",
        "## How to load it\n\n" + _loading(facts),
        f"## Quality\n\nOn the test pictures of `{facts.dataset}`, with 95 % intervals.\n\n" + _scores(facts.scorecard),
        "## Why it was promoted\n\n" + "\n".join(f"- {_plain(reason)}" for reason in facts.reasons),
        "## Where it comes from\n\n" + _table(("what", "value"), facts.lineage.items()),
        "## Recipe\n\n" + _table(("setting", "value"), facts.recipe.items()) if facts.recipe else "",
        LICENSE_NOTE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: CardFacts) -> dict[str, object]:
    metrics = [{"type": key, "value": round(card["value"], 6), "name": key} for key, card in facts.scorecard.items()]
    result = {
        "task": {"type": "text-to-image"},
        "dataset": {"type": "fresco", "name": facts.dataset},
        "metrics": metrics,
    }
    return {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "safetensors", "fresco"],
        "model-index": [{"name": f"{facts.name}-v{facts.version}", "results": [result]}],
    }


def _loading(facts: CardFacts) -> str:
    side = facts.resolution_px
    return (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")\n'
        f'pipeline("a small red circle on a blue background", height={side}, width={side}).images[0]\n```'
    )


def _scores(scorecard: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (key, f"{card['value']:.4g} ({card['low']:.4g} to {card['high']:.4g}), n = {card['n']}")
        for key, card in scorecard.items()
    ]
    return _table(("metric", "value"), rows)


def _table(head: tuple[str, str], rows: Iterable[tuple[str, object]]) -> str:
    lines = [f"| {_plain(key)} | {_plain(value)} |" for key, value in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _plain(value: object) -> str:
    """One line that is no markup: names and paths come from outside."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(str(value).split()))
