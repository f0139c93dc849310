"""Has the data drifted from what the champion knows? One look: two samples and a level in, a verdict with numbers out.

`drift` needs both significance (p at or below the stream's share of the look's level, `false_alarms.py`) and effect (an
MMD above what the reference shows when split against itself at the same n, and above a size that does not shrink with
n). `no_drift` is said only where a change of the stated size would have been found with the stated power; else the
verdict is `not_enough_data`, with the number of items that would do. Pure: no clock, no files; all chance is in `seed`.
Shape letters: N pooled items (reference first).
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from components.attribution import Cluster, Word, clusters, disagreement, drifted_words, witness
from components.drift_effects import agreements, measured_effect, pair_behind, stream_auroc
from components.drift_streams import (
    ALIGNMENT,
    PROMPTS,
    STREAMS,
    Bank,
    Items,
    check_encoders,
    compared,
    make_bank,
)
from components.errors import InputError
from components.false_alarms import shares
from components.metrics import Estimate
from components.sample_sizes import concept_power, mismatch_power, shift_power, smallest_size
from components.simple_statistics import Change, compare_statistics
from components.two_sample import items_for_level, permutation_test

Outcome = Literal["drift", "no_drift", "not_enough_data"]

STATISTICS = "statistics"


@dataclass(frozen=True)
class DriftSettings:
    """What counts as drift, and what must be found."""

    smallest_concept: float = 0.1
    """Share of the arrivals; a new concept of this share must be found for `no_drift` of pictures or texts."""
    smallest_mismatch: float = 0.75
    """Share of the arrivals; so many captions of other pictures must be found for `no_drift` of the alignment."""
    power: float = 0.8
    """With which it must be found."""
    smallest_effect: float = 0.02
    """Of `StreamFinding.effect`; smaller ones are not drift, however sure."""
    most_items: int = 1000
    """A side; of more, so many are drawn. More would find differences that matter to nobody, at quadratic cost."""
    streams: tuple[str, ...] = STREAMS
    """Those that may raise the alarm; prompts only where some were served."""


@dataclass(frozen=True)
class StreamFinding:
    """What one stream says, with all its numbers."""

    stream: str
    verdict: Outcome
    sentence: str
    num_reference: int
    num_arrivals: int
    level: float
    """This stream's share of the look's level."""
    p_value: float | None = None
    permutations: int = 0
    kernel: str = ""
    """The kernel that tells the sides apart best; the numbers below are its."""
    mmd2: float | None = None
    split_quantile: float | None = None
    """The 99 % quantile of the same statistic between random halves of the reference, brought to the same n."""
    effect: float | None = None
    """Pictures and texts: the share of the arrivals that differ at least; the truth may be twice as much and more.
    Alignment: how much of the agreement has changed: 0 nothing, 1 all is lost, 1.4 it is turned into its opposite.
    Where the cosine is the strongest: the difference of the mean cosines in standard deviations."""
    auroc: Estimate | None = None
    """How well a classifier tells arrivals from the reference; alignment: the chance that a pair of the reference
    agrees better with all other pairs than one of the arrivals."""
    needed: int | None = None
    """Items a side that would find the stated change with the stated power; None where no number would."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Of the alignment: the mean agreement within the reference and within the arrivals."""


@dataclass(frozen=True)
class Untested:
    """A stream that was asked for and could not be compared; the verdict says nothing of it."""

    stream: str
    num_reference: int
    num_arrivals: int
    why: str


