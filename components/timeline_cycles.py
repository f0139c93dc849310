"""The timeline's cycles: why each began, how long its stages took, what came of it, what it made."""

from html import escape

from components.report import section
from components.story import Cycle, Stage, Story
from components.timeline_words import OUTCOMES, Link, lasting, left_out, linked, short, when

MOST_CYCLES = 20
STAGES = ("snapshot", "prepare", "search", "train", "evaluate", "gate", "deploy", "watch")


def cycles_section(story: Story, link: Link) -> list[str]:
    """The newest cycles, newest first; nothing where there was none."""
    if not story.cycles:
        return []
    shown = story.cycles[: -MOST_CYCLES - 1 : -1]
    longest = max([_seconds(cycle) for cycle in shown] + [1.0])
    bodies = [_cycle(cycle, longest, link) for cycle in shown]
    bodies.append(left_out(len(story.cycles) - len(shown), "cycles"))
    names = [name for name in STAGES if any(name in cycle.stages for cycle in shown)]
    legend = "".join(f'<span><i class="s-{name}"></i>{name}</span>' for name in names)
    note = "Newest first. Bars have one scale: their length is the time that the stages took together."
    named = f'<p class="legend">{legend}</p>'
    return [f'<div id="cycles">{section("Cycles", note, named, *bodies)}</div>']


def _seconds(cycle: Cycle) -> float:
    return sum(stage.seconds or 0.0 for stage in cycle.stages.values())


def _cycle(cycle: Cycle, longest: float, link: Link) -> str:
    word, kind = OUTCOMES.get(cycle.decision, (cycle.decision or "at work", "working"))
    parts, left = [], 0.0
    for stage in cycle.stages.values():
        width = 100 * (stage.seconds or 0.0) / longest
        name = stage.name if stage.name in STAGES else "other"
        title = f"<title>{escape(stage.name)}: {escape(lasting(stage.seconds))}</title>"
        parts.append(f'<rect x="{left:.3f}%" width="{width:.3f}%" height="14" class="s-{name}">{title}</rect>')
        left += width
    last = None if cycle.decision else next(reversed(cycle.stages), None)
    told = [_stage_text(stage, link(stage.report), stage.name == last) for stage in cycle.stages.values()]
    made = " → ".join(escape(part) for part in (cycle.dataset, cycle.run_id, _version_of(cycle)) if part)
    why = escape(short("; ".join(cycle.trigger)))
    result = escape(short("; ".join(cycle.reasons[:3])))
    return (
        f'<article class="cycle" id="{escape(cycle.id, quote=True)}">'
        f'<h3>{escape(cycle.id)}<span class="badge {kind}">{escape(word)}</span></h3>'
        f"<small>{when(cycle.began)}{f', {lasting(cycle.ended - cycle.began)}' if cycle.ended else ''}</small>"
        + (f"<p>{why}</p>" if why else "")
        + (f'<svg class="bar" height="14">{"".join(parts)}</svg>' if left else "")
        + (f'<p class="stages">{" · ".join(told)}</p>' if told else "")
        + (f"<p>{result}</p>" if result else "")
        + (f'<p class="made">{made}</p>' if made else "")
        + "</article>"
    )


def _version_of(cycle: Cycle) -> str:
    if cycle.decision == "promoted" and cycle.champion_after is not None:
        before = f" (was {cycle.champion_before})" if cycle.champion_before is not None else ""
        return f"version {cycle.champion_after}{before}"
    return f"version {cycle.champion_after} stays" if cycle.champion_after is not None and cycle.decision else ""


def _stage_text(stage: Stage, href: str, at_work: bool) -> str:
    """A stage that only began is at work while it is the last one of an open cycle; else the journal lost its end."""
    unended = "at work" if at_work else "end not told"
    told = {"began": unended, "failed": "failed"}.get(stage.state, lasting(stage.seconds))
    problem = f': <span class="bad">{escape(short(stage.error))}</span>' if stage.error else ""
    return f"{linked(stage.name, href)} {escape(told)}{problem}"
