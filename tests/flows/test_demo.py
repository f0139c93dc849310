"""The demo, whole and small: every verb on real parts, from drawn pictures to an endpoint's answer."""

from pathlib import Path

import pytest
from PIL import Image

from cluster.artifacts import open_workspace
from cluster.registry import CHAMPION, Registry
from flows import demo
from flows.config import load_config

pytestmark = pytest.mark.slow  # a search, two rehearsals and an endpoint


@pytest.mark.timeout(600)
def test_story_ends_with_a_champion_its_pictures_and_three_reports(tmp_path: Path) -> None:
    small = ["data.source=emblems://drifted?count=240&seed=1", "train.steps=12", "train.eval_every_steps=4"]
    search = [
        "search.trials=3",
        "search.random_trials=1",
        "search.grace_steps=4",
        "train.global_batch=8",
        "train.eval_images=16",
    ]
    pictures = ["evaluate.prompts=8", "evaluate.sampling_steps=2", "serve.default_steps=2", "evaluate.bootstrap=100"]
    config = load_config(overrides=[*small, *search, *pictures], preset="tiny_cpu", workspace=str(tmp_path / "w"))
    found = demo.run(config, stop=True)
    registry = Registry(open_workspace(config.workspace))
    champion = registry.by_alias(config.name, CHAMPION)
    assert champion is not None and champion.number == found["champion"]
    assert [entry.number for entry in registry.versions(config.name)] == [1, 2, 3], "base, search's winner, loop's run"
    names = ["prepare", "champion", "tune", "promote", "serve", "generate", "drift", "retrain", "words"]
    assert [stage["name"] for stage in found["stages"]] == names and all(
        stage["seconds"] > 0 for stage in found["stages"]
    )
    for key, told in (("search_report", "Fresco search"), ("report", "Fresco evaluation"), ("decision_report", "gate")):
        assert told in Path(found[key]).read_text()
    assert len(found["pictures"]) == 16 and {size_of(path) for path in found["pictures"]} == {(64, 64)}
    assert size_of(found["grid"])[0] > 500
    second = found["drift"]
    assert second["verdict"] == "drift" and "house" in Path(second["monitor_report"]).read_text()
    client = second["client"]
    assert client["requests"] > 0 and client["failed"] == 0 and sum(client["by_version"].values()) == client["requests"]
    assert (
        second["champion"] == champion.number == (3 if second["cycle"]["decision"] == "promoted" else champion.number)
    )
    assert {name: set(pair) for name, pair in second["words"].items()} == dict.fromkeys(
        ("new", "old"), {"before", "after"}
    )
    assert second["cycle"]["cycle"] in Path(second["timeline"]).read_text()


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size
