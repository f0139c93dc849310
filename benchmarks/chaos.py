"""Is the loop safe to kill? `make chaos`: SIGKILL at random moments of full cycles, then everything is compared.

`fresco retrain --once` runs on a tiny world where emblems arrive. One workspace is left in peace; in the other the
command is killed with everything it started, at moments drawn from a seed, and given again, until the kills are spent
and the cycle at hand is over. Half of the moments are drawn over the length of a whole cycle; half fall into the first
second and a half of a stage that is drawn, or they would seldom meet the short ones. Now and then two commands are
started at once: one works, the other has to leave. Both workspaces must then agree: dataset versions, decisions,
champion and its weights, aliases, tags, the loop's memory, every line of the journal in its order (looks that wait
aside); and no two processes ever held one token of the lease. Exit code 1 when something differs.

    python -m benchmarks.chaos [--kills 30] [--seed 0] [--s3]     --kills 3 to try it

With --s3 sources and workspaces lie in a bucket of a local S3 server, each with an MLflow server of its own, and every
command begins with an empty stage, as on a new machine.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_checks import Holders, compare, facts, two_holders, watched_lease

LIMIT_S = 900.0
SOON_S = 1.5
POLL_S = 0.05
TWO_AT_ONCE = 0.25
"""Share of starts with a second command."""
ARRIVALS = 20
FIRST = 60
STARTING = "start or look"

Process = subprocess.Popen[bytes]


@dataclass
class Run:
    """One workspace with its source, and what was seen while it worked."""

    config: Path
    source: str
    workspace: str
    tracking_uri: str
    stages: Path
    """Where commands have their stages."""
    cycles: int = 0
    doubles: int = 0
    """How often two commands were started at once."""
    seconds: list[float] = field(default_factory=list)
    holders: Holders = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.config.with_name("log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true", help="Workspaces in a bucket, on a local S3 server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fresco-chaos-") as folder, ExitStack() as servers:
        root = Path(folder)
        os.environ["FRESCO_STAGE"] = str(root / "stage")  # before anything of `cluster` is imported
        bucket = servers.enter_context(a_bucket()) if options.s3 else ""
        calm, killed = (make_run(root, bucket, name, servers) for name in ("calm", "killed"))
        print(f"workspaces in {bucket or root}; two cycles in peace, to know how long they take", flush=True)
        cycle(calm)
        cycle(calm)
        hit = disturb(killed, options.kills, random.Random(options.seed), max(calm.seconds))
        while calm.cycles < killed.cycles:
            cycle(calm)
        while killed.cycles < calm.cycles:
            cycle(killed)
        found = [facts(run.workspace, run.tracking_uri) for run in (calm, killed)]
        problems = compare(*found) + two_holders(killed.holders)
        print("\n| kills | cycles | killed in | two at once | seconds a cycle in peace | differences |")
        print("|---|---|---|---|---|---|")
        where = ", ".join(f"{stage} {count}" for stage, count in Counter(hit).most_common())
        mean_s = f"{sum(calm.seconds) / len(calm.seconds):.0f}"
        print(f"| {len(hit)} | {killed.cycles} | {where} | {killed.doubles} | {mean_s} | {len(problems)} |")
    for problem in problems:
        print(f"DIFFERS: {problem}")
    sys.exit(1 if problems else 0)


@contextmanager
def a_bucket() -> Iterator[str]:
    """An empty bucket of a local S3 server, to which the AWS_* variables lead from now on."""
    from cluster import s3
    from tests.faults import s3_server

    with s3_server() as network:
        os.environ |= {"AWS_ENDPOINT_URL": network.url, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        s3.client().create_bucket(Bucket="chaos")
        yield "s3://chaos"


def make_run(root: Path, bucket: str, name: str, servers: ExitStack) -> Run:
    """Lay down source, base and config of one workspace; both sources hold the same pictures."""
    from components.models import make_tiny, save_parts
    from tests.loop_world import loop_config, write_config
    from tests.servers import free_port, mlflow_server

    base = root / "base"
    if not base.exists():
        save_parts(make_tiny("stable_diffusion", seed=0), base)
    folder = root / name
    (folder / "stages").mkdir(parents=True)
    place, source, tracking_uri = str(folder / "workspace"), str(folder / "source"), ""
    if bucket:
        port = free_port()
        servers.enter_context(mlflow_server(folder, f"sqlite:///{folder / 'mlflow.db'}", port))
        place, source, tracking_uri = f"{bucket}/{name}", f"{bucket}/{name}-arrivals", f"http://127.0.0.1:{port}"
    lenient = ("gate.min_improvement=0", "gate.seed_spread=0", "gate.significance=0.2", "gate.max_clip_drop=100")
    places = (f"data.source={source}", f"placement.tracking_uri={tracking_uri}")
    config = loop_config(folder, base, *places, "train.steps=12", "gate.time_budget_s=300", *lenient)
    config = config.model_copy(update={"workspace": place})
    return Run(write_config(folder, config), source, place, tracking_uri, folder / "stages")


def arrive_for(run: Run) -> None:
    """The pictures of the cycle that comes: a function of its number."""
    from tests.loop_world import arrive

    if run.cycles == 0:
        arrive(run.source, "base", 0, FIRST)
    else:
        arrive(run.source, "drifted" if run.cycles % 2 else "base", FIRST + ARRIVALS * run.cycles, ARRIVALS)


def start(run: Run) -> Process:
    command = [sys.executable, "-m", "flows", "retrain", "--once", "--json", "--config", str(run.config)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment["FRESCO_STAGE"] = tempfile.mkdtemp(dir=run.stages)
    with run.log.open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True)


def cycle(run: Run) -> None:
    """One cycle without harm."""
    arrive_for(run)
    began = time.monotonic()
    finish(run, [start(run)])
    run.seconds.append(time.monotonic() - began)


def finish(run: Run, processes: list[Process]) -> None:
    """Wait until the cycle is over: one command brought it to its end, any other waited."""
    outputs = [process.communicate(timeout=LIMIT_S)[0].decode() for process in processes]
    if any(process.returncode for process in processes):
        codes = [process.returncode for process in processes]
        tail = run.log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"fresco retrain expected to end well, found codes {codes}:\n{tail}")
    ended = [line for line in journal(run) if line["event"] == "cycle"]  # perhaps just before a kill
    if len(ended) != run.cycles + 1:
        raise SystemExit(f"cycle {run.cycles + 1} expected to end, found: {outputs}")
    worked = [output for output in outputs if json.loads(output)["decision"] != "wait"]
    if len(worked) > 1:
        raise SystemExit(f"one of two commands expected to work, found: {outputs}")
    run.cycles += 1
    print(f"{run.config.parent.name}: {ended[-1]['cycle']} {ended[-1]['decision']}", flush=True)


def disturb(run: Run, kills: int, dice: random.Random, span_s: float) -> list[str]:
    """Kill and start again until the kills are spent and the cycle at hand is over; return the stages that were hit."""
    hit: list[str] = []
    with watched_lease(run.workspace, run.holders):
        while len(hit) < kills:
            arrive_for(run)
            while len(hit) < kills:
                told = run.log.stat().st_size if run.log.exists() else 0
                processes = [start(run) for _ in range(1 + (dice.random() < TWO_AT_ONCE))]
                run.doubles += len(processes) > 1
                if not wait_for_moment(run, processes, told, dice, span_s):
                    finish(run, processes)
                    break
                for process in processes:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                for process in processes:
                    process.communicate()
                hit.append(stage_of(run, told))
                print(f"kill {len(hit)} of {kills}: {hit[-1]}", flush=True)
            else:
                finish(run, [start(run)])
    return hit


def wait_for_moment(run: Run, processes: list[Process], told: int, dice: random.Random, span_s: float) -> bool:
    """Wait until a moment of the dice; False when every command ended before it."""
    from flows.stages import STAGES

    aim = dice.choice(["", STARTING, *STAGES]) if dice.random() < 0.5 else ""
    delay_s = dice.uniform(0, SOON_S if aim else span_s)
    now = [line for line in journal(run) if line["event"] == "stage" and line["cycle"] == this_cycle(run)]
    if aim in {line["stage"] for line in now if line["state"] == "done"}:
        aim = STARTING  # what is done does not come again
    moment = time.monotonic() + delay_s if aim in ("", STARTING) else float("inf")
    while time.monotonic() < moment:
        if all(process.poll() is not None for process in processes):
            return False
        if moment == float("inf") and stage_of(run, told) == aim:
            moment = time.monotonic() + delay_s
        time.sleep(POLL_S)
    return any(process.poll() is None for process in processes)


def stage_of(run: Run, told: int) -> str:
    """Where the command was, whose words begin at byte `told` of the log."""
    from flows.stages import STAGES

    with run.log.open("rb") as log:
        log.seek(told)
        words = re.findall(r"\] cycle-\d+: (\w+)$", log.read().decode(errors="replace"), re.MULTILINE)
    stages = [word for word in words if word in STAGES]
    return stages[-1] if stages else STARTING


def this_cycle(run: Run) -> str:
    return f"cycle-{run.cycles + 1:04d}"


def journal(run: Run) -> list[dict[str, Any]]:
    from cluster.artifacts import open_workspace, read_journal

    return read_journal(open_workspace(run.workspace))


if __name__ == "__main__":
    main()
