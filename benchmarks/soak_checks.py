"""What a soak test's stories, kills, swaps and memory say: counts and verdicts as pure functions."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from benchmarks.serve_requests import slope_per_1000
from benchmarks.soak_traffic import Attempt, Story
from components.provenance import verify

SETTLED_S = 15.0
"""A request that begins later than this after a swap must not be drawn by the version before."""
BROKEN_BY_KILL_S = 2.0
"""The proxy may need so long to see that a replica is gone: what it sent there meanwhile was on it too."""
MOST_GROWTH_MIB = {"fresco serve": 10.0, "Ray": 40.0}
"""In ten minutes, replicas left out. Ray keeps books of every replica and actor that was ever killed."""
MOST_DIFFERENCE = 1


@dataclass(frozen=True)
class Kill:
    """A replica that was ended with SIGKILL, and when another one was ready in its place (None: never)."""

    at: float
    ready_at: float | None


@dataclass(frozen=True)
class Swap:
    """The champion became `version`."""

    at: float
    version: int


@dataclass(frozen=True)
class Sample:
    """Memory at one moment."""

    at: float
    replica_mib: float
    others_mib: dict[str, float]
    """Of the endpoint's other processes, by what they are."""


@dataclass
class Log:
    """Everything that happened."""

    stories: list[Story] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    replicas: int = 1
    rows_left: float | None = None
    """Rows that the endpoint still draws or keeps waiting when every request has had its end."""


@dataclass(frozen=True)
class Check:
    """One claim of the soak test."""

    claim: str
    found: str
    held: bool | None
    """None: the endpoint does not offer this yet, so nothing was shown."""


def judge(log: Log, redrawn: Sequence[int], keys: Mapping[str, Ed25519PublicKey], left_behind: int) -> list[Check]:
    """Hold what happened against the claims; `redrawn` are the differences of the sampled pictures.

    `keys` are the public keys of the endpoint's workspace.
    """
    patient = [story for story in log.stories if not story.rude]
    lost = [story for story in patient if not story.drawn]
    wrong = sum(difference > MOST_DIFFERENCE for difference in redrawn)
    drawn = [story for story in log.stories if story.drawn]
    mixed_up = sum(not _is_what_was_asked(story, keys) for story in drawn)
    return [
        Check("no wrong picture", f"{wrong} of {len(redrawn)} drawn again", wrong == 0 and bool(redrawn)),
        Check(
            "every picture is signed for its own request, seed and version",
            f"{mixed_up} of {len(drawn)} answers are not",
            mixed_up == 0 and bool(drawn),
        ),
        Check("every patient request is drawn", f"{len(lost)} of {len(patient)} lost", not lost),
        *_kill_checks(log),
        *_swap_checks(log),
        *(_growth_check(log, name, most) for name, most in MOST_GROWTH_MIB.items()),
        _rows_check(log.rows_left),
        Check("no process is left behind", f"{left_behind}", left_behind == 0),
    ]


def _rows_check(rows_left: float | None) -> Check:
    claim = "nothing is drawn for those who left"
    if rows_left is None:
        return Check(claim, "not measured", None)
    return Check(claim, f"{rows_left:g} rows in the end", rows_left == 0)


def _growth_check(log: Log, name: str, most_mib: float) -> Check:
    growth = growth_mib(log.samples, name)
    found = "not measured" if growth is None else f"{growth:+.1f} MiB"
    claim = f"{name} grows at most {most_mib:g} MiB in ten minutes"
    return Check(claim, found, None if growth is None else growth <= most_mib)


def _kill_checks(log: Log) -> list[Check]:
    """Errors are for those on a killed replica, one each, in OpenAI's shape; without another one, later ones wait."""
    if not log.kills:
        return []
    hit, waiting, other = sort_errors(log)
    on_killed = [attempt for attempts in hit.values() for attempt in attempts]
    unclear = Counter(attempt.detail for attempt in [*on_killed, *waiting] if attempt.kind != "clear")
    twice = sum(len(attempts) > 1 for attempts in hit.values())
    back_s = [kill.ready_at - kill.at for kill in log.kills if kill.ready_at is not None]
    told = ", ".join(f"{count}x {detail}" for detail, count in unclear.most_common()) or "none"
    slowest = f"the slowest after {max(back_s):.0f} s" if back_s else "none"
    return [
        Check(
            "each replica killed is replaced",
            f"{len(back_s)} of {len(log.kills)}, {slowest}",
            len(back_s) == len(log.kills),
        ),
        Check("no request but those on a killed replica sees an error", f"{_told(other)}", not other),
        Check("those on it see one error each", f"{len(hit)} saw one, {twice} of them more", twice == 0),
        Check("these errors are clear: OpenAI's shape, to be repeated", f"unclear: {told}", not unclear),
    ]


