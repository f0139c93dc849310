"""The search report: whole, self-contained, and honest about trials that were stopped or failed."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from components.search_page import Search, lead, make_search_page
from components.search_results import OWN, Trial

RATE, TEXT, PLAN = "train.learning_rate.denoiser", "train.learning_rate.text_encoder", "train.freezing"


def search_of(count: int = 14) -> Search:
    generator = np.random.default_rng(1)
    trials = []
    for number in range(count):
        rate = float(10 ** generator.uniform(-4, -2.3))
        plan = ("denoiser", "all", "denoiser_attention", "lora:8")[number % 4]
        goal = 0.13 + 0.05 * abs(np.log10(rate) + 2.8) + (0.02 if plan.startswith("lora") else 0)
        overrides = {PLAN: plan, RATE: rate} | ({TEXT: rate / 9} if plan == "all" else {})
        last = 90 if number % 3 == 0 else 10 if number % 3 == 1 else 30
        curve = [(step, float(goal + 0.2 * np.exp(-step / 20))) for step in range(0, last + 1, 10)]
        state = "complete" if last == 90 else "stopped"
        trials.append(Trial(number, f"emblems-{number:012x}", overrides, state, curve))
    trials.append(
        Trial(count, "emblems-bad", {PLAN: "<b>all", RATE: 0.5, TEXT: 0.1}, "failed", [(0, 0.33)], "NonFinite")
    )
    best = min((trial for trial in trials if trial.state == "complete"), key=lambda trial: trial.loss)
    picture = Image.new("RGB", (120, 90), (200, 120, 60))
    return Search(trials, best, 90, [4.0, 5.0, 6.0], {0: picture, 3: picture})


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_and_fetches_nothing() -> None:
    search = search_of()
    page = make_search_page("search", search, {"Data": "x@1"}, {"Settings": "train: {}"})
    seen = Collector()
    seen.feed(page)
    text = " ".join(seen.text)
    assert all(address.startswith(("data:", "#")) for address in seen.addresses)
    assert all(trial.run_id in text for trial in search.trials)
    assert "NonFinite" in text and "<b>all" in text, "escaped, and shown"
    assert "5.0 s (median)" in text
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    titles = ["Validation loss by step", "Cost against quality", "Importance", "Denoiser rate", "Text encoder rate"]
    assert len(drawings) == len(titles) and all(title in text for title in titles)
    for drawing in drawings:
        ET.fromstring(drawing.replace("<svg ", '<svg xmlns:xlink="x" ', 1))


def test_lead_tells_winner_gain_and_cost() -> None:
    search = search_of()
    told = lead(search)
    assert f"Trial {search.best.number} won" in told and f"{search.best.loss:.5f}" in told and "below its start" in told
    spent = sum(trial.steps for trial in search.trials)
    assert f"{spent} steps, {spent / (90 * 15):.0%}" in told


def test_lead_holds_the_best_against_the_own_recipe_at_equal_steps() -> None:
    search = search_of()
    own = replace(search.trials[1], origin=OWN)
    assert own.steps == 10 < search.best.steps
    trials = [search.trials[0], own, *search.trials[2:]]
    told = lead(replace(search, trials=trials))
    change = dict(search.best.curve)[10] / own.loss - 1
    assert f"At step 10 it was {abs(change):.0%} {'below' if change < 0 else 'above'} the config's own recipe" in told
    won = replace(search.best, origin=OWN)
    told = lead(replace(search, trials=[*search.trials, won], best=won))
    assert "the config's own recipe: no trial beat it" in told
    failed = replace(own, state="failed")
    assert "own recipe" not in lead(replace(search, trials=[failed, *search.trials]))


def test_search_of_one_trial_has_a_page_too() -> None:
    trial = Trial(0, "run", {PLAN: "all"}, "complete", [(0, 0.3), (90, 0.2)])
    page = make_search_page("search", Search([trial], trial, 90, [], {}), {}, {})
    assert "Importance" not in page.split("How to read this")[0]
