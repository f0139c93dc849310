"""The timeline's tables: decisions of the gate, who served when, dataset versions, and the journal in short."""

from collections.abc import Sequence
from html import escape

from components.report import section
from components.story import Story
from components.timeline_words import OUTCOMES, Link, counted, deciding, lasting, left_out, linked, short, when

MOST_ROWS, MOST_ENTRIES = 60, 200
MADE_BY = {"promote": "promoted", "rollback": "rolled back to", "champion_found": "found in the registry"}


def gate_section(story: Story, link: Link) -> list[str]:
    """Every decision about a candidate, newest first."""
    if not story.judgements:
        return []
    rows = []
    for one in story.judgements[: -MOST_ROWS - 1 : -1]:
        word, kind = OUTCOMES.get(one.decision, (one.decision, ""))
        rows.append(
            [
                f"version {one.version}<small>{escape(one.run_id)}</small>",
                escape(when(one.time)),
                f'<span class="{kind}">{escape(word)}{" by force" if one.forced else ""}</span>',
                reasons_cell(one.reasons),
                linked("report", link(one.report)) if link(one.report) else "",
            ]
        )
    body = table(["candidate", "when", "decision", "why", ""], rows)
    left = left_out(len(story.judgements) - len(rows), "decisions")
    return [
        f'<div id="gate">{section("The gate", "Every decision about a candidate, newest first.", body, left)}</div>'
    ]


def served_section(story: Story, link: Link) -> list[str]:
    """Every champion, newest first."""
    if not story.reigns:
        return []
    rows = []
    for reign in story.reigns[: -MOST_ROWS - 1 : -1]:
        lasted = "serves now" if reign.until is None else lasting(reign.until - reign.since)
        report = link(reign.report)
        rows.append(
            [
                f"version {reign.version}<small>{escape(reign.run_id)}</small>",
                escape(when(reign.since)),
                escape(lasted),
                escape(MADE_BY.get(reign.event, reign.event)) + (f" · {linked('report', report)}" if report else ""),
                reasons_cell(reign.reasons),
            ]
        )
    body = table(["champion", "since", "for", "how", "why"], rows)
    left = left_out(len(story.reigns) - len(rows), "champions")
    return [f'<div id="served">{section("Who served when", "Newest first.", body, left)}</div>']


def data_section(story: Story) -> list[str]:
    """Every dataset version, newest first."""
    if not story.datasets:
        return []
    rows = []
    for one in story.datasets[: -MOST_ROWS - 1 : -1]:
        added = "" if one.added is None or not one.parent else f"+{one.added}"
        rows.append([escape(one.id), escape(when(one.time)), str(one.images or ""), added, escape(one.parent)])
    body = table(["version", "when", "pictures", "arrivals", "grown from"], rows)
    left = left_out(len(story.datasets) - len(rows), "versions")
    return [f'<div id="data">{section("Data", "Dataset versions, newest first.", body, left)}</div>']


def journal_section(story: Story) -> list[str]:
    """The newest lines, folded, and what was odd about them."""
    if not story.entries:
        return []
    rows = [
        [
            escape(when(entry.time)),
            escape(entry.event.replace("_", " ")),
            f'<span class="told">{escape(short(entry.text))}</span>',
        ]
        for entry in story.entries[: -MOST_ENTRIES - 1 : -1]
    ]
    odd = []
    if story.unread:
        odd.append(f"{counted(story.unread, 'line')} could not be read and are left out.")
    if story.went_back:
        odd.append(f"{counted(story.went_back, 'line')} are older than the line before: a clock went back.")
    left = left_out(len(story.entries) - len(rows), "lines")
    note = f"{counted(story.lines, 'line')} in all, waits in a row as one. {' '.join(odd)}"
    folded = f"<details><summary>The newest {len(rows)}</summary>{table(['when', 'event', ''], rows)}{left}</details>"
    return [f'<div id="journal">{section("The journal", note, folded)}</div>']


def reasons_cell(every: Sequence[str]) -> str:
    """The deciding reason, behind which all of them are folded."""
    first = deciding(every)
    if len(every) < 2:
        return escape(short(first))
    lines = "".join(f"<li>{escape(reason)}</li>" for reason in every)
    return f"<details class='inline'><summary>{escape(short(first))}</summary><ul>{lines}</ul></details>"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="events"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