@dataclass(frozen=True)
class Look:
    """The verdict over all streams that were tested."""

    verdict: Outcome
    reasons: tuple[str, ...]
    level: float
    seed: int
    encoder: str
    streams: tuple[StreamFinding, ...]
    statistics: tuple[Change, ...]
    untested: tuple[Untested, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Explanation:
    """What to look at after an alarm; places are among the arrivals that were compared (`compared`)."""

    clusters: tuple[Cluster, ...]
    words: tuple[Word, ...]


def look(
    reference: Items,
    arrivals: Items,
    level: float,
    seed: int,
    settings: DriftSettings = DriftSettings(),
    untested: tuple[Untested, ...] = (),
) -> Look:
    """Compare arrivals with the reference; the chance of a false alarm is at most `level`, all streams together.

    `level` is `false_alarms.next_look`'s. Each stream, and the set of simple statistics, tests at an equal share of it.
    `untested` are streams that the settings leave out since the caller has too little of them.
    """
    check_encoders(reference, arrivals)
    if not 0 < level < 1:
        raise InputError(f"a look expects a level in (0, 1), found {level}; some time must pass since the look before")
    reference, arrivals = compared(reference, arrivals, seed, settings.most_items)
    streams = [name for name in settings.streams if name != PROMPTS or arrivals.prompts is not None]
    if len(streams) < len(settings.streams) and PROMPTS not in [one.stream for one in untested]:
        untested = (*untested, Untested(PROMPTS, len(reference), 0, "there are no served prompts"))
    counted = bool(set(reference.statistics) & set(arrivals.statistics))
    share = shares(level, max(1, len(streams) + counted))
    findings = tuple(
        _finding(name, reference, arrivals, share, seed + 1 + place, settings) for place, name in enumerate(streams)
    )
    changes = compare_statistics(reference.statistics, arrivals.statistics, share, seed) if counted else ()
    verdict, reasons = _verdict(findings, changes, share)
    reasons += tuple(f"{one.stream}: not tested: {one.why}" for one in untested)
    return Look(verdict, reasons, level, seed, reference.encoder, findings, changes, untested)


def explain(reference: Items, arrivals: Items, finding: StreamFinding) -> Explanation:
    """The arrivals that drifted most, clustered, and the words; both sides as `compared` gave them."""
    bank = make_bank(finding.stream, reference, arrivals)
    texts = arrivals.prompts if finding.stream == PROMPTS and arrivals.prompts else arrivals.captions
    words = drifted_words(reference.captions.texts, texts.texts) if any(texts.texts) else ()
    if finding.stream == ALIGNMENT:
        pair = pair_behind(bank, finding.kernel)
        return Explanation(clusters(pair, disagreement(pair, bank.num_reference), bank.num_reference), words)
    kernel = bank.kernels[finding.kernel]
    return Explanation(clusters(kernel, witness(kernel, bank.num_reference), bank.num_reference), words)


def _finding(
    stream: str, reference: Items, arrivals: Items, level: float, seed: int, settings: DriftSettings
) -> StreamFinding:
    sizes = (len(reference), len(arrivals.prompts.texts if stream == PROMPTS and arrivals.prompts else arrivals))
    fewest = items_for_level(level)
    if min(sizes) < fewest:
        told = f"{sizes[0]} items of the reference and {sizes[1]} arrivals: no difference whatever could reach p <="
        sentence = f"{stream}: {told} {level:.2g}; at least {fewest} a side are needed"
        return StreamFinding(stream, "not_enough_data", sentence, *sizes, level, needed=fewest)
    bank = make_bank(stream, reference, arrivals)
    test = permutation_test(bank.kernels, bank.num_reference, seed, level)
    numbers = measured_effect(bank, test, seed)
    significant = test.p_value <= level
    large = numbers["mmd2"] > numbers["split_quantile"] and numbers["effect"] >= settings.smallest_effect
    needed = needed_items(stream, bank, level, settings)
    enough = needed is not None and 2 / (1 / sizes[0] + 1 / sizes[1]) >= needed
    verdict: Outcome = "drift" if significant and large else "no_drift" if enough else "not_enough_data"
    auroc = stream_auroc(stream, bank, test.strongest, seed)
    finding = StreamFinding(
        stream,
        verdict,
        "",
        *sizes,
        level,
        test.p_value,
        test.permutations,
        test.strongest,
        numbers["mmd2"],
        numbers["split_quantile"],
        numbers["effect"],
        auroc,
        needed,
        agreements(bank, test.strongest) if stream == ALIGNMENT else {},
    )
    return replace(finding, sentence=_sentence(finding, test.p_value, numbers["effect"]))


def needed_items(stream: str, bank: Bank, level: float, settings: DriftSettings) -> int | None:
    """Items a side that find the settings' change with their power, planned on the reference's part of the bank."""
    inside = slice(0, bank.num_reference)
    if stream == ALIGNMENT:
        share = settings.smallest_mismatch
        plans = [mismatch_power(pair[inside, inside], share, level) for pair in bank.pairs.values()]
        plans.append(shift_power(share * max(0.0, bank.cosine_gain), level))
    else:
        plans = [concept_power(one[inside, inside], settings.smallest_concept, level) for one in bank.kernels.values()]
    sizes = [smallest_size(plan, settings.power) for plan in plans]
    found = [size for size in sizes if size is not None]
    return max(items_for_level(level), min(found)) if found else None


def _sentence(finding: StreamFinding, p_value: float, effect: float) -> str:
    """Tell a finding that was tested."""
    stream, verdict, auroc, needed = finding.stream, finding.verdict, finding.auroc, finding.needed
    kind = "the agreement changed by" if stream == ALIGNMENT else "share of arrivals that differ at least"
    told = f"p = {p_value:.2g} at level {finding.level:.2g}, {kind} {effect:.2f}"
    if auroc is not None:
        told += f", AUROC {auroc.value:.2f} ({auroc.low:.2f} to {auroc.high:.2f})"
    told += f", {finding.num_reference} items of the reference and {finding.num_arrivals} arrivals"
    if verdict == "drift":
        return f"{stream} drifted: {told}"
    small = "; the difference is sure, and too small to matter" if p_value <= finding.level else ""
    if verdict == "no_drift":
        return f"{stream}: no drift ({told}; {needed} a side would do){small}"
    if needed is None:
        lack = "no number of items would find the change that must be found: this reference does not show such a thing"
    else:
        lack = f"{needed} items a side are needed to rule out the change that must be found"
    return f"{stream}: not enough data ({told}){small}; {lack}"


def _verdict(
    findings: tuple[StreamFinding, ...], changes: tuple[Change, ...], share: float
) -> tuple[Outcome, tuple[str, ...]]:
    """Drift if anything drifted, else not enough data if anything lacks it; reasons begin with what decided.

    Where no stream was tested, statistics that stayed as they were are no evidence that nothing has drifted.
    """
    moved = [change for change in changes if change.adjusted <= share and change.large_enough]
    reasons = [
        f"{STATISTICS}: {change.name} went from {change.reference:.3g} to {change.arrivals:.3g}"
        f" (p = {change.adjusted:.2g} after Holm at level {share:.2g})"
        for change in moved
    ]
    order: tuple[Outcome, ...] = ("drift", "not_enough_data", "no_drift")
    told = [finding.sentence for outcome in order for finding in findings if finding.verdict == outcome]
    verdicts = {finding.verdict for finding in findings}
    verdict: Outcome = "drift" if moved else next(filter(verdicts.__contains__, order), "not_enough_data")
    drifted = sum(finding.verdict == "drift" for finding in findings)
    return verdict, (*told[:drifted], *reasons, *told[drifted:])
