"""The tables of `benchmarks/train.py`, as Markdown."""

import statistics
from typing import Any


def show(result: dict[str, Any]) -> None:
    """Print the tables as Markdown."""
    speed = result["speed"]
    plain = speed["plain"]["rates"]
    print("\n| loop | images/s | beside plain (median of rounds, min to max) |\n|---|---|---|")
    for name, numbers in speed.items():
        ratios = [mine / peer for mine, peer in zip(numbers["rates"], plain, strict=True)]
        print(f"| {name} | {statistics.median(numbers['rates']):.1f} | {_spread(ratios)} |")
    parts = list(dict.fromkeys(part for numbers in speed.values() for part in numbers["parts"]))
    print(f"\n| ms a step | {' | '.join(speed)} |\n|---|{'---|' * len(speed)}")
    for part in parts:
        row = [f"{1000 * numbers['parts'].get(part, 0):.0f}" for numbers in speed.values()]
        print(f"| {part} | {' | '.join(row)} |")
    print("\n| engine | images/s | beside torch | MiB a worker: measured (formula): weights, gradients, optimizer |")
    print("|---|---|---|---|")
    for name, numbers in result["zero"].items():
        ratios = [mine / peer for mine, peer in zip(numbers["rates"], result["zero"]["torch"]["rates"], strict=True)]
        memory = result["memory"].get(name.removeprefix("ZeRO "))
        told = ""
        if memory is not None:
            told = ", ".join(
                f"{memory['measured'][kind] / 2**20:.2f} ({memory['formula'][kind] / 2**20:.2f})"
                for kind in ("parameters", "gradients", "optimizer")
            )
        print(f"| {name} | {statistics.median(numbers['rates']):.1f} | {_spread(ratios)} | {told} |")


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
