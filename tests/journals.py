"""Journals as a workspace has them after months of the loop, drawn from a seed: the same seed writes the same bytes.

A year in the life of a model: the monitor looks, the loop waits or trains, the gate decides, champions come and go. The
shapes of the lines are those that the verbs write.
"""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN = 1_767_225_600  # 2026-01-01 00:00 UTC
STREAMS = {"images": 0.05, "captions": 0.04, "alignment": 0.1, "prompts": 0.06}
STAGES = {"snapshot": 2, "prepare": 40, "train": 420, "evaluate": 70, "gate": 60, "deploy": 12, "watch": 300}
WAITS = (
    "no, because nothing arrived since the last cycle",
    "no trigger: 37 new pictures (retrain.min_new_images 200); no drift",
    "no, because the last cycle ended 20 min ago (retrain.cooldown_s 3600)",
)


class Writer:
    """Draws the story; `now` is the clock of the workspace in Unix seconds."""

    def __init__(self, seed: int, name: str, begin: float = BEGIN) -> None:
        self.chance, self.name, self.now = random.Random(seed), name, float(begin)
        self.champion: int | None = None
        self.previous: int | None = None
        self.versions = self.cycles = 0
        self.images, self.dataset, self.drifted = 1200, "", 0.0

    def line(self, event: str, **numbers: Any) -> dict[str, Any]:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now))
        return {"time": moment, "event": event, **numbers}

    def hex(self, digits: int = 12) -> str:
        return f"{self.chance.getrandbits(digits * 4):0{digits}x}"

    def first(self) -> Iterator[dict[str, Any]]:
        """Data, a search, a first champion."""
        self.dataset = f"{self.name}@{self.hex()}"
        yield self.line("dataset", dataset=self.dataset, images=self.images, rejected=3)
        self.now += 700
        yield self.line("search", search=f"{self.name}-{self.hex()}", trials=6, name=self.name)
        yield from self.judged(f"{self.name}-{self.hex()}", promote=True)

    def look(self) -> Iterator[dict[str, Any]]:
        self.drifted = min(1.0, self.drifted + self.chance.choice((0.0, 0.0, 0.001, 0.003)))
        streams = {}
        for name, threshold in STREAMS.items():
            effect = max(
                0.0, self.chance.gauss(0.4 * threshold + (self.drifted if name == "images" else 0.0), threshold / 5)
            )
            sure = 0.001 if effect > threshold else self.chance.uniform(0.05, 1)
            verdict = "drift" if effect > threshold else "no_drift"
            streams[name] = {"p_value": sure, "effect": effect, "threshold": threshold, "verdict": verdict}
            streams[name] |= {"n_reference": 240, "n_window": self.chance.randint(40, 1000)}
        told = [name for name, one in streams.items() if one["verdict"] == "drift"]
        verdict = "drift" if told else "no_drift"
        reasons = [f"{name}: {streams[name]['effect']:.0%} of the arrivals differ" for name in told] or [
            "all streams as before"
        ]
        yield self.line("monitor", verdict=verdict, reasons=reasons, streams=streams, new_images=37, report="")

    def wait(self) -> Iterator[dict[str, Any]]:
        reason = self.chance.choice(WAITS)
        yield self.line("trigger", decision="wait", kinds=["wait"], reasons=[reason], numbers={})

    def cycle(self) -> Iterator[dict[str, Any]]:
        """A retraining with all its stages; most are promoted."""
        self.cycles += 1
        key = {"cycle": f"cycle-{self.cycles:04d}"}
        reasons = [
            f"{self.chance.randint(200, 900)} new pictures",
            f"drift of images: {self.drifted:.0%} of the arrivals",
        ]
        yield self.line("trigger", **key, decision="retrain", kinds=["drift"], reasons=reasons, numbers={})
        before, parent, run_id = self.champion, self.dataset, f"{self.name}-{self.hex()}"
        decision = self.chance.choice(("promoted", "promoted", "promoted", "refused", "rolled_back", "failed"))
        for stage, typical_s in STAGES.items():
            yield self.line("stage", **key, stage=stage, state="began")
            seconds = round(typical_s * self.chance.uniform(0.7, 1.4), 1)
            self.now += seconds
            if decision == "failed" and stage == "train":
                error = "WorkerError: the worker group failed twice"
                yield self.line("stage", **key, stage=stage, state="failed", error=error)
                break
            numbers: dict[str, Any] = {}
            if stage == "prepare":
                self.dataset, self.images = f"{self.name}@{self.hex()}", self.images + self.chance.randint(200, 900)
                yield self.line("dataset", dataset=self.dataset, images=self.images, rejected=0, parent=parent)
                numbers = {"dataset": self.dataset, "parent": parent}
            if stage == "train":
                numbers = {"run_id": run_id, "steps": 600}
            if stage == "gate":
                yield from self.judged(run_id, promote=decision != "refused")
            yield self.line("stage", **key, stage=stage, state="done", numbers=numbers, seconds=seconds)
            if decision == "refused" and stage == "gate":
                break
        if decision == "rolled_back":
            self.champion, self.previous = self.previous or self.champion, self.champion
            yield self.move("rollback", reasons=[f"{key['cycle']}: 4.1 % of requests failed, 0.2 % before"])
        if decision in ("promoted", "rolled_back"):
            self.drifted = 0.0
        numbers = {
            "champion_before": before,
            "champion_after": self.champion,
            "dataset": self.dataset,
            "run_id": run_id,
        }
        yield self.line("cycle", **key, id=key["cycle"], decision=decision, reasons=[f"ended {decision}"], **numbers)

    def judged(self, run_id: str, promote: bool) -> Iterator[dict[str, Any]]:
        self.versions += 1
        change = -self.chance.uniform(5, 30) if promote else self.chance.uniform(-1, 4)
        reasons = [
            f"{self.dataset} has 120 test pictures that no model trained on",
            f"on the new data the loss changes by {change:+.1f}% (wanted more than 1.0% lower), 120 pictures",
        ]
        line = {
            "decision": "promote" if promote else self.chance.choice(("hold", "reject")),
            "forced": False,
            "reasons": reasons,
            "version": self.versions,
            "run_id": run_id,
            "dataset": self.dataset,
            "report": f"/elsewhere/reports/promote-{self.name}-version-{self.versions}.html",
        }
        if promote:
            self.champion, self.previous = self.versions, self.champion
            yield self.move("promote", **line)
        else:
            yield self.line("promote", **line, name=self.name, champion=self.champion, previous=self.previous)

    def move(self, event: str, **numbers: Any) -> dict[str, Any]:
        moved = {"name": self.name, "champion": self.champion, "previous": self.previous, "move": self.hex(32)}
        line = self.line(event, **numbers, **moved)
        return {**line, "since": line["time"]}


def story_lines(seed: int, number: int, name: str = "icons", days: float = 365) -> list[dict[str, Any]]:
    """At least `number` lines over about so many days."""
    writer = Writer(seed, name)
    lines = list(writer.first())
    gap_s = days * 86400 / max(1, number)
    until_cycle = 40
    while len(lines) < number:
        writer.now += gap_s * writer.chance.uniform(0.5, 1.5)
        lines += writer.look() if writer.chance.random() < 0.6 else writer.wait()
        until_cycle -= 1
        if until_cycle <= 0:
            lines += writer.cycle()
            until_cycle = writer.chance.randint(20, 80) if number < 2000 else writer.chance.randint(150, 500)
    return lines


def write_journal(path: Path, lines: list[dict[str, Any]], torn_every: int = 0) -> Path:
    """Write the lines; every so many of them cut short as by a crash, and then ended by the next writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps(line, ensure_ascii=False) for line in lines]
    cut = [
        text[: len(text) // 2] if torn_every and index % torn_every == torn_every - 1 else text
        for index, text in enumerate(texts)
    ]
    path.write_text("\n".join(cut) + "\n")
    return path
