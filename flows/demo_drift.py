"""The demo's second act: the world drifts, and the standing loop keeps up while a client goes on asking.

Pictures of a new world (another shape, another palette) arrive in a folder. The monitor says that they have drifted,
the loop grows the champion's data, continues the champion with replay of what it knows, lets the gate decide, and the
endpoint swaps. Before and after, both worlds' words are asked for with the same seeds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from cluster.artifacts import open_workspace, read_json, write_json_atomic
from cluster.errors import EndpointError
from components.sources import EmblemSource
from flows import generate, monitor, retrain, timeline
from flows.config import Config, with_overrides
from flows.console import say
from flows.demo_client import Client
from flows.demo_worlds import adherence, captions_of, draw_pairs, write_world

NEW_WORLD = "village"
PROMPTS = (
    "a large outlined coral house on a cream background",
    "three small outlined cobalt houses on a glacier background",
    "a large outlined plum diamond in the top left on a cream background",
    "two big outlined pine houses on a glacier background",
    "a small outlined coral triangle in the bottom right on a glacier background",
    "two little outlined plum diamonds on a cream background",
)
SEED = 7
ARRIVALS = 0.4
"""Pictures that arrive, as a share of those that the champion was made of."""
PROBES = 2.5
"""Captions of each world that both champions are asked for, as a multiple of evaluate.prompts."""
LOOP = {
    # The demo's files are whole when the monitor looks, and nobody wants to wait for the next night.
    "monitor.settle_s": 0.0,
    "retrain.cooldown_s": 0.0,
    "retrain.watch_s": 20.0,
    # The embedded CLIP was not trained on these words, and 64 prompts tell its score to 3 points.
    "gate.max_clip_drop": 5.0,
    "retrain.replay_fraction": 0.5,
    "retrain.most_replay_fraction": 0.5,
}
DONE = "demo-drift.json"
LEAST_NEW, MOST_LOST = 0.7, 0.03
"""Shares of pictures: those that show the new words in the end, and those fewer than before that show the old ones."""
Stage = Callable[[str, str], AbstractContextManager[None]]


class UnmetError(RuntimeError):
    """The demo ran to its end, and what came of it is not what it promises."""

    exit_code = 1


def drift(config: Config, old: EmblemSource, champion: int, url: str, stage: Stage) -> dict[str, Any]:
    """Let the world drift and the loop answer; `champion` serves at `url`, what it knows is the world `old`.

    EndpointError when a single request of the client failed.
    """
    workspace = open_workspace(config.workspace)
    incoming = workspace.root / "incoming"
    config = with_overrides(config, {**LOOP, "data.source": str(incoming)})
    known: dict[str, Any] | None = read_json(workspace.reports / DONE)
    if known is not None:
        say(f"the world drifted before, and version {known['champion']} answered it: nothing to do")
        return known
    probes = round(PROBES * config.evaluate.prompts)
    arriving = EmblemSource(NEW_WORLD, round(ARRIVALS * old.count), seed=old.seed + 1)
    with stage("drift", f"{arriving.count} pictures with another shape and other colours arrive; the monitor looks"):
        write_world(incoming, arriving)
        seen = monitor.run(config)
    told = "the loop: grow the data, continue the champion with replay, gate, swap, watch"
    with Client(url, captions_of(old.world, 50)) as client, stage("retrain", told):
        cycle = retrain.run(config, once=True)
    after = cycle["champion_after"] or champion
    with stage("words", f"ask champions {champion} and {after} for {probes} captions of either world"):
        words = {
            name: {
                when: adherence(config, f"models:/{config.name}/{version}", world, probes)
                for when, version in (("before", champion), ("after", after))
            }
            for name, world in (("new", NEW_WORLD), ("old", old.world))
        }
        folder, wish = workspace.root / "pictures" / "drift", generate.Wish(seed=SEED)
        former = generate.run(config, PROMPTS, str(folder / "before"), wish, f"models:/{config.name}/{champion}")
        drawn = generate.run(config, PROMPTS, str(folder / "after"), wish)
        names = (f"version {champion}", f"version {drawn['model_version']}")
        draw_pairs(former["files"], drawn["files"], PROMPTS, names).save(folder / "before-after.png")
        story = timeline.run(config)
    found = {
        "verdict": seen["verdict"],
        "monitor_report": seen["report"],
        "cycle": {  # a loop that waits has none, and says why it waits
            "cycle": cycle.get("cycle"),
            "decision": cycle["decision"],
            "reasons": cycle.get("reasons", cycle["trigger"]["reasons"]),
        },
        "champion": after,
        "client": client.numbers,
        "words": {name: {when: vars(one) for when, one in pair.items()} for name, pair in words.items()},
        "pictures": drawn["files"],
        "grid": str(folder / "before-after.png"),
        "timeline": story["report"],
    }
    if client.failures:
        raise EndpointError(
            f"the client expected every one of {client.requests} requests to be answered, found {len(client.failures)}"
            f" failed, the first with: {client.failures[0]}"
        )
    write_json_atomic(workspace.reports / DONE, found)
    return found


def plan() -> list[str]:
    """Return the steps of the act."""
    return [
        f"write pictures of the world {NEW_WORLD} into the folder, {ARRIVALS:.0%} of those that are there; monitor",
        "retrain --once while a client keeps asking",
        "ask both champions for the same captions of either world; timeline",
    ]


def promises(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What the second act promises beside what came of it: {what, expected, found, met}.

    `found` is what `drift` returned, None where the gate refused the first act's winner: there is no second act then.
    """
    if found is None:
        missing = "no second act: the gate refused the search's winner"
        return [{"what": "the loop's cycle", "expected": "promoted", "found": missing, "met": False}]
    new, old, client = found["words"]["new"], found["words"]["old"], found["client"]
    shown, lost = new["after"]["value"], old["before"]["value"] - old["after"]["value"]
    lines = [
        ("the monitor", "drift", found["verdict"], found["verdict"] == "drift"),
        ("the loop's cycle", "promoted", found["cycle"]["decision"], found["cycle"]["decision"] == "promoted"),
        ("new words shown", f"at least {LEAST_NEW:.0%}", f"{shown:.1%}", shown >= LEAST_NEW),
        ("old words lost", f"at most {MOST_LOST:.0%}", f"{lost:.1%}", round(lost, 6) <= MOST_LOST),
        ("failed requests", f"none of {client['requests']}", str(client["failed"]), client["failed"] == 0),
    ]
    return [dict(zip(("what", "expected", "found", "met"), line, strict=True)) for line in lines]


def check(kept: list[dict[str, Any]]) -> None:
    """UnmetError, in one line, where a promise was not kept."""
    broken = [f"{one['what']} {one['expected']}, found {one['found']}" for one in kept if not one["met"]]
    if broken:
        raise UnmetError(f"the demo expected {'; '.join(broken)}; its reports, named above, say more")


def tell(found: dict[str, Any]) -> None:
    """Say what the act came to."""
    for name, pair in found["words"].items():
        before, after = pair["before"], pair["after"]
        say(
            f"{name} words shown:  {before['value']:.0%} before, {after['value']:.0%} after"
            f" ({after['low']:.0%} to {after['high']:.0%}, {after['n']} pictures)"
        )
    client = found["client"]
    say(
        f"the client:       {client['requests']} requests while the model changed, {client['failed']} failed, the"
        f" longest took {client['longest_s']:.1f} s; drawn by version: "
        + ", ".join(f"{count} by {version}" for version, count in client["by_version"].items())
    )
    say(f"before and after: {found['grid']}")
    say(f"the drift:        {found['monitor_report']}")
    say(f"the timeline:     {found['timeline']}")
