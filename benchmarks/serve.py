"""How fast is the endpoint beside diffusers' pipeline behind Ray Serve? `make bench-serve` (about 20 minutes).

Three servers with one replica each, on the embedded base, alive together and asked in turns for images/s and latency,
so that a drifting machine slows all of them alike:

    one-by-one  diffusers' pipeline behind Ray Serve, one request at a time
    grouped     the same with `@serve.batch`, requests of equal steps, guidance and size in one call
    fresco      the endpoint as `fresco serve` makes it

First every server's pictures are compared with diffusers' own. Then: images/s at saturation (closed loop), latency at
70 % of grouped's capacity (open loop, Poisson), what one idle request costs over the bare sampler in this process, and
how the replica's memory moves over 5,000 requests. Every contestant, the bare sampler too, draws with the number of
threads that it found fastest. Exit code 1 when a target is missed. `--quick` tries it out.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import serve_tables
from benchmarks.serve_endpoint import register_copies, replicas, resident_bytes, served
from benchmarks.serve_peers import GENERATIONS_ROUTE, Pipeline, Wanted, served_peers
from benchmarks.serve_requests import (
    ask,
    ask_all,
    largest_difference,
    make_client,
    num_pictures,
    plan_requests,
    rows_of,
)
from benchmarks.serve_requests import slope_per_1000 as slope
from benchmarks.serve_tables import CAPACITY_SHARE, FRESCO, GROUPED, MemoryCourse, Results, Saturation
from cluster.placement import PlacementSection, ServeSection
from cluster.session import local_session
from cluster.signals import ended_by_signals
from components.load_plan import Arrival, latency_percentiles
from components.models import embedded_base, load_parts
from components.sampler import draw
from components.threads import settle_threads
from flows.config import Config
from flows.console import live, say, step
from flows.load import send_all

MAX_QUEUE = 256
"""Wider than all clients together: a refusal would spare fresco work that the peers do."""
REST_S = 0.05
"""Between two idle requests: threads of the one before have stopped spinning."""


@dataclass(frozen=True)
class Size:
    """How much is asked of each server."""

    rounds: int = 2
    requests: int = 150
    clients: int = 48
    latency_rounds: int = 2
    latency_s: float = 60.0
    idle_pairs: int = 60
    memory_requests: int = 8000
    memory_warm_up: int = 3000
    """Left out: Fresco keeps the text states of 1,024 prompts, and until then memory grows on purpose; the pools of the
    allocators fill until about the 2,500th request (`--only-memory` shows it)."""
    memory_every: int = 125
    memory_clients: int = 8


QUICK = Size(1, 24, 16, 1, 10.0, 10, 600, 200, 50)


@dataclass(frozen=True)
class Server:
    """One contestant: where it answers and which process started it."""

    name: str
    url: str
    root_pid: int

    @property
    def address(self) -> str:
        return self.url + GENERATIONS_ROUTE

    @property
    def replica(self) -> psutil.Process:
        (process,) = replicas(self.root_pid, self.name)
        return process

    @property
    def cpu_s(self) -> float:
        """CPU seconds that the replica has used so far."""
        times = self.replica.cpu_times()
        return float(times.user + times.system)


def main() -> int:
    """Start the three servers, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, to see that it runs; targets mean nothing")
    parser.add_argument("--only-memory", action="store_true", help="the replica's memory, from the first request on")
    parser.add_argument("--rounds", type=int, default=Size.rounds, help="of the saturation, for a slower machine")
    asked = parser.parse_args()
    size = QUICK if asked.quick else Size(rounds=asked.rounds)
    began = time.monotonic()
    if asked.only_memory:
        with tempfile.TemporaryDirectory(prefix="fresco-bench-") as folder, fresco_served(Path(folder)) as fresco:
            serve_tables.show_memory(watch_memory(fresco, replace(size, memory_warm_up=size.memory_every)), every=4)
        return 0
    with tempfile.TemporaryDirectory(prefix="fresco-bench-") as folder, ExitStack() as beside:
        # Within the peers: a Ray that was told to end together with this process may take it along.
        peers = beside.enter_context(peers_served())
        with fresco_served(Path(folder)) as fresco:
            servers = {**peers, fresco.name: fresco}
            say("one replica each: " + ", ".join(f"{s.name} at {s.url}" for s in servers.values()))
            differences = check_pictures(servers)
            drawn = saturate(servers, size, presets=False)
            presets = saturate(servers, replace(size, rounds=1), presets=True)
            capacity = statistics.median(drawn.images_per_s[GROUPED])
            latencies = wait_times(servers, size, CAPACITY_SHARE * capacity)
            # Two idle peers and their Ray cost a request beside them 35 ms: what is to be idle must be alone.
            beside.close()
            idle = idle_cost(fresco, size)
            memory = watch_memory(fresco, size)
    results = Results(differences, drawn, presets, CAPACITY_SHARE * capacity, latencies, idle, memory)
    met = serve_tables.show(results)
    print(f"\n{time.monotonic() - began:.0f} s in all, load average {os.getloadavg()[2]:.1f} over the last 15 minutes")
    return 0 if met else 1


