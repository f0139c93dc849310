"""The page that `fresco monitor` leaves behind: verdict, each stream with its numbers, what drifted, looks over time.

It shows what `drift.py` found and decides nothing. A stream's drawing has its effect (dot) and the smallest effect that
counts (dashed, what is above it shaded). Beside the arrivals that drifted most stand the reference's nearest pictures:
what the champion knows that comes closest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from components.attribution import Word
from components.drift import Look, StreamFinding
from components.drift_plots import PastLook, plot_budget, plot_effects, plot_evidence
from components.report import Card, cards, folded, notes, page, plot, plots, section
from components.simple_statistics import SMALLEST_SHIFT, Change

VERDICTS = {"drift": ("drift", "bad"), "no_drift": ("no drift", "good"), "not_enough_data": ("not enough data", "")}
HEADS = {
    "drift": "The data has drifted from what the champion knows.",
    "no_drift": "No drift: a change of the size that matters would have been found.",
    "not_enough_data": "Not enough data to say that nothing has drifted.",
}
STREAMS = {
    "images": ("Images", "Are there other pictures?"),
    "captions": ("Captions", "Are there other captions?"),
    "alignment": ("Alignment", "Do captions still belong to their pictures?"),
    "prompts": ("Prompts", "Do people ask for what the training captions say?"),
}
STATISTICS = {
    "caption_words": "Words in a caption",
    "rare_words": "Share of rare words",
    "megapixels": "Megapixels",
    "aspect_ratio": "Width by height",
    "brightness": "Brightness",
    "saturation": "Saturation",
    "near_duplicate": "Share of near duplicates",
    "rejected": "Share of rejected pictures",
}
EXPLAINED = {
    "drift": "Needs both: a difference that chance does not explain at this look's level (p), and one that is large"
    " enough to matter (effect).",
    "effect": "Of pictures and texts: the share of the arrivals that differ at least; the truth may be twice as much."
    " Of the alignment: the share of the agreement between pictures and captions that has changed.",
    "AUROC": "How well a classifier tells arrivals from the reference: 0.5 not at all, 1 always. It decides nothing.",
    "level": "What this look may spend of the false-alarm budget, shared by the streams and the statistics. All looks"
    " together raise no more false alarms than the budget, on average.",
    "groups": "The arrivals that are most unlike the reference, those that are alike together. They explain an alarm"
    " and are no test of their own.",
}
WIDTH_PX, MIDDLE_PX = 260, 22
SHOWN_WORDS, BAR_PX = 8, 150


@dataclass(frozen=True)
class Group:
    """Drifted arrivals that are alike: some of them, and the nearest of the reference; (caption, picture) each."""

    size: int
    shown: tuple[tuple[str, Image.Image | None], ...]
    nearest: tuple[tuple[str, Image.Image | None], ...]


@dataclass(frozen=True)
class Drifted:
    """What explains one stream's alarm."""

    groups: tuple[Group, ...]
    words: tuple[Word, ...]


def make_drift_page(
    title: str,
    look: Look,
    smallest_effect: float,
    facts: Mapping[str, str],
    drifted: Mapping[str, Drifted],
    past: Sequence[PastLook],
    per_year: float,
    settings: Mapping[str, str],
) -> str:
    """The whole HTML document; `past` are all looks of this reference that tested, this one last."""
    sections = [section("The streams", _shares(look), _streams(look, smallest_effect))]
    owner = next((name for name in ("captions", "images", "alignment") if name in drifted), "")  # of the same words
    sections += [_what_drifted(name, shown, name in (owner, "prompts")) for name, shown in drifted.items()]
    if look.statistics:
        note = "Plain numbers of both sides; p has Holm's correction over the set, and the level is a stream's."
        sections.append(section("Simple statistics", note, _statistics(look)))
    sections.append(_over_time(past, smallest_effect, per_year))
    folds = [folded(name, text) for name, text in settings.items()]
    sections.append(section("How to read this", "", notes(EXPLAINED), *folds))
    return page(title, "Fresco monitor", _lead(look), facts, sections, "Made by fresco monitor.")


