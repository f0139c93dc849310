"""Measure candidate and champion on the same pictures, prompts and seeds, and lay it out as evidence for the gate.

On the new data (the candidate's), on the champion's own test data where that is another version, and on anchor prompts
that stay the same over all promotions. Everything is kept by `measure`, so a champion is measured once on each data
version. Nothing is decided here; what cannot be had is named with its reason.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.artifacts import Workspace, read_record
from cluster.registry import TAG_DATASET, Registry
from components.clip_encoder import ClipEncoder
from components.dataset import TEST, TRAIN, DatasetVersion, Item, load_dataset
from components.evidence import Champion, Evidence, Losses, NewData, Scores, Served
from components.metrics import Estimate, clip_scores
from components.models import embedded_clip
from flows import evaluate
from flows.config import Config
from flows.measure import MAX_LOSS_PICTURES, HeldOut, Performance, held_out, measure
from flows.models import ResolvedModel

NUM_ANCHORS = 16
COVERAGE = "coverage"
OTHER_LATENTS = "the models differ in autoencoder or prediction target, so their losses are on other scales"


@dataclass(frozen=True)
class Contest:
    """Who is compared: the candidate, its data, and the champion's weights and version (both None without one)."""

    candidate: ResolvedModel
    dataset: str
    champion: ResolvedModel | None
    facts: Champion | None

    @property
    def pair(self) -> tuple[ResolvedModel, ResolvedModel]:
        assert self.champion is not None
        return self.candidate, self.champion


def gather(
    config: Config, workspace: Workspace, contest: Contest, served: Served, evaluated: dict[str, Any]
) -> Evidence:
    """Measure what the gate asks about; `evaluated` compares the candidate with the champion on its data."""
    new = load_dataset(workspace.dataset_dir(contest.dataset))
    own_id = contest.facts.dataset if contest.facts else None
    own = _load(workspace, own_id)
    pictures, fresh = _judged_by(new, own)
    data = NewData(new.id, len(fresh), _seen(new, own, _load(workspace, contest.candidate.dataset)))
    if contest.champion is None or served.problem or (contest.facts and contest.facts.same_weights):
        return Evidence(data, served, contest.facts)
    comparable = evaluate.same_latents(*(model.directory for model in contest.pair))
    encoder = ClipEncoder(config.model.clip or embedded_clip())
    held = held_out(_at(config, workspace, new), workspace, new)
    performances = _measure(_at(config, workspace, new), workspace, contest, new, replace(held, pictures=pictures))
    return Evidence(
        data,
        served,
        contest.facts,
        new=_losses(new.id, performances, comparable, fresh),
        own=_own(config, workspace, contest, own_id, own, comparable),
        prompts=_scores(encoder, held.captions, performances),
        anchors=_anchors(config, workspace, contest, encoder),
        coverage=_coverage(evaluated["scorecard"], evaluated["other_scorecard"] or {}),
    )


def _load(workspace: Workspace, dataset_id: str | None) -> DatasetVersion | None:
    if not dataset_id or read_record(workspace.dataset_dir(dataset_id)) is None:
        return None
    return load_dataset(workspace.dataset_dir(dataset_id))


def _judged_by(new: DatasetVersion, own: DatasetVersion | None) -> tuple[list[Item], list[int]]:
    """The test pictures to measure, and which rows of them are new to the champion: those that its data lacks.

    Over all of them a model that learned what arrived would have to be better by the more the less has arrived. Where
    there are more than are measured, the new ones come first: of a large dataset's first few thousand few are new.
    """
    known = {item.sha256 for item in own.items} if own is not None and own.id != new.id else set()
    tests = new.split(TEST)
    if len(tests) > MAX_LOSS_PICTURES:
        tests = [item for item in tests if item.sha256 not in known][:MAX_LOSS_PICTURES]
    return tests, [row for row, item in enumerate(tests) if item.sha256 not in known]


def _seen(new: DatasetVersion, own: DatasetVersion | None, trained: DatasetVersion | None) -> int:
    """Pictures of either test split that a model trained on: splits go by a hash, so other fractions mix them."""
    tests = {item.sha256 for dataset in (new, own) if dataset for item in dataset.split(TEST)}
    trains = {item.sha256 for dataset in (new, own, trained) if dataset for item in dataset.split(TRAIN)}
    return len(tests & trains)