@contextmanager
def fresco_served(folder: Path) -> Iterator[Server]:
    """Serve the base as `fresco serve` does, for the length of the block."""
    step("starting the servers")
    config = Config(workspace=str(folder / "workspace"), serve=ServeSection(max_queue=MAX_QUEUE))
    register_copies(config, seeds=[0])
    with served(config) as running:
        yield Server(FRESCO, running.url, running.pid)


@contextmanager
def peers_served() -> Iterator[dict[str, Server]]:
    """Serve the same model in two other ways; each has drawn before this yields."""
    cpus = ServeSection().cpus_per_replica
    room = PlacementSection(workers=1, cpus_per_worker=2 * cpus)
    with local_session(room), served_peers(str(embedded_base()), cpus) as urls:
        yield {name: Server(name, url, os.getpid()) for name, url in urls.items()}


def check_pictures(servers: Mapping[str, Server]) -> dict[str, int]:
    """Compare every server's pictures, asked all at once, with the pipeline's in this process, one by one."""
    step("the same seeds, the same pictures?")
    bodies = [arrival.body for arrival in plan_requests(10, 1.0, seed=5)]
    bodies += [{**body, "seed": body["seed"] + 100, "n": 4} for body in bodies[:2]]
    pipeline = Pipeline(str(embedded_base()))
    expected = [pipeline.draw([Wanted(**body)])[0] for body in bodies]
    differences = {}
    for server in servers.values():
        answers, _ = asyncio.run(ask_all(server.address, bodies, len(bodies)))
        refuse_errors(server, [answer.error for answer in answers])
        pairs = zip(answers, expected, strict=True)
        differences[server.name] = max(largest_difference(answer.pictures, own) for answer, own in pairs)
        say(f"  {server.name}: at most {differences[server.name]} of 255 levels away")
    return differences


def saturate(servers: Mapping[str, Server], size: Size, presets: bool) -> Saturation:
    """Images/s of each server in every round: the same finite list of requests, more clients than it can serve.

    CPU seconds too: they tell on a machine that others use what a clock cannot.
    """
    mix = "two steps, two guidance scales" if presets else "steps 8 to 40, guidance 1 to 7"
    step(f"saturation, {mix}: {size.clients} clients")
    rates: dict[str, list[float]] = {name: [] for name in servers}
    cpu_s: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(size.rounds):
        arrivals = plan_requests(size.requests, 1.0, seed=100 + number, presets=presets)
        for server in servers.values():
            bodies, spent_s = [arrival.body for arrival in arrivals], server.cpu_s
            answers, elapsed_s = asyncio.run(ask_all(server.address, bodies, size.clients))
            refuse_errors(server, [answer.error for answer in answers])
            rates[server.name].append(num_pictures(arrivals) / elapsed_s)
            cpu_s[server.name].append((server.cpu_s - spent_s) / num_pictures(arrivals))
            told = f"{rates[server.name][-1]:.2f} images/s, {cpu_s[server.name][-1]:.3f} CPU s each"
            say(f"  round {number + 1}, {server.name}: {told}")
    return Saturation(rates, cpu_s)


def wait_times(servers: Mapping[str, Server], size: Size, images_per_s: float) -> dict[str, dict[str, Any]]:
    """Latencies at a rate that grouped can sustain: requests arrive when they are due, whoever is still waiting."""
    step(f"latency at {images_per_s:.2f} images/s, {CAPACITY_SHARE:.0%} of what {GROUPED} can draw")
    found: dict[str, list[float]] = {name: [] for name in servers}
    late: dict[str, float] = dict.fromkeys(servers, 0.0)
    for number in range(size.latency_rounds):
        arrivals = arrivals_at(images_per_s, size.latency_s, seed=200 + number)
        for server in servers.values():
            outcomes = asyncio.run(send_all(server.address, arrivals, 120.0, {}))
            refuse_errors(server, [outcome.error for outcome in outcomes])
            found[server.name] += [outcome.latency_s for outcome in outcomes]
            late[server.name] = max(late[server.name], *(outcome.late_s for outcome in outcomes))
            so_far = latency_percentiles(found[server.name])
            say(f"  round {number + 1}, {server.name}: median {so_far['p50']:.2f} s, p95 {so_far['p95']:.2f} s so far")
    return {
        name: {**latency_percentiles(found[name]), "requests": len(found[name]), "late": late[name]} for name in found
    }


