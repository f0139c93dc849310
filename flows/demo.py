"""`fresco demo`: the whole story on the built-in data, each verb as a user would run it.

The embedded base has learned one world of drawn emblems and begins as the champion. The demo searches for the recipe
that best teaches it another (outlined hearts and stars in new colours), lets the gate measure the winner and decide
whether it replaces the base, serves the champion, and asks the endpoint for pictures. Then the base draws the same
prompts with the same seeds, and both go into one picture. In the second act the world drifts again, and the standing
loop keeps up (`demo_drift.py`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.artifacts import open_workspace, read_journal
from cluster.registry import CHAMPION
from cluster.reigns import PROMOTE
from cluster.session import local_session
from components.models import embedded_base
from components.sources import EMBLEMS_SCHEME, parse_emblems
from flows import demo_drift, evaluate, generate, prepare, promote, serve, tune
from flows.config import Config
from flows.console import program, say, step
from flows.demo_worlds import draw_pairs
from flows.models import open_registry
from flows.presets import tiny_cpu

PROMPTS = (
    "an outline of a large crimson heart on a mint background",
    "three small outlined navy stars on a lemon background",
    "a large outlined magenta arrow in the top left on a lavender background",
    "two big outlined teal crescents on a salmon background",
    "a small outlined gold star in the bottom right on a mint background",
    "a large outlined indigo square on a lemon background",
    "two little outlined brown hearts on a lavender background",
    "a big outlined olive triangle in the top right on a salmon background",
)
SEED = 7
RECIPE = ("data", "model", "train", "search", "evaluate", "gate")
"""Sections that decide what comes of the story."""


def run(config: Config, stop: bool = False) -> dict[str, Any]:
    """Run the story; `stop` ends the endpoint afterwards, otherwise it goes on answering.

    UnmetError where the demo's own recipe did not come to what it promises; with another recipe that is told alone.
    """
    workspace = open_workspace(config.workspace)
    stages: list[dict[str, Any]] = []
    world = parse_emblems(config.data.source) if config.data.source.startswith(EMBLEMS_SCHEME) else None

    @contextmanager
    def stage(name: str, told: str) -> Iterator[None]:
        step(f"demo: {told}")
        began = time.monotonic()
        yield
        stages.append({"name": name, "seconds": round(time.monotonic() - began, 1)})

    with local_session(config.placement):
        with stage("prepare", "draw, validate, split and encode captioned pictures of a world the base never saw"):
            prepare.run(config)
        with stage("champion", "make the base the first champion: what comes has to beat it"):
            if open_registry(config).by_alias(config.name, CHAMPION) is None:
                promote.run(config, str(embedded_base()))
        with stage("tune", f"search rates and freezing plans: {config.search.trials} trials, the best one to its end"):
            tuned = tune.run(config)
        best = tuned["best"]["run_id"]
        with stage("promote", "measure the winner beside the champion, and let the gate decide which one serves"):
            promoted = _judged(config, best) or promote.run(config, best)
    second: dict[str, Any] | None = None
    try:
        with stage("serve", "serve the champion over HTTP"):
            served = serve.run(config, detach=True)
        with stage("generate", "ask the endpoint for pictures, and the base for the same prompts and seeds"):
            folder = workspace.root / "pictures"
            after = generate.run(config, PROMPTS, str(folder / "champion"), generate.Wish(seed=SEED))
            before = generate.run(config, PROMPTS, str(folder / "base"), generate.Wish(seed=SEED), str(embedded_base()))
            grid = folder / "before-after.png"
            draw_pairs(before["files"], after["files"], PROMPTS, ("base", f"version {after['model_version']}")).save(
                grid
            )
        if world is not None and promoted["decision"] != "promote":
            say(
                "the gate did not let the winner through, so there is no champion whose data could drift: no second act"
            )
        elif world is not None:
            second = demo_drift.drift(config, world, promoted["champion"], served["url"], stage)
    finally:
        if stop:  # also when this process is told to end
            serve.run(config, stop=True)
    found = {
        "champion": second["champion"] if second else promoted["champion"],
        "decision": promoted["decision"],
        "url": served["url"],
        "pictures": [*after["files"], *before["files"]],
        "grid": str(grid),
        "search_report": tuned["report"],
        "report": promoted["evaluation"],
        "decision_report": promoted["report"],
        "drift": second,
        "promises": demo_drift.promises(second) if world is not None else [],
        "stages": stages,
    }
    _farewell(config, found, promoted["scorecard"], stop)
    if is_own(config):
        demo_drift.check(found["promises"])
    return found


def is_own(config: Config) -> bool:
    """Whether the recipe is the demo's own: fewer steps or other pictures cannot be expected to come to the same."""
    return all(getattr(config, section) == getattr(tiny_cpu(), section) for section in RECIPE)


def plan(config: Config) -> list[str]:
    """Return the steps of the story; touches nothing."""
    rest = "promote the winner if the gate lets it through, serve --detach, generate 8 prompts"
    steps = [*prepare.plan(config), "promote the base as the first champion", *tune.plan(config), rest]
    return [*steps, *(demo_drift.plan() if config.data.source.startswith(EMBLEMS_SCHEME) else [])]


def _judged(config: Config, run_id: str) -> dict[str, Any] | None:
    """What the gate said of a run when this demo ran before; asked again, it would compare with a later champion."""
    lines = read_journal(open_workspace(config.workspace))
    told = [line for line in lines if line["event"] == PROMOTE and line.get("run_id") == run_id and "decision" in line]
    if not told:
        return None
    say(f"run {run_id} was judged at {told[-1]['time']}: {told[-1]['decision']}, nothing to do")
    return {**told[-1], "scorecard": evaluate.run(config, run_id)["scorecard"]}


def _farewell(config: Config, found: dict[str, Any], scorecard: dict[str, Any], stopped: bool) -> None:
    step("demo: done")
    adherence = scorecard.get("prompt_adherence")
    if adherence is not None:
        say(
            f"prompt adherence on new captions: {adherence['value']:.0%}"
            f" ({adherence['low']:.0%} to {adherence['high']:.0%}, {adherence['n']} pictures)"
        )
    where = "" if config.workspace == Config().workspace else f" --workspace {config.workspace}"
    url = found["url"]
    say(f"before and after: {found['grid']}")
    say(f"the search:       {found['search_report']}")
    say(f"the comparison:   {found['report']}")
    say(f"the decision:     {found['decision_report']}")
    if found["drift"]:
        demo_drift.tell(found["drift"])
    for one in found["promises"]:
        said = "as expected" if one["met"] else "NOT AS EXPECTED"
        say(f"{said}: {one['what']}: {one['found']} (expected {one['expected']})")
    say(f"champion:         models:/{config.name}/{found['champion']}")
    if stopped:
        say(f"playground:       {url} (ended with the story)")
        say(f"next, to open it: {program()} serve --detach{where}, or in the repository: make demo KEEP=1")
        return
    say(f"playground:       {url}")
    say(
        f"  curl -s {url}/v1/images/generations -H 'Content-Type: application/json'"
        f' -d \'{{"prompt": "{PROMPTS[0]}", "seed": {SEED}}}\''
    )
    say(f"next: {program()} generate 'three outlined crimson hearts on a mint background'{where}")
    say(f"to end the endpoint: {program()} serve --stop{where}")
