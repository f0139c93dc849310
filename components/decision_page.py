"""The page that `fresco promote` leaves behind: the verdict, every check with its interval beside its limit, pictures.

It shows what `policy.py` decided and adds nothing to it. A drawing has the measured change (dot and line), the limit it
had to clear (the dashed line) and, shaded, the side of the limit on which a check passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from PIL import Image

from components.policy import (
    ANCHORS,
    CANARY,
    CHAMPION,
    CLIP,
    COVERAGE,
    DATA,
    FORGETTING,
    IMPROVEMENT,
    SERVING,
    Check,
    Decision,
)
from components.report import folded, notes, page, plot, plots, section, sheet

TITLES = {
    DATA: "Test pictures",
    SERVING: "Serving",
    CHAMPION: "Champion",
    FORGETTING: "Forgetting",
    IMPROVEMENT: "Improvement",
    CLIP: "CLIP score",
    ANCHORS: "CLIP score on anchor prompts",
    COVERAGE: "Coverage",
    CANARY: "A share of the traffic",
}
OUTCOMES = {
    "pass": ("pass", "good"),
    "fail": ("fail", "bad"),
    "inconclusive": ("open", ""),
    "skipped": ("not asked", ""),
}
LOWER_IS_BETTER = (FORGETTING, IMPROVEMENT)
WIDTH_PX, MIDDLE_PX, MARGIN = 300, 26, 0.08
EXPLAINED = {
    "pass, fail, open": "Passed or failed beyond doubt at the gate's significance, or not decided by the evidence. One"
    " failure rejects; without one, an open check holds; only when every check passes is the candidate promoted.",
    "interval": "The limits between which the change lies with the gate's confidence. The improvement's holds, besides"
    " the error from the number of pictures, what two seeds of one recipe differ by.",
    "pairs": "Candidate and champion are measured on the same pictures, with the same noise, prompts and seeds.",
}


@dataclass(frozen=True)
class Judged:
    """A decision and whom it was about; `champion` is 0 where there was none."""

    version: int
    champion: int
    decision: Decision
    forced: bool = False


def make_decision_page(
    title: str,
    judged: Judged,
    facts: Mapping[str, str],
    settings: Mapping[str, str],
    grid: Image.Image | None = None,
    evaluation: str = "",
) -> str:
    """The whole HTML document; `evaluation` is the file name of the full comparison in the same folder."""
    sections = [section("The checks", "In the order in which they are asked.", _table(judged.decision))]
    if grid is not None:
        whose = f"version {judged.champion}, version {judged.version} and the real picture"
        note = f"The first test captions, not chosen: {whose if judged.champion else 'the candidate'}."
        sections.append(section("Pictures", note, plots([plot("Same prompts, same seeds", "", sheet(grid))])))
    if evaluation:
        link = f'<p><a href="{escape(evaluation)}">Every metric, curve and picture of the comparison</a></p>'
        sections.append(section("The full comparison", "", link))
    folds = [folded(name, text) for name, text in settings.items()]
    sections.append(section("How to read this", "", notes(EXPLAINED), *folds))
    return page(title, "Fresco gate", lead(judged), facts, sections, "Made by fresco promote.")


def lead(judged: Judged) -> str:
    """The verdict in a sentence, then what decided it."""
    verdict, version, champion = judged.decision.verdict, judged.version, judged.champion
    old = f"version {champion}"
    if judged.forced:
        told = f"Version {version} was promoted by force; the gate says {verdict}."
    elif verdict == "promote":
        told = f"Version {version} replaces {old}." if champion else f"Version {version} is the first champion."
    elif verdict == "hold":
        told = f"Version {version} is held: the evidence does not decide. {_kept(champion)}"
    else:
        told = f"Version {version} is rejected. {_kept(champion)}"
    deciding = _deciding(judged.decision)
    return f"{told} {deciding[0].upper()}{deciding[1:]}." if deciding else told


def _kept(champion: int) -> str:
    return f"Version {champion} stays champion." if champion else "There is still no champion."


def _deciding(decision: Decision) -> str:
    """What failed or is open, first of all; of a promotion, the improvement."""
    if decision.verdict != "promote":
        return decision.reasons[0]
    return next((check.sentence for check in decision.checks if check.name == IMPROVEMENT), "")


def _table(decision: Decision) -> str:
    lines = []
    for check in decision.checks:
        word, kind = OUTCOMES[check.outcome]
        cells = [
            f"{escape(TITLES[check.name])}<small>{escape(check.sentence)}</small>",
            _drawing(check),
            f'<span class="{kind}">{word}</span>',
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    titles = "".join(f"<th>{title}</th>" for title in ("check", "change and limit", "outcome"))
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _drawing(check: Check) -> str:
    """The change with its interval, zero, and the limit with its good side shaded; empty for a check without one."""
    numbers = {key: value for key, value in check.numbers.items() if value is not None}
    if not {"change", "low", "high"} <= numbers.keys():
        return ""
    limit = -numbers["wanted"] if check.name == IMPROVEMENT else numbers["allowed"]
    limit = limit if check.name in LOWER_IS_BETTER else -limit
    ends = [numbers["low"], numbers["high"], limit, 0.0]
    room = MARGIN * ((max(ends) - min(ends)) or 1.0)
    left, right = min(ends) - room, max(ends) + room

    def x(value: float) -> float:
        return WIDTH_PX * (value - left) / (right - left)

    good = (0.0, x(limit)) if check.name in LOWER_IS_BETTER else (x(limit), float(WIDTH_PX))
    colour = {"pass": "var(--good)", "fail": "var(--bad)"}.get(check.outcome, "var(--other)")
    show = _percent if check.name in LOWER_IS_BETTER else _points
    return (
        f'<svg viewBox="0 0 {WIDTH_PX} 62" width="{WIDTH_PX}" role="img"'
        f' aria-label="change {show(numbers["change"])}, limit {show(limit)}">'
        f'<rect x="{good[0]:.1f}" y="8" width="{good[1] - good[0]:.1f}" height="36" fill="var(--accent-soft)"'
        ' opacity="0.55"/>'
        f'<path d="M0 {MIDDLE_PX}H{WIDTH_PX}" stroke="var(--line)"/>'
        f'<path d="M{x(0):.1f} 8V44" stroke="var(--faint)"/>'
        f'<path d="M{x(limit):.1f} 8V44" stroke="var(--ink)" stroke-dasharray="3 3"/>'
        f'<path d="M{x(numbers["low"]):.1f} {MIDDLE_PX}H{x(numbers["high"]):.1f}" stroke="{colour}" stroke-width="3"'
        ' stroke-linecap="round"/>'
        f'<circle cx="{x(numbers["change"]):.1f}" cy="{MIDDLE_PX}" r="5" fill="{colour}"/>'
        f"{_mark(x(0), '0')}{_mark(x(limit), show(limit)) if abs(x(limit) - x(0)) > 40 else ''}</svg>"
    )


def _mark(x: float, text: str) -> str:
    anchor = "start" if x < 24 else "end" if x > WIDTH_PX - 24 else "middle"
    return f'<text x="{x:.1f}" y="58" font-size="11" fill="var(--faint)" text-anchor="{anchor}">{text}</text>'


def _percent(value: float) -> str:
    return f"{value:+.1%}".replace("-", "−")


def _points(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
