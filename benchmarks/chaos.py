"""Is the loop safe to kill? `make chaos`: SIGKILL at random moments of full cycles, then everything is compared.

`fresco retrain --once` runs on a tiny world where emblems arrive. One workspace is left in peace; in the other the
command is killed with everything it started, at moments drawn from a seed, and given again, until the kills are spent
and the cycle at hand is over. Both must then agree: dataset versions, decisions, champion and its weights, aliases,
every line of the journal; and no two processes ever held one token of the lease. Exit code 1 when something differs.

    python -m benchmarks.chaos [--kills 30] [--seed 0] [--s3]     --kills 3 to try it

With --s3 sources and workspaces lie in a bucket of a local S3 server, each with an MLflow server of its own, and every
command begins with an empty stage, as on a new machine.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 900.0
LOOK_S = 0.5
ARRIVALS = 20
FIRST = 60
UNLIKE = ("monitor", "champion_found")
"""Events of which nothing is claimed; nor is of looks that wait."""


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
    seconds: list[float] = field(default_factory=list)
    holders: dict[int, set[tuple[int, str]]] = field(default_factory=dict)


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
        print(f"workspaces in {bucket or root}; one cycle in peace, to know how long it takes", flush=True)
        cycle(calm)
        kills = disturb(killed, options.kills, random.Random(options.seed), calm.seconds[0])
        while calm.cycles < killed.cycles:
            cycle(calm)
        problems = compare(facts(calm), facts(killed)) + two_holders(killed)
        print("\n| kills | cycles | killed in | seconds a cycle in peace | differences |\n|---|---|---|---|---|")
        where = ", ".join(f"{stage} {count}" for stage, count in Counter(kills).most_common())
        rows = (len(kills), killed.cycles, where, f"{sum(calm.seconds) / len(calm.seconds):.0f}", len(problems))
        print("| " + " | ".join(map(str, rows)) + " |")
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


def start(run: Run) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "flows", "retrain", "--once", "--json", "--config", str(run.config)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment["FRESCO_STAGE"] = tempfile.mkdtemp(dir=run.stages)
    log = run.config.with_name("log").open("ab")
    with log:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True)


def cycle(run: Run) -> None:
    """One cycle without harm."""
    arrive_for(run)
    began = time.monotonic()
    finish(run, start(run))
    run.seconds.append(time.monotonic() - began)


def finish(run: Run, process: "subprocess.Popen[bytes]") -> None:
    output, _ = process.communicate(timeout=LIMIT_S)
    if process.returncode:
        tail = run.config.with_name("log").read_text(errors="replace")[-3000:]
        raise SystemExit(f"fresco retrain expected to end well, found code {process.returncode}:\n{tail}")
    ended = [line for line in journal(run) if line["event"] == "cycle"]  # perhaps just before a kill
    if len(ended) != run.cycles + 1:
        raise SystemExit(f"cycle {run.cycles + 1} expected to end, found: {output.decode()}")
    run.cycles += 1
    print(f"{run.config.parent.name}: {ended[-1]['cycle']} {ended[-1]['decision']}", flush=True)


def disturb(run: Run, kills: int, dice: random.Random, span_s: float) -> list[str]:
    """Kill and start again until the kills are spent and the cycle at hand is over; return the stages that were hit."""
    hit: list[str] = []
    with watched_lease(run):
        while len(hit) < kills:
            arrive_for(run)
            while len(hit) < kills:
                process = start(run)
                try:
                    process.wait(dice.uniform(0, span_s))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                    hit.append(stage_of(run))
                    print(f"kill {len(hit)} of {kills}: {hit[-1]}", flush=True)
                    continue
                finish(run, process)
                break
            else:
                finish(run, start(run))
    return hit


def stage_of(run: Run) -> str:
    """Where the loop was when it was killed."""
    lines = [line for line in journal(run) if line["event"] in ("trigger", "stage", "cycle")]
    if not lines or lines[-1]["event"] == "cycle":
        return "between cycles"
    return f"{lines[-1].get('stage', 'begin')}" + (" (done)" if lines[-1].get("state") == "done" else "")


class watched_lease:  # noqa: N801, reads as a statement
    """Note every holder of the loop's lease that shows while the block runs."""

    def __init__(self, run: Run) -> None:
        self.run, self.ended = run, threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def look(self) -> None:
        from cluster import storage
        from cluster.errors import StorageError

        place = storage.join(self.run.workspace, "retrain", "lease.epochs")
        while not self.ended.wait(LOOK_S):
            try:
                for entry in storage.iter_files(place):
                    lease = json.loads(storage.read_bytes(entry.uri))
                    self.run.holders.setdefault(lease["token"], set()).add((lease["pid"], lease["nonce"]))
            except (FileNotFoundError, ValueError, StorageError):
                continue  # taken away or away at the moment: looked at again


def two_holders(run: Run) -> list[str]:
    if not run.holders:
        return ["nobody was ever seen to hold the lease"]
    several = {token: holders for token, holders in run.holders.items() if len(holders) > 1}
    return [f"token {token} of the lease was held by {sorted(holders)}" for token, holders in several.items()]


def journal(run: Run) -> list[dict[str, Any]]:
    from cluster.artifacts import open_workspace, read_journal

    return read_journal(open_workspace(run.workspace))


def facts(run: Run) -> dict[str, Any]:
    """What must be the same wherever the loop was killed."""
    from cluster import stage
    from cluster.artifacts import finished, open_workspace
    from cluster.registry import CHALLENGER, CHAMPION, PREVIOUS, TAG_MODEL_FINGERPRINT, Registry
    from components.models import model_fingerprint

    workspace = open_workspace(run.workspace)
    registry = Registry(workspace, run.tracking_uri)
    aliases = {alias: registry.by_alias("loop", alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    versions = {version.number: version.tags[TAG_MODEL_FINGERPRINT] for version in registry.versions("loop")}
    weights = {alias: model_fingerprint(registry.directory_of(one)) for alias, one in aliases.items() if one}
    lines = [line for line in journal(run) if line["event"] not in UNLIKE and line.get("decision") != "wait"]
    keys = ("event", "cycle", "stage", "state", "decision", "dataset", "run_id", "version", "champion", "previous")
    told = Counter(json.dumps({key: line[key] for key in keys if key in line}, sort_keys=True) for line in lines)
    return {
        "dataset versions": sorted(path.name for path in finished(workspace.data)),
        "finished runs": sorted(path.name for path in finished(workspace.runs)),
        "aliases": {alias: one.number if one else None for alias, one in aliases.items()},
        "registered weights": versions,
        "weights of the aliases": weights,
        "unfinished moves": sorted(path.name for path in stage.files(workspace.root / "locks", ".intent.json")),
        "journal": dict(sorted(told.items())),
    }


def compare(calm: dict[str, Any], killed: dict[str, Any]) -> list[str]:
    found = []
    for name, expected in calm.items():
        if name == "journal":
            for line in sorted(expected.keys() | killed[name].keys()):
                if expected.get(line, 0) != killed[name].get(line, 0):
                    counts = f"{expected.get(line, 0)} in peace, {killed[name].get(line, 0)} killed"
                    found.append(f"journal line {line}: {counts}")
        elif expected != killed[name]:
            found.append(f"{name}: {expected} in peace, {killed[name]} killed")
    return found


if __name__ == "__main__":
    main()