def sort_errors(log: Log) -> tuple[dict[int, list[Attempt]], list[Attempt], list[Attempt]]:
    """Sort failed attempts: on a killed replica (by story), while none was ready, and those without such an excuse.

    With more than one replica another one was always ready.
    """
    hit: dict[int, list[Attempt]] = {}
    waiting: list[Attempt] = []
    other: list[Attempt] = []
    for number, story in enumerate(log.stories):
        for attempt in story.attempts:
            if attempt.kind in ("drawn", "left"):
                continue
            if any(attempt.began <= kill.at + BROKEN_BY_KILL_S and kill.at <= attempt.ended for kill in log.kills):
                hit.setdefault(number, []).append(attempt)
            elif log.replicas == 1 and any(
                kill.at < attempt.ended and attempt.began <= (kill.ready_at or attempt.began) for kill in log.kills
            ):
                waiting.append(attempt)
            else:
                other.append(attempt)
    return hit, waiting, other


def _swap_checks(log: Log) -> list[Check]:
    """Swaps are seen in the answers: the new version draws soon, the old one nothing more that begins later."""
    if not log.swaps:
        return []
    followed = follow_times(log)
    seen = [seconds for seconds in followed if seconds is not None]
    if not seen:
        versions = sorted({str(story.version) for story in log.stories if story.drawn})
        found = f"not supported: it kept drawing with version {', '.join(versions) or 'none'}"
        return [Check(f"{len(log.swaps)} swaps under load are followed", found, None)]
    stale = sum(story.drawn and _is_stale(story, log.swaps) for story in log.stories)
    told = f"{len(seen)} of {len(log.swaps)}, median after {statistics.median(seen):.1f} s, at most {max(seen):.1f} s"
    return [
        Check("every swap is followed", told, len(seen) == len(log.swaps)),
        Check(f"{SETTLED_S:g} s after a swap the old version begins nothing", f"{stale} answers", stale == 0),
    ]


def follow_times(log: Log) -> list[float | None]:
    """Seconds from each swap to the first answer of its version before the next swap; None where there is none."""
    times: list[float | None] = []
    for swap, following in zip(log.swaps, [*log.swaps[1:], None], strict=True):
        until = following.at if following is not None else float("inf")
        ends = [story.attempts[-1].ended for story in log.stories if story.drawn and story.version == swap.version]
        seen = [ended - swap.at for ended in ends if swap.at <= ended < until]
        times.append(min(seen) if seen else None)
    return times


def _is_stale(story: Story, swaps: Sequence[Swap]) -> bool:
    began, ended = story.attempts[-1].began, story.attempts[-1].ended
    champion = [swap for swap in swaps if swap.at + SETTLED_S <= began][-1:]
    since = [swap.version for swap in swaps if champion and champion[0].at <= swap.at <= ended]
    return bool(champion) and story.version not in since


def _is_what_was_asked(story: Story, keys: Mapping[str, Ed25519PublicKey]) -> bool:
    """Believe the signed record inside each file, not what the answer says around it."""
    seeds = tuple(story.body["seed"] + index for index in range(story.body["n"]))
    if len(story.pictures) != story.body["n"] or story.seeds != seeds or story.version is None:
        return False
    for seed, picture in zip(seeds, story.pictures, strict=True):
        verdict = verify(picture, keys)
        expected = {"request_id": story.request_id, "seed": seed, "model_version": story.version}
        if verdict.status != "valid" or any(verdict.facts.get(key) != value for key, value in expected.items()):
            return False
    return True


def growth_mib(samples: Sequence[Sample], name: str) -> float | None:
    """Growth of one kind of process in ten minutes, the first sixth left out: it is still warming up."""
    warm = [sample for sample in samples[len(samples) // 6 :] if name in sample.others_mib]
    if len(warm) < 2:
        return None
    return 0.6 * slope_per_1000([round(sample.at) for sample in warm], [sample.others_mib[name] for sample in warm])


def _told(attempts: Sequence[Attempt]) -> str:
    counted = Counter(attempt.detail for attempt in attempts)
    return ", ".join(f"{count}x {detail}" for detail, count in counted.most_common(5)) or "none did"


def summary(log: Log) -> Mapping[str, str]:
    """What the run was like, for the first table."""
    drawn = sorted(story.waited_s for story in log.stories if story.drawn)
    near = sorted(
        story.waited_s
        for story in log.stories
        if story.drawn and any(swap.at - 2 <= story.attempts[-1].ended <= swap.at + 5 for swap in log.swaps)
    )
    versions = Counter(str(story.version) for story in log.stories if story.drawn)
    replica = [sample.replica_mib for sample in log.samples if sample.replica_mib]
    return {
        "requests": str(len(log.stories)),
        "of these, hung up on or cancelled": str(sum(story.left for story in log.stories)),
        "pictures asked for": ", ".join(
            f"{form} {count}" for form, count in Counter(story.form for story in log.stories).most_common()
        ),
        "tried again": str(sum(len(story.attempts) > 1 for story in log.stories)),
        "seconds to the picture, kills included: median, p99": _quantiles(drawn),
        "the same, within 5 s of a swap": _quantiles(near),
        "answers by version": ", ".join(f"{version}: {count}" for version, count in sorted(versions.items())),
        "replica's memory, MiB: median, largest": f"{statistics.median(replica):.0f}, {max(replica):.0f}"
        if replica
        else "-",
    }


def _quantiles(ordered: Sequence[float]) -> str:
    if not ordered:
        return "-"
    return f"{statistics.median(ordered):.2f}, {ordered[-(-len(ordered) * 99 // 100) - 1]:.2f}"
