"""Does the endpoint stay right while everything happens to it? `make soak` (10 minutes, or `--minutes`).

Poisson load on `fresco serve` with two replicas, of which a tenth hangs up; the champion moves 20 times between three
versions; a replica is ended with SIGKILL every minute. Afterwards pictures are drawn again by the sampler from the
version and seed that their answers name, and every request's story is judged (`soak_checks`). Exit code 1 when a claim
does not hold, or when the endpoint does not offer what a claim is about: that is printed, not left out.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serve_endpoint import Running, promote, register_copies, replicas, resident_bytes, served
from benchmarks.serve_requests import largest_difference, plan_requests, rows_of
from benchmarks.soak_checks import MOST_DIFFERENCE, Check, Kill, Log, Sample, Swap, judge, summary
from benchmarks.soak_traffic import Story, send_traffic
from cluster.metric_files import EVERY_S
from cluster.placement import ServeSection
from cluster.serving import APPLICATION
from cluster.signals import ended_by_signals
from components.models import load_parts
from components.sampler import draw
from components.signing_key import read_public_keys
from flows.config import Config
from flows.console import say, step
from flows.models import open_registry

COPIES = (0, 1, 2)
"""The base and two perturbed copies of it."""
RUDE_SHARE = 0.1
DRAWN_AGAIN = 90
SAMPLE_EVERY_S = 5.0
BACK_LIMIT_S = 90.0
POLL_S = 0.25
ASK_LIMIT_S = 10.0
END_LIMIT_S = 20.0


@dataclass(frozen=True)
class Plan:
    """How long, and how much happens."""

    seconds: float
    swaps: int
    kill_every_s: float
    rate_per_s: float
    replicas: int
    seed: int


def main() -> int:
    """Serve, disturb, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--kill-every-s", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second; fewer than the machine can draw")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    plan = Plan(60 * asked.minutes, asked.swaps, asked.kill_every_s, asked.rate, asked.replicas, asked.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(prefix="fresco-soak-") as folder:
        settings = ServeSection(max_queue=256, min_replicas=plan.replicas, max_replicas=plan.replicas)
        config = Config(workspace=str(Path(folder) / "workspace"), serve=settings)
        step("registering three versions and starting the endpoint")
        versions = register_copies(config, COPIES)
        with served(config) as running:
            log = asyncio.run(disturb(config, running, plan, list(versions)))
            alive = psutil.Process(running.pid).children(recursive=True)
        keys = read_public_keys(Path(config.workspace) / "keys")
        left_behind = len(psutil.wait_procs(alive, END_LIMIT_S)[1])
        print("\n| the run | |\n|---|---|")
        for name, value in summary(log).items():
            print(f"| {name} | {value} |", flush=True)
        step("drawing a sample of the pictures again")
        redrawn = draw_again(log.stories, versions, plan.seed)
    return 0 if show(judge(log, redrawn, keys, left_behind)) else 1


async def disturb(config: Config, running: Running, plan: Plan, versions: Sequence[int]) -> Log:
    """Send the load; swap, kill and watch beside it until every request has its end."""
    log = Log(replicas=plan.replicas)
    arrivals = plan_requests(max(1, round(plan.seconds * plan.rate_per_s)), plan.rate_per_s, plan.seed)
    arrivals = [arrival for arrival in arrivals if arrival.due_s < plan.seconds]
    step(f"{plan.seconds / 60:g} minutes: {len(arrivals)} requests, {plan.swaps} swaps")
    around = [
        asyncio.create_task(swap_champions(config, plan, versions, log)),
        asyncio.create_task(kill_replicas(running, plan, log)),
    ]
    watching = asyncio.create_task(watch_memory(running, log))
    try:
        await send_traffic(running.url, arrivals, RUDE_SHARE, plan.seed, log.stories)
        await asyncio.gather(*around)
        if watching.done():
            watching.result()  # it ends by an error only
        log.rows_left = await asyncio.to_thread(rows_at_work, running.url)
    finally:
        for task in (*around, watching):
            task.cancel()
    return log


async def swap_champions(config: Config, plan: Plan, versions: Sequence[int], log: Log) -> None:
    """Move the champion through the versions, evenly over the whole time."""
    start = time.monotonic()
    for number in range(plan.swaps):
        await asyncio.sleep(max(0.0, start + plan.seconds * (number + 1) / (plan.swaps + 1) - time.monotonic()))
        version = versions[(number + 1) % len(versions)]
        # A thread has a connection to the registry's database of its own.
        await asyncio.to_thread(lambda version=version: promote(open_registry(config), config, version))
        log.swaps.append(Swap(time.monotonic(), version))
        say(f"  champion is version {version} now (swap {number + 1} of {plan.swaps})")


async def kill_replicas(running: Running, plan: Plan, log: Log) -> None:
    """End a replica every so often; the last one long enough before the end that it can come back."""
    start, number, chance = time.monotonic(), 1, random.Random(plan.seed)
    while plan.kill_every_s > 0 and number * plan.kill_every_s < plan.seconds - plan.kill_every_s / 3:
        await asyncio.sleep(max(0.0, start + number * plan.kill_every_s - time.monotonic()))
        number += 1
        known = await asyncio.to_thread(ready_replicas, running.url)
        if len(known) < plan.replicas:
            raise RuntimeError(f"{plan.replicas} ready replicas expected before a kill, found {sorted(known)}")
        victim = chance.choice(replicas(running.pid, APPLICATION))
        at = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        back = await _replaced(running.url, known, at)
        log.kills.append(Kill(at, back))
        say(f"  replica killed, {'not replaced' if back is None else f'replaced after {back - at:.1f} s'}")


async def _replaced(url: str, known: set[str], killed_at: float) -> float | None:
    """Wait for a replica that was not there before and has drawn."""
    while time.monotonic() - killed_at < BACK_LIMIT_S:
        if known and await asyncio.to_thread(ready_replicas, url) - known:
            return time.monotonic()
        await asyncio.sleep(POLL_S)
    return None


def ready_replicas(url: str) -> set[str]:
    """Return the names of the replicas that say in the endpoint's metrics that they are ready."""
    return {sample.labels["replica"] for sample in scrape(url, "fresco_ready") if sample.value == 1}


def rows_at_work(url: str) -> float | None:
    """Return how many rows are drawn or wait, None when nobody tells; replicas write theirs down every few seconds."""
    time.sleep(2 * EVERY_S)
    found = [sample.value for name in ("fresco_live_rows", "fresco_waiting_rows") for sample in scrape(url, name)]
    return sum(found) if found else None


def scrape(url: str, name: str) -> list[Any]:
    """Return the samples of one family of the endpoint's metrics, none when it does not answer."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=ASK_LIMIT_S, trust_env=False).text
    except httpx.HTTPError:
        return []
    return [s for family in text_string_to_metric_families(text) if family.name == name for s in family.samples]


async def watch_memory(running: Running, log: Log) -> None:
    """Keep the resident memory of the replicas and of all other processes of the endpoint, every few seconds."""
    while True:
        with suppress(psutil.NoSuchProcess):
            serving = psutil.Process(running.pid)
            drawing = replicas(running.pid, APPLICATION)
            ray = [process for process in serving.children(recursive=True) if process not in drawing]
            others = {"fresco serve": resident_bytes([serving]) / 2**20, "Ray": resident_bytes(ray) / 2**20}
            log.samples.append(Sample(time.monotonic(), resident_bytes(drawing) / 2**20, others))
        await asyncio.sleep(SAMPLE_EVERY_S)


def draw_again(stories: Sequence[Story], versions: Mapping[int, Path], seed: int) -> list[int]:
    """Return the largest difference of each sampled answer to what the sampler draws from its version and seed.

    Also shows that the comparison could fail: another version draws other pictures.
    """
    drawn = [story for story in stories if story.drawn and story.form != "edit"]
    chosen = random.Random(seed).sample(drawn, min(DRAWN_AGAIN, len(drawn)))
    parts = {version: load_parts(directory) for version, directory in versions.items()}
    differences, alike = [], 0
    for story in chosen:
        if story.version not in parts:
            differences.append(255)
            continue
        rows = rows_of(story.body)
        differences.append(largest_difference(story.pictures, draw(parts[story.version], rows)))
        another = next(version for version in parts if version != story.version)
        alike += largest_difference(story.pictures, draw(parts[another], rows)) <= MOST_DIFFERENCE
    if alike:
        raise RuntimeError(f"versions expected to draw different pictures, found {alike} alike; perturb them more")
    return differences


def show(checks: Sequence[Check]) -> bool:
    """Print what held; whether everything did."""
    print("\n| claim | found | |\n|---|---|---|")
    words = {True: "held", False: "broken", None: "not shown"}
    for check in checks:
        print(f"| {check.claim} | {check.found} | {words[check.held]} |")
    return all(check.held is True for check in checks)


if __name__ == "__main__":
    with ended_by_signals():
        sys.exit(main())