def _lead(look: Look) -> str:
    """The verdict in a sentence, and what it is about."""
    names = [STREAMS[one.stream][0].lower() for one in look.streams if one.verdict == look.verdict]
    left_out = [STREAMS[one.stream][0].lower() for one in look.untested]
    untested = f" Not tested: {_listed(left_out)}." if left_out else ""
    moved = [STATISTICS[one.name].lower() for one in look.statistics if _moved(look, one)]
    if look.verdict != "drift":
        lacking = f" Of too few items: {_listed(names)}." if look.verdict == "not_enough_data" and names else ""
        return HEADS[look.verdict] + lacking + untested
    told = f" Drifted: {_listed(names)}." if names else ""
    return HEADS["drift"] + told + (f" Moved: {_listed(moved)}." if moved else "") + untested


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _moved(look: Look, one: Change) -> bool:
    return one.adjusted <= look.level / (len(look.streams) + 1) and one.large_enough


def _shares(look: Look) -> str:
    parts = max(1, len(look.streams) + bool(look.statistics))
    return f"This look tested at {look.level:.2g}, shared by {parts}: each at {look.level / parts:.2g}."


def _streams(look: Look, smallest_effect: float) -> str:
    lines = []
    for one in look.streams:
        name, question = STREAMS[one.stream]
        word, kind = VERDICTS[one.verdict]
        auroc = f"{one.auroc.value:.2f}<small>{one.auroc.low:.2f} to {one.auroc.high:.2f}</small>" if one.auroc else ""
        needed = (
            f"<small>{one.needed} a side rule it out</small>" if one.verdict == "not_enough_data" and one.needed else ""
        )
        p_value = "" if one.p_value is None else f"{_small(one.p_value)}<small>level {_small(one.level)}</small>"
        cells = [
            f"{name}<small>{escape(question)}</small>",
            _effect(one, smallest_effect),
            p_value,
            auroc,
            f"{one.num_reference} : {one.num_arrivals}",
            f'<span class="{kind}">{word}</span>{needed}',
        ]
        lines.append(_row(cells))
    for left in look.untested:
        name, question = STREAMS[left.stream]
        stream = f"{name}<small>{escape(question)} Not tested: {escape(left.why)}.</small>"
        sizes = f"{left.num_reference} : {left.num_arrivals}"
        lines.append(_row([stream, "", "", "", sizes, "not tested"]))
    titles = ("stream", "effect", "p", "AUROC", "reference : window", "verdict")
    return _table(titles, lines)


def _effect(one: StreamFinding, smallest: float) -> str:
    """The effect as a dot on a scale from 0, with what counts as drift shaded; empty where nothing was measured."""
    if one.effect is None:
        return ""
    right = max(1.25 * one.effect, 4 * smallest, 0.1)

    def x(value: float) -> float:
        return 6 + (WIDTH_PX - 12) * value / right

    colour = {"drift": "var(--bad)", "no_drift": "var(--good)"}.get(one.verdict, "var(--other)")
    anchor = "end" if x(one.effect) > WIDTH_PX - 40 else "middle" if x(one.effect) > 30 else "start"
    return (
        f'<svg viewBox="0 0 {WIDTH_PX} 50" width="{WIDTH_PX}" role="img" aria-label="effect {one.effect:.2f}, smallest'
        f' that counts {smallest:g}">'
        f'<rect x="{x(smallest):.1f}" y="8" width="{WIDTH_PX - x(smallest):.1f}" height="28" fill="var(--accent-soft)"'
        ' opacity="0.5"/>'
        f'<path d="M0 {MIDDLE_PX}H{WIDTH_PX}" stroke="var(--line)"/>'
        f'<path d="M{x(0):.1f} 8V36" stroke="var(--faint)"/>'
        f'<path d="M{x(smallest):.1f} 8V36" stroke="var(--ink)" stroke-dasharray="3 3"/>'
        f'<circle cx="{x(one.effect):.1f}" cy="{MIDDLE_PX}" r="5.5" fill="{colour}"/>'
        f'<text x="{x(one.effect):.1f}" y="49" font-size="11.5" fill="var(--soft)" text-anchor="{anchor}">'
        f"{one.effect:.2f}</text></svg>"
    )