def _at(config: Config, workspace: Workspace, dataset: DatasetVersion) -> Config:
    """The config at the resolution of a dataset version."""
    record = read_record(workspace.dataset_dir(dataset.id)) or {}
    side_px = record.get("config", {}).get("resolution_px", config.data.resolution_px)
    return config.model_copy(update={"data": config.data.model_copy(update={"resolution_px": side_px})})


def _measure(
    config: Config, workspace: Workspace, contest: Contest, dataset: DatasetVersion, data: HeldOut | None = None
) -> list[Performance]:
    config = _at(config, workspace, dataset) if data is None else config
    data = data or held_out(config, workspace, dataset)
    return [measure(config, workspace, model.directory, model.fingerprint, data) for model in contest.pair]


def _losses(
    dataset_id: str, performances: Sequence[Performance], comparable: bool, rows: Sequence[int] | None = None
) -> Losses:
    """The loss of each picture by either model, of the pictures at `rows` where they are given."""
    if not comparable:
        return Losses(dataset_id, missing=OTHER_LATENTS)
    candidate, champion = (performance.losses_NK.mean(axis=1) for performance in performances)
    if rows is not None:
        candidate, champion = candidate[list(rows)], champion[list(rows)]
    if len(candidate) < 2:
        return Losses(dataset_id, missing=f"{dataset_id} has {len(candidate)} test pictures, at least 2 are needed")
    return Losses(dataset_id, candidate, champion)


def _own(
    config: Config,
    workspace: Workspace,
    contest: Contest,
    own_id: str | None,
    own: DatasetVersion | None,
    comparable: bool,
) -> Losses | None:
    """Both models on the champion's test data; None where that is the new data, or the champion names none."""
    if own_id is None or own_id == contest.dataset:
        return None
    if own is None:
        return Losses(own_id, missing=f"the champion's data {own_id} is not in this workspace any more")
    if not own.split(TEST):
        return Losses(own_id, missing=f"the champion's data {own_id} has no test pictures")
    return _losses(own_id, _measure(config, workspace, contest, own), comparable)


def _scores(encoder: ClipEncoder, prompts: Sequence[str], performances: Sequence[Performance]) -> Scores | None:
    if len(prompts) < 2:
        return None
    texts = encoder.texts(list(prompts))
    ours, theirs = (clip_scores(encoder.images(performance.drawn), texts) for performance in performances)
    return Scores(ours, theirs, (encoder.identity, encoder.identity))


def _anchors(config: Config, workspace: Workspace, contest: Contest, encoder: ClipEncoder) -> Scores | None:
    """Both models on the anchor prompts: those of the config, else the first test captions of the oldest known data."""
    prompts = list(config.gate.anchor_prompts) or _first_captions(config, workspace)
    if len(prompts) < 2:
        return None
    items = [Item(hashlib.sha256(prompt.encode()).hexdigest(), prompt, TEST, "") for prompt in prompts]
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]
    anchors = DatasetVersion("anchors", f"{digest}-{config.data.resolution_px}", workspace.data, tuple(items))
    data = HeldOut(anchors, [], items, workspace.encoded)
    return _scores(encoder, prompts, _measure(config, workspace, contest, anchors, data))


def _first_captions(config: Config, workspace: Workspace) -> list[str]:
    for version in Registry(workspace, config.placement.tracking_uri).versions(config.name):
        dataset = _load(workspace, version.tags.get(TAG_DATASET))
        if dataset is not None:
            return [item.caption for item in dataset.split(TEST)[:NUM_ANCHORS]]
    return []


def _coverage(ours: dict[str, Any], theirs: dict[str, Any]) -> Scores | None:
    if COVERAGE not in ours or COVERAGE not in theirs:
        return None
    cards = (ours[COVERAGE], theirs[COVERAGE])
    candidate, champion = (Estimate(*(card[key] for key in ("value", "low", "high", "n"))) for card in cards)
    return Scores(candidate, champion, (cards[0].get("encoder", ""), cards[1].get("encoder", "")))
