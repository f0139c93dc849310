"""`fresco demo`: the whole story on the built-in data, each verb as a user would run it.

The embedded base has learned one world of drawn emblems. The demo fine-tunes it on another (outlined hearts and stars
in new colours), measures both, makes the result the champion, serves it, and asks the endpoint for pictures. Then the
base draws the same prompts with the same seeds, and both go into one picture.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from cluster.artifacts import open_workspace
from cluster.session import local_session
from components.models import embedded_base
from components.report import draw_grid
from flows import evaluate, generate, prepare, promote, serve, train
from flows.config import Config
from flows.console import program, say, step

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


def run(config: Config, stop: bool = False) -> dict[str, Any]:
    """Run the story; `stop` ends the endpoint afterwards, otherwise it goes on answering."""
    workspace = open_workspace(config.workspace)
    stages: list[dict[str, Any]] = []

    @contextmanager
    def stage(name: str, told: str) -> Iterator[None]:
        step(f"demo: {told}")
        began = time.monotonic()
        yield
        stages.append({"name": name, "seconds": round(time.monotonic() - began, 1)})

    with local_session(config.placement):
        with stage("prepare", "draw, validate, split and encode captioned pictures of a world the base never saw"):
            prepare.run(config)
        with stage("train", f"fine-tune the base for {config.train.steps} steps on {config.placement.workers} workers"):
            trained = train.run(config)
    with stage("evaluate", "measure the fine-tuned model and the base on test captions"):
        evaluated = evaluate.run(config, trained["run_id"])
    with stage("promote", "register it and make it the champion"):
        promoted = promote.run(config, trained["run_id"])
    with stage("serve", "serve the champion over HTTP"):
        served = serve.run(config, detach=True)
    with stage("generate", "ask the endpoint for pictures, and the base for the same prompts and seeds"):
        folder = workspace.root / "pictures"
        after = generate.run(config, PROMPTS, str(folder / "champion"), generate.Wish(seed=SEED))
        before = generate.run(config, PROMPTS, str(folder / "base"), generate.Wish(seed=SEED), str(embedded_base()))
    grid = folder / "before-after.png"
    pairs = [
        [Image.open(first).convert("RGB"), Image.open(second).convert("RGB")]
        for first, second in zip(before["files"], after["files"], strict=True)
    ]
    version = promoted["version"]
    draw_grid(pairs, PROMPTS, ("base", f"version {version}")).save(grid)
    if stop:
        serve.run(config, stop=True)
    _farewell(config, served["url"], grid, str(version), evaluated, stop)
    return {
        "champion": version,
        "url": served["url"],
        "pictures": [*after["files"], *before["files"]],
        "grid": str(grid),
        "report": evaluated["report"],
        "stages": stages,
    }


def plan(config: Config) -> list[str]:
    """Return the steps of the story; touches nothing."""
    return [*prepare.plan(config), *train.plan(config), "evaluate, promote, serve --detach, generate 8 prompts"]


def _farewell(config: Config, url: str, grid: Path, version: str, evaluated: dict[str, Any], stopped: bool) -> None:
    adherence = evaluated["scorecard"].get("prompt_adherence")
    step("demo: done")
    if adherence is not None:
        say(
            f"prompt adherence on new captions: {adherence['value']:.0%}"
            f" ({adherence['low']:.0%} to {adherence['high']:.0%}, {adherence['n']} pictures)"
        )
    where = "" if config.workspace == Config().workspace else f" --workspace {config.workspace}"
    say(f"before and after: {grid}")
    say(f"report:           {evaluated['report']}")
    say(f"champion:         models:/{config.name}/{version}")
    if stopped:
        say(f"the endpoint {url} was ended\nnext: {program()} serve{where}")
        return
    say(f"endpoint:         {url}")
    say(
        f"  curl -s {url}/v1/images/generations -H 'Content-Type: application/json'"
        f' -d \'{{"prompt": "{PROMPTS[0]}", "seed": {SEED}}}\''
    )
    say(f"next: {program()} generate 'three outlined crimson hearts on a mint background'{where}")
    say(f"to end the endpoint: {program()} serve --stop{where}")
