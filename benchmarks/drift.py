"""Does the drift monitor keep its promises? False alarms of a year of daily looks, and power. `make bench-drift`.

1. No drift: years of 365 looks at one false alarm a year, all streams and statistics, with one pinned reference a year
   (looks hang together: the interval is over years, or of a Poisson count where years do not differ) and with a fresh
   one each look (looks are independent: binomial).
2. Power against a new concept, in images alone: at 5 %, at the level of daily looks, and Evidently's detectors on the
   same arrays where that package is installed.
3. With `--pictures FOLDER`: splits of real captioned pictures, changed in known ways.
Every number is a function of the seeds here, whatever machine it runs on; only the times are not.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.drift_peers import evidently_detectors
from benchmarks.drift_pictures import show_pictures
from benchmarks.drift_worlds import captioned_items, cone_rows
from components.drift import DriftSettings, look
from components.drift_kernels import gaussian_kernels
from components.drift_streams import IMAGES, Items, Texts
from components.false_alarms import DAY_S, Ledger, next_look
from components.metrics import proportion_wilson
from components.two_sample import permutation_test

BUDGET = 1.0
REFERENCE_ITEMS, DAILY_ITEMS = 120, 60
STREAMS_AND_STATISTICS = 4
SIZES, SHARES = (100, 300, 1000), (0.0, 0.03, 0.1)


def main() -> None:
    """Print the tables as Markdown."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--years", type=int, default=10, help="simulated years of daily looks, each way")
    given.add_argument("--repeats", type=int, default=100, help="repeats of each cell of the power table")
    given.add_argument("--largest", type=int, default=max(SIZES), help="largest n of the power table")
    given.add_argument("--pictures", type=Path, help="folder with metadata.jsonl, such as an ImageFolder")
    given.add_argument("--splits", type=int, default=100, help="splits of the folder for each change")
    asked = given.parse_args()
    if asked.years:
        show_years(asked.years)
    if asked.repeats:
        show_power(asked.repeats, [n for n in SIZES if n <= asked.largest])
        show_speed()
    if asked.pictures:
        show_pictures(asked.pictures, asked.splits)


def show_years(years: int) -> None:
    """False alarms of whole years without drift."""
    print("\n| reference | looks | false alarms | a year (95 %) | budget | reference n | arrivals n |")
    print("|---|---|---|---|---|---|---|")
    for name, pinned in (("pinned for the year", True), ("fresh each look", False)):
        alarms = np.array([year_of_looks(year, pinned) for year in range(years)])
        if pinned:
            low, high = yearly_interval(alarms)
        else:
            share = proportion_wilson(int(alarms.sum()), 365 * years)
            low, high = 365 * share.low, 365 * share.high
        rate = f"{alarms.mean():.2f} ({max(0.0, low):.2f} to {high:.2f})"
        sizes = f"{REFERENCE_ITEMS} | {DAILY_ITEMS}"
        print(f"| {name} | {365 * years} | {alarms.sum()} | {rate} | {BUDGET:g} | {sizes} |", flush=True)


def yearly_interval(alarms: np.ndarray) -> tuple[float, float]:
    """95 % interval of the alarms a year: Student's over years; where they show no spread, the exact one of a count.

    That one (Garwood 1936) takes the looks of a year as independent, so with one pinned reference it is too narrow.
    """
    years, count = len(alarms), int(alarms.sum())
    if years > 1 and alarms.std() > 0:
        half = stats.t.ppf(0.975, years - 1) * alarms.std(ddof=1) / np.sqrt(years)
        return float(alarms.mean() - half), float(alarms.mean() + half)
    low = stats.chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    return float(low / years), float(stats.chi2.ppf(0.975, 2 * count + 2) / 2 / years)


def year_of_looks(year: int, pinned: bool) -> int:
    """Drift verdicts of 365 daily looks at data that does not change."""
    generator = np.random.default_rng((year, int(pinned)))
    reference, ledger, alarms = captioned_items(generator, REFERENCE_ITEMS), Ledger(last_s=0.0), 0
    for day in range(1, 366):
        if not pinned:
            reference = captioned_items(generator, REFERENCE_ITEMS)
        level, ledger = next_look(ledger, day * DAY_S, BUDGET)
        found = look(reference, captioned_items(generator, DAILY_ITEMS), level, seed=1000 * year + day)
        alarms += found.verdict == "drift"
    return alarms


def show_power(repeats: int, sizes: list[int]) -> None:
    """Share of repeats that say drift: what was there in the rows with a new concept, false alarms in the others."""
    yearly = BUDGET / 365 / STREAMS_AND_STATISTICS
    detectors: dict[str, Callable[[np.ndarray, np.ndarray, int], bool]] = {
        "Fresco at 5 %": lambda one, other, seed: says_drift(one, other, seed, 0.05),
        f"Fresco's verdict at {yearly:.2%} (one alarm a year)": lambda one, other, seed: verdict_is_drift(
            one, other, seed, yearly
        ),
    }
    for name, peer in evidently_detectors().items():
        detectors[name] = lambda one, other, _seed, peer=peer: peer(one, other)  # type: ignore[misc]
    print(f"\n| n a side | new concept in | {' | '.join(detectors)} |")
    print("|---" * (len(detectors) + 2) + "|")
    for n in sizes:
        for share in SHARES:
            hits = dict.fromkeys(detectors, 0)
            for seed in range(repeats):
                generator = np.random.default_rng((seed, n, round(1000 * share)))
                sides = cone_rows(generator, n, 0.0), cone_rows(generator, n, share)
                for name, detector in detectors.items():
                    hits[name] += detector(*sides, seed)
            told = [proportion_wilson(count, repeats) for count in hits.values()]
            cells = [f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})" for one in told]
            print(f"| {n} | {share:.0%} | {' | '.join(cells)} |", flush=True)


def says_drift(reference: np.ndarray, arrivals: np.ndarray, seed: int, level: float) -> bool:
    kernels = gaussian_kernels(np.concatenate([reference, arrivals]))
    bank = {str(width): kernel for width, kernel in kernels.items()}
    return permutation_test(bank, len(reference), seed, level).p_value <= level


def verdict_is_drift(reference: np.ndarray, arrivals: np.ndarray, seed: int, level: float) -> bool:
    """The images stream of a look: significance and effect; there are no pixels, so thumbnails tell nothing."""
    one, other = (
        Items("made up", rows, np.zeros((len(rows), 3), np.float32), Texts(("",) * len(rows), rows))
        for rows in (reference, arrivals)
    )
    return look(one, other, level, seed, DriftSettings(streams=(IMAGES,))).verdict == "drift"


def show_speed() -> None:
    """Seconds of one bank's test with 999 permutations; the median of five."""
    print("\n| n a side | feature width | s for distances, 4 kernels, 999 permutations |")
    print("|---|---|---|")
    for n, width in ((300, 64), (300, 512), (1000, 512)):
        spent = []
        for seed in range(5):
            generator = np.random.default_rng(seed)
            sides = [cone_rows(generator, n, 0.0, width) for _ in range(2)]
            started = time.perf_counter()
            says_drift(*sides, seed, 0.05)
            spent.append(time.perf_counter() - started)
        print(f"| {n} | {width} | {np.median(spent):.2f} |", flush=True)


if __name__ == "__main__":
    main()