def _what_drifted(stream: str, shown: Drifted, with_words: bool) -> str:
    name = STREAMS[stream][0]
    items = []
    for group in shown.groups:
        alike = f"{group.size} alike" if group.size > 1 else "one alone"
        if stream == "prompts":
            texts = "; ".join(text for text, _ in group.shown if text)
            items.append(Card(texts or "Prompts whose text was not kept (serve.capture_prompts)", alike, ()))
        else:
            items.append(Card("Arrived", alike, group.shown))
        if group.nearest:
            items.append(Card("Nearest that the champion knows", "", group.nearest))
    bodies = [f'<div class="pairs">{cards(items)}</div>'] if items else []
    if shown.words and with_words:
        bodies.append(_words(shown.words))
    words = ", and the words that moved" if with_words and shown.words else ""
    note = {
        "alignment": "Pairs whose picture and caption go together worst, by what the reference says goes together.",
        "prompts": f"Prompts that are most unlike the training captions{words}.",
    }.get(stream, f"Arrivals that are most unlike the reference{words}.")
    return section(f"What drifted: {name.lower()}", note, *bodies)


def _words(words: Sequence[Word]) -> str:
    """Words that became more and less frequent, side by side, with the captions that have them on either side."""
    most = max(abs(word.deviations) for word in words)
    sides = []
    for sign, title in ((1, "More often"), (-1, "Less often")):
        kept = [word for word in words if word.deviations * sign > 0][:SHOWN_WORDS]
        lines = "".join(_word(word, most) for word in kept) or "<p>none</p>"
        head = f"<figcaption>{title} <small>captions: reference, window</small></figcaption>"
        sides.append(f'<figure class="card words">{head}<div>{lines}</div></figure>')
    return f'<div class="pairs"><div class="cards">{"".join(sides)}</div></div>'


def _word(word: Word, most: float) -> str:
    width = max(2.0, BAR_PX * abs(word.deviations) / most)
    colour = "var(--accent)" if word.deviations > 0 else "var(--other)"
    title = f"{word.deviations:+.1f} standard errors"
    return (
        f'<div class="word" title="{title}"><span>{escape(word.text)}</span>'
        f'<svg viewBox="0 0 {BAR_PX} 10" width="{BAR_PX}" role="img" aria-label="{title}">'
        f'<rect width="{width:.1f}" height="10" rx="2" fill="{colour}"/></svg>'
        f"<b>{word.reference}</b><b>{word.arrivals}</b></div>"
    )


def _statistics(look: Look) -> str:
    lines = []
    for one in look.statistics:
        word = '<span class="bad">moved</span>' if _moved(look, one) else "as before"
        numbers = [f"{_plain(one.reference)}", f"{_plain(one.arrivals)}", _effect_of(one), _small(one.adjusted)]
        lines.append(_row([escape(STATISTICS.get(one.name, one.name)), *numbers, word]))
    return _table(("statistic", "reference", "window", "change", "p", ""), lines)


def _effect_of(one: Change) -> str:
    what = "of the share" if one.kind == "flag" else "of the items"
    return f"{one.effect:.2f}<small>{what}; from {SMALLEST_SHIFT[one.kind]:g} it counts</small>"


def _over_time(past: Sequence[PastLook], smallest_effect: float, per_year: float) -> str:
    spent = f"{past[-1].spent:.3g} of {per_year:g} a year" if past else "nothing"
    note = (
        f"{len(past)} {'look' if len(past) == 1 else 'looks'} at this reference; false alarms to be expected: {spent}."
    )
    if len(past) < 2:
        return section("Over time", f"{note} From the second look on, its course is drawn here.")
    drawn = [
        plot("How sure", "p below its level, in powers of ten; above the line it is significant", plot_evidence(past)),
        plot("How large", "effect; above the line it counts", plot_effects(past, smallest_effect)),
        plot("Budget", "false alarms to be expected of all looks so far", plot_budget(past, per_year)),
    ]
    return section("Over time", f"{note} Looks that found drift are accented.", plots(drawn))


def _table(titles: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _small(value: float) -> str:
    """A p-value or level: two digits, as a power of ten where it is tiny."""
    if value >= 0.001:
        return f"{value:.2g}"
    power = math.floor(math.log10(value))
    return f"{value / 10**power:.1f} × 10<sup>{power}</sup>".replace("-", "−")


def _plain(value: float) -> str:
    return f"{value:.3g}"