def arrivals_at(images_per_s: float, duration_s: float, seed: int) -> list[Arrival]:
    """Draw Poisson requests that ask for so many pictures a second on average, and stretch them to just that."""
    guess = plan_requests(max(8, int(images_per_s * duration_s / 1.18)), 1.0, seed)
    stretch = num_pictures(guess) / images_per_s / guess[-1].due_s
    return [replace(arrival, due_s=arrival.due_s * stretch) for arrival in guess]


def idle_cost(server: Server, size: Size) -> dict[str, float]:
    """Seconds of one request alone, of the bare sampler in this process (medians), and of their difference."""
    step("one idle request, beside the sampler in this process")
    parts = load_parts(embedded_base())
    body = {**plan_requests(1, 1.0, seed=3)[0].body, "n": 1, "steps": 20, "guidance_scale": 3.0}
    settle_threads(lambda: draw(parts, rows_of(body)), len(os.sched_getaffinity(0)))
    bare, asked = [], []

    async def take_turns() -> None:
        async with make_client() as client:
            for number in range(size.idle_pairs + 5):
                # Other texts each time: the endpoint keeps the states of those it has seen.
                texts = {"prompt": f"{body['prompt']} {number}", "negative_prompt": f"a square {number}"}
                mine = {**body, "seed": number, **texts}
                await asyncio.sleep(REST_S)
                start = time.perf_counter()
                draw(parts, rows_of(mine))
                bare.append(time.perf_counter() - start)
                await asyncio.sleep(REST_S)
                answer = await ask(client, server.address, mine)
                refuse_errors(server, [answer.error])
                asked.append(answer.latency_s)

    asyncio.run(take_turns())
    pairs = list(zip(bare[5:], asked[5:], strict=True))  # the first five warm up both
    cost = statistics.median(latency_s - draw_s for draw_s, latency_s in pairs)
    bare_s, asked_s = (statistics.median(values) for values in zip(*pairs, strict=True))
    # The fastest tenth of each was disturbed least by whatever else the machine does.
    fast_bare_s, fast_asked_s = (sorted(values)[len(pairs) // 10] for values in zip(*pairs, strict=True))
    say(f"  sampler {1000 * bare_s:.1f} ms, request {1000 * asked_s:.1f} ms, median difference {1000 * cost:.1f} ms")
    return {"sampler": bare_s, "request": asked_s, "cost": cost, "fastest": fast_asked_s - fast_bare_s}


def watch_memory(server: Server, size: Size) -> MemoryCourse:
    """Resident memory of the replica over many small requests, each with its own prompt."""
    step(f"memory over {size.memory_requests} requests of 1 or 2 steps")
    counts, mib = [], []
    replica = server.replica

    def notify(done: int) -> None:
        if done % size.memory_every == 0 and done >= size.memory_warm_up:
            counts.append(done)
            mib.append(resident_bytes([replica]) / 2**20)
            live(f"  {done} of {size.memory_requests}: {mib[-1]:.0f} MiB")

    bodies = [
        {**arrival.body, "prompt": f"{arrival.body['prompt']} {number}", "steps": 1 + number % 2, "n": 1}
        for number, arrival in enumerate(plan_requests(size.memory_requests, 100.0, seed=4))
    ]
    answers, elapsed_s = asyncio.run(ask_all(server.address, bodies, size.memory_clients, notify))
    live("")
    refuse_errors(server, [answer.error for answer in answers])
    course = MemoryCourse(counts, mib, slope(counts, mib), len(bodies) / elapsed_s)
    say(f"  {mib[0]:.1f} MiB after {counts[0]}, {mib[-1]:.1f} MiB after {counts[-1]}, {course.requests_per_s:.0f}/s")
    return course


def refuse_errors(server: Server, errors: Sequence[str]) -> None:
    """A benchmark of refusals is none."""
    found = sorted({error for error in errors if error})
    if found:
        raise RuntimeError(f"{server.name} expected to draw every request, found {len(found)} kinds of errors: {found}")


if __name__ == "__main__":
    with ended_by_signals():
        sys.exit(main())
