"""The page that `fresco timeline` leaves behind: who serves and how that came about, then everything before.

From the present backwards: the chain that led to the champion, all events on one axis, drift over time, cycles with
their stages, decisions, reigns, data, and the journal in short. Parts that the journal tells nothing of are left out.
Long histories end in a sentence that says how much is left out; the JSON beside the page has all of it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from components.report import Card, cards, notes, page, plot, plots, section
from components.story import Reign, Story
from components.timeline_cycles import cycles_section
from components.timeline_lanes import draw_lanes
from components.timeline_plots import plot_effects, points_of
from components.timeline_tables import data_section, gate_section, journal_section, served_section
from components.timeline_words import OUTCOMES, Link, counted, deciding, figure, lasting, linked, short, when

MOST_REPORTS = 60
EXPLAINED = {
    "served": "Bars are versions while they were champion; filled is the one that serves now, hatched in red came by a"
    " rollback.",
    "gate": "Decisions: green promoted, grey held, red rejected.",
    "cycles": "Retrainings from trigger to decision: green promoted, grey refused or waits, red rolled back or failed.",
    "triggers": "Triangles are decisions to train, thin bars times in which the loop looked and waited.",
    "monitor": "Looks: tall marks said drift, short ones did not, pale ones had not enough data.",
    "data": "Dataset versions: filled grew from another by arrivals, hollow were made whole.",
}


def make_timeline_page(story: Story, facts: Mapping[str, str], pictures: Sequence[Card], link: Link) -> str:
    """The whole HTML document; `pictures` are those that champions drew, newest first."""
    drew = section("What they drew", "The same prompts and seeds, by each champion's run.", cards(pictures))
    sections = [
        *_present(story, link),
        *_everything(story),
        *_drift(story, link),
        *cycles_section(story, link),
        *([drew] if pictures else []),
        *gate_section(story, link),
        *served_section(story, link),
        *data_section(story),
        *journal_section(story),
    ]
    return page(story.name, "Fresco timeline", lead(story), facts, sections, "Made by fresco timeline.")


def _present(story: Story, link: Link) -> list[str]:
    if _now(story) is None:
        return []
    return [section("How the champion came about", "From what arrived to what serves.", _chain(story, link))]


def _everything(story: Story) -> list[str]:
    if not story.entries:
        return []
    return [section("Everything, in time", "All times are UTC.", draw_lanes(story), notes_of(story))]


def lead(story: Story) -> str:
    """Who serves, what the loop did, what the monitor said last."""
    champion = _now(story)
    told = []
    if champion is not None and champion.version is not None:
        told.append(f"Version {champion.version} serves since {when(champion.since)}.")
    else:
        told.append("No champion so far.")
    if story.cycles:
        counts = Counter(OUTCOMES[cycle.decision][0] for cycle in story.cycles if cycle.decision in OUTCOMES)
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
        at_work = sum(not cycle.decision for cycle in story.cycles)
        outcomes += f"{', ' if outcomes else ''}{at_work} at work" if at_work else ""
        told.append(f"{counted(len(story.cycles), 'cycle')}: {outcomes}.")
    back = sum(reign.event == "rollback" for reign in story.reigns)
    if back:
        told.append(f"{counted(back, 'rollback')}.")
    if story.looks:
        last = story.looks[-1]
        told.append(f"The monitor's last word, {when(last.time)}: {last.verdict.replace('_', ' ')}.")
    return " ".join(told)


def notes_of(story: Story) -> str:
    """What the marks mean, for the lanes that are there, behind a line to click."""
    there = {
        "served": story.reigns,
        "gate": story.judgements,
        "cycles": story.cycles,
        "triggers": story.waits or story.cycles,
        "monitor": story.looks,
        "data": story.datasets,
    }
    explained = notes({name: text for name, text in EXPLAINED.items() if there[name]})
    return f"<details><summary>What the marks mean</summary>{explained}</details>"


def _now(story: Story) -> Reign | None:
    return next((reign for reign in reversed(story.reigns) if reign.until is None and reign.version), None)


def _chain(story: Story, link: Link) -> str:
    """Arrivals, data, run, decision, champion: what the journal knows of each."""
    reign = _now(story)
    assert reign is not None
    made = next((one for one in reversed(story.judgements) if one.version == reign.version), None)
    run_id, data_id = reign.run_id or (made.run_id if made else ""), reign.dataset or (made.dataset if made else "")
    data = next((one for one in story.datasets if one.id == data_id), None)
    cycle = next((one for one in reversed(story.cycles) if run_id and one.run_id == run_id), None)
    links = []
    if cycle is not None:
        links.append(("trigger", cycle.id, "; ".join(cycle.trigger), ""))
    if data is not None and data.parent:
        added = "arrivals" if data.added is None else counted(data.added, "arrival")
        links.append(("arrivals", added, f"added to {data.parent}", ""))
    if data_id:
        links.append(("dataset", data_id, f"{data.images} pictures" if data and data.images else "", ""))
    if run_id:
        train = cycle.stages.get("train") if cycle else None
        links.append(("run", run_id, f"trained in {lasting(train.seconds)}" if train and train.seconds else "", ""))
    if made is not None:
        word = OUTCOMES.get(made.decision, (made.decision, ""))[0]
        links.append(
            ("decision", f"{word}{' by force' if made.forced else ''}", deciding(made.reasons), link(made.report))
        )
    links.append(("champion", f"version {reign.version}", f"since {when(reign.since)}", ""))
    boxes = "".join(
        f'<li><span class="name">{escape(name)}</span><b>{linked(value, href)}</b>'
        f"<small>{escape(short(detail))}</small></li>"
        for name, value, detail, href in links
    )
    return f'<ol class="chain">{boxes}</ol>'


def _drift(story: Story, link: Link) -> list[str]:
    if not story.looks:
        return []
    names = list(dict.fromkeys(name for look in story.looks for name in look.streams))
    drawn = []
    for name in names:
        points = points_of(story.looks, name)
        if points:
            last = points[-1][1]
            told = f"last: {figure(last.effect)}, p = {figure(last.p_value)} at level {figure(last.threshold)}"
            drawn.append(plot(name.capitalize(), told, plot_effects(points, story.reigns)))
    last_look = story.looks[-1]
    verdict, words = last_look.verdict.replace("_", " "), "; ".join(last_look.reasons) or "no reasons given"
    said = f"<p>{escape(when(last_look.time))}: <b>{escape(verdict)}</b>. {escape(short(words))}</p>"
    reports = [(look, href) for look in reversed(story.looks[-MOST_REPORTS:]) if (href := link(look.report))][:6]
    shown = " · ".join(linked(f"{when(look.time)} ({look.verdict.replace('_', ' ')})", href) for look, href in reports)
    note = (
        "Effect of each look, by stream; large points were called drift, which needs a p-value below the level too;"
        " dotted lines are new champions."
    )
    below = f"<p>Reports: {shown}</p>" if shown else ""
    return [f'<div id="monitor">{section("Drift", note, plots(drawn), said, below)}</div>']
