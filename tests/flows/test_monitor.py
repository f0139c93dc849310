"""From a folder that grows to a verdict: real pictures, the embedded CLIP, one pinned reference, one budget."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.artifacts import open_workspace, read_journal
from cluster.capture import SCHEMA
from cluster.champion import move_champion
from cluster.errors import DamagedError, RegistryError
from cluster.fencing import peek_fenced
from cluster.registry import TAG_DATASET, TAG_MODEL_FINGERPRINT, Registry
from components.arrivals import CHANGING, NO_CAPTION_YET
from components.clip_encoder import ClipEncoder
from components.emblems import example
from components.errors import InputError
from components.false_alarms import DAY_S, YEAR_S
from components.images import to_png
from components.models import embedded_clip
from flows import monitor, prepare, reference
from flows.config import Config, load_config, with_overrides

SIDE_PX = 32
ARRIVALS = 90
PER_YEAR = 12.0


def put(folder: Path, world: str, numbers: range, seed: int = 7, captions: list[str] | None = None) -> None:
    """Emblems as pictures beside same-named captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, number in enumerate(numbers):
        picture, caption = example(world, seed, number, SIDE_PX)
        (folder / f"{number:04}.png").write_bytes(to_png(picture))
        (folder / f"{number:04}.txt").write_text(captions[place] if captions else caption)


def config_of(workspace: Path, source: Path | str) -> Config:
    overrides = [f"data.source={source}", f"data.resolution_px={SIDE_PX}", "data.validation_fraction=0.25"]
    overrides += ["data.test_fraction=0.25", "monitor.settle_s=0", f"monitor.false_alarms_per_year={PER_YEAR}"]
    return load_config(overrides=[*overrides, "monitor.window=300"], workspace=str(workspace))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, empty_registry: Path) -> Path:
    """A folder with a workspace whose champion knows the base world, and sources `same`, `new` and `shuffled`.

    The reference is pinned, and what the sources hold is encoded, so that each test only compares.
    """
    root = tmp_path_factory.mktemp("monitor")
    workspace = root / "workspace"
    workspace.mkdir()
    shutil.copy(empty_registry, workspace / "mlflow.db")
    put(root / "same", "base", range(ARRIVALS))
    put(root / "new", "drifted", range(ARRIVALS))
    told = [example("base", 7, number)[1] for number in range(ARRIVALS)]
    put(root / "shuffled", "base", range(ARRIVALS), captions=told[11:] + told[:11])
    config = config_of(workspace, "emblems://base?count=300&seed=3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "map_blocks", lambda blocks, make, job, pool, carry: map(make(job), blocks))
        patch.setattr(prepare, "local_session", lambda placement: nullcontext())
        dataset = prepare.ensure_dataset(config)
    registry = Registry(open_workspace(str(workspace)))
    version = registry.register(config.name, workspace, {TAG_DATASET: dataset.id})
    move_champion(registry, config.name, version.number, {})
    reference.pin(config, 1)
    for source in ("same", "new", "shuffled"):
        looked(config_of(workspace, root / source))
    shutil.rmtree(workspace / "monitor" / "looks")
    (workspace / "journal.jsonl").unlink()
    return root


@pytest.fixture
def workspace(world: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(world / "workspace", tmp_path / "workspace")
    yield tmp_path / "workspace"


def pinned_s(config: Config) -> float:
    return reference.pin(config, 1).pinned_s


def looked(config: Config, days: float = 0.0) -> dict[str, Any]:
    """A look so many days after the reference was pinned; it must be JSON."""
    return json.loads(json.dumps(monitor.run(config, at=pinned_s(config) + days * DAY_S)))


def told(workspace: Path) -> list[dict[str, Any]]:
    return [line for line in read_journal(open_workspace(str(workspace))) if line["event"] == "monitor"]


def test_the_same_world_is_no_drift_and_every_number_is_told(
    world: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(workspace, world / "same")
    result = looked(config)
    assert result["verdict"] in ("no_drift", "not_enough_data") and result["drift"] == 0.0
    untested = result["streams"].pop("prompts")  # nothing was captured
    assert (untested["n_window"], untested["p_value"], untested["verdict"]) == (0, None, "not_enough_data")
    assert untested["why"] == "0 served prompts so far; a look compares from 20 on"
    assert f"prompts: not tested: {untested['why']}" in result["reasons"]
    assert set(result["streams"]) == {"images", "captions", "alignment"}
    for one in result["streams"].values():
        assert one["p_value"] > one["threshold"] == pytest.approx(PER_YEAR / 365 / 4)
        assert one["n_window"] == ARRIVALS and 100 < one["n_reference"] < 200 and one["effect"] >= 0
    assert set(result["statistics"]) >= {"caption_words", "brightness", "near_duplicate", "rejected"}
    assert (result["new_images"], result["window"]["pictures"], result["tested"]) == (ARRIVALS, ARRIVALS, True)
    assert result["level"] == result["spent"] == pytest.approx(PER_YEAR * DAY_S / YEAR_S)
    assert (
        result["reference"]["version"] == 1 and result["reference"]["encoder"] == ClipEncoder(embedded_clip()).identity
    )
    assert [line["verdict"] for line in told(workspace)] == [result["verdict"]]
    page = Path(result["report"]).read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "Alignment" in page
    assert "Not tested: prompts." in page and untested["why"] in page
    said = capsys.readouterr().err.split("\nverdict: ")[1]
    assert said.splitlines()[1].startswith("  images") and f"report: {result['report']}" in said


def test_a_new_world_is_drift_with_pictures_and_words(world: Path, workspace: Path) -> None:
    result = looked(config_of(workspace, world / "new"))
    assert result["verdict"] == "drift" and 0.1 < result["drift"] <= 1.0
    assert {name for name, one in result["streams"].items() if one["verdict"] == "drift"} >= {"images", "captions"}
    assert "drifted: p = " in result["reasons"][0]
    found = result["attributions"]["images"]
    arrived = {picture.read_bytes() for picture in (world / "new").glob("*.png")}
    assert found["clusters"] and len(arrived) == ARRIVALS
    hashes = {one["sha256"] for one in state(workspace)["window"]["sample"]}
    assert {key for cluster in found["clusters"] for key in cluster} <= hashes
    more = {one["word"] for one in result["attributions"]["captions"]["words"] if one["deviations"] > 0}
    assert more & {"teal", "gold", "crimson", "navy", "magenta", "brown", "olive", "indigo"}
    page = Path(result["report"]).read_text()
    assert page.count("data:image/png;base64,") > 8 and "Nearest that the champion knows" in page
    assert json.loads(Path(result["report"]).with_suffix(".json").read_text())["verdict"] == "drift"


def state(workspace: Path) -> dict[str, Any]:
    found: dict[str, Any] = peek_fenced(str(workspace / "monitor" / "looks" / "fresco" / "state.json")) or {}
    return found


def test_shuffled_captions_are_drift_of_the_alignment(world: Path, workspace: Path) -> None:
    result = looked(config_of(workspace, world / "shuffled"))
    streams = {name: one["verdict"] == "drift" for name, one in result["streams"].items()}
    assert streams == {"images": False, "captions": False, "alignment": True, "prompts": False}
    assert result["attributions"]["alignment"]["clusters"]


def test_budget_is_spent_by_tests_alone_whatever_the_clock_does(world: Path, workspace: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, "base", range(monitor.FEWEST - 1))
    config = config_of(workspace, source)
    few = looked(config)
    assert (few["verdict"], few["tested"], few["spent"]) == ("not_enough_data", False, 0.0)
    assert "19 new pictures" in few["reasons"][0] and few["streams"]["images"]["n_window"] == 19
    put(source, "base", range(40))
    first = looked(config)
    spent = first["spent"]
    assert first["tested"] and spent > 0
    same = looked(config, days=1)
    assert same["reasons"][0].startswith("nothing has changed since") and same["streams"] == first["streams"]
    put(source, "base", range(60))
    for days in (1e-5, -1 / 24):  # a second later; and an hour before, by a clock that was set back
        again = looked(config, days)
        assert (again["tested"], again["spent"], again["verdict"]) == (False, spent, first["verdict"])
        assert "budget holds too little" in again["reasons"][0]
    assert "clock stands before" in again["reasons"][0]
    later = looked(config, days=1)
    assert (
        later["tested"] and later["spent"] == pytest.approx(2 * spent) and later["streams"]["images"]["n_window"] == 60
    )
    assert [line["tested"] for line in told(workspace)] == [False, True, True], "only news are journaled"
    assert "2 looks at this reference" in Path(later["report"]).read_text()


def test_a_test_dated_by_a_clock_that_was_far_ahead_is_not_waited_for(
    world: Path, workspace: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    put(source, "base", range(40))
    config = config_of(workspace, source)
    spent = looked(config, days=400)["spent"]
    put(source, "base", range(60))
    back = looked(config, days=1)
    assert (back["tested"], back["spent"]) == (False, spent) and spent > 0
    assert any("by a clock that was ahead" in reason for reason in back["reasons"])
    later = looked(config, days=2)
    assert later["tested"] and later["spent"] == pytest.approx(spent + PER_YEAR / 365)
    assert not any("ahead" in reason for reason in later["reasons"])


def test_another_reference_does_not_bring_the_budget_back(world: Path, workspace: Path) -> None:
    config = config_of(workspace, world / "same")
    assert looked(config)["tested"]
    config = with_overrides(config, {"monitor.window": 50})  # else the same data made the same reference
    registry = Registry(open_workspace(str(workspace)))
    dataset = registry.by_number(config.name, 1).tags[TAG_DATASET]
    (workspace / "models").mkdir()
    registry.register(config.name, workspace / "models", {TAG_DATASET: dataset, TAG_MODEL_FINGERPRINT: "two"})
    move_champion(registry, config.name, 2, {})
    result = looked(config, days=1e-5)
    assert (result["reference"]["version"], result["tested"], result["spent"]) == (2, False, 0.0)
    assert result["verdict"] == "not_enough_data" and "budget" in result["reasons"][0]
    assert looked(config, days=1)["level"] == pytest.approx(PER_YEAR / 365)


def test_a_reference_is_pinned_once_and_checked_whenever_it_is_read(
    world: Path, workspace: Path, clip_directory: Path
) -> None:
    config = config_of(workspace, world / "same")
    pinned = reference.pin(config, 1)
    files = {path: path.read_bytes() for path in pinned.directory.iterdir()}
    assert reference.pin(with_overrides(config, {"monitor.window": 50}), 1) == pinned
    assert {path: path.read_bytes() for path in pinned.directory.iterdir()} == files
    items, words = pinned.read()
    assert items.num_rows == pinned.size == pinned.held_out and words["background"] > 100
    with pytest.raises(
        InputError, match=f"monitor.encoder expected the encoder {pinned.encoder}.*pin that version anew"
    ):
        looked(with_overrides(config, {"monitor.encoder": str(clip_directory)}))
    with pytest.raises(InputError, match=r"monitor\.encoder expected a CLIP directory"):
        looked(with_overrides(config, {"monitor.encoder": str(workspace)}))
    words_file = next(pinned.directory.glob("words-*"))
    words_file.write_bytes(words_file.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match="expected to be as it was pinned for version 1"):
        looked(config)
    record = pinned.directory / "record.json"
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(DamagedError, match=r"expected to describe the reference of version 1.*pin the reference anew"):
        monitor.run(config)
    shutil.rmtree(pinned.directory)
    again = reference.pin(config, 1)
    assert (again.sha256, again.files) == (pinned.sha256, pinned.files)


def captured(workspace: Path, prompts: list[str], encoder: str, rows: Any, keep: bool) -> None:
    """What the endpoint leaves behind."""
    table = [
        {"request_id": f"{encoder}-{place}", "model_version": "1", "encoder": encoder, "image_index": image}
        | {"prompt": prompt if keep else None, "time_s": 4e9, "latency_s": 1.0, "prompt_features": row}
        for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        for image in (0, 1)
    ]
    folder = workspace / "captured"
    folder.mkdir(exist_ok=True)
    name = f"{len(list(folder.iterdir())):04}.parquet"
    pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), folder / name)


def test_other_prompts_are_drift_and_rows_of_another_encoder_are_refused(
    world: Path, workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    config = config_of(workspace, tmp_path / "empty")
    prompts = [example("drifted", 9, number)[1] for number in range(50)]
    foreign = np.ones((len(prompts), 8), np.float32)
    captured(workspace, prompts, "another", foreign, keep=False)
    refused = looked(config)
    assert refused["verdict"] == "not_enough_data" and refused["spent"] == 0.0
    assert any("50 captured prompts were encoded by another" in reason for reason in refused["reasons"])
    encoder = ClipEncoder(embedded_clip())
    captured(workspace, prompts, encoder.identity, encoder.texts(prompts), keep=False)
    result = looked(config)
    assert result["verdict"] == "drift" and result["streams"]["prompts"]["verdict"] == "drift"
    few = {name: one["why"] for name, one in result["streams"].items() if "why" in one}
    assert few == dict.fromkeys(
        ("images", "captions", "alignment"), "0 new pictures so far; a look compares from 20 on"
    )
    assert result["streams"]["prompts"]["n_window"] == result["window"]["prompts"] == 50
    assert result["statistics"] == {} and result["attributions"]["prompts"]["words"] == []
    captured(workspace, prompts, "a third", foreign, keep=True)  # their text was kept, so they are encoded anew
    assert looked(config, days=1)["window"]["prompts"] == 100


def test_a_stream_that_was_asked_for_alone_and_has_too_few_items_is_not_said_to_have_stayed(
    world: Path, workspace: Path
) -> None:
    config = with_overrides(config_of(workspace, world / "same"), {"monitor.streams": ["prompts"]})
    prompts = [example("drifted", 9, number)[1] for number in range(7)]
    encoder = ClipEncoder(embedded_clip())
    captured(workspace, prompts, encoder.identity, encoder.texts(prompts), keep=True)
    result = looked(config)
    assert result["verdict"] == "not_enough_data" and result["tested"], "statistics were"
    why = "7 served prompts so far; a look compares from 20 on"
    assert result["streams"] == {"prompts": {**result["streams"]["prompts"], "n_window": 7, "why": why}}
    assert f"prompts: not tested: {why}" in result["reasons"]


def test_rejected_arrivals_count_and_what_is_no_arrival_yet_is_told(
    world: Path, workspace: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    put(source, "base", range(30))
    for number in range(10):
        (source / f"small-{number}.png").write_bytes(to_png(Image.new("RGB", (4, 4), (number, 0, 0))))
        (source / f"small-{number}.txt").write_text("too small")
    (source / "alone.png").write_bytes(to_png(Image.new("RGB", (40, 40))))
    result = looked(config_of(workspace, source))
    assert (result["window"]["pictures"], result["window"]["rejected"], result["new_images"]) == (30, 10, 30)
    assert result["statistics"]["rejected"]["window"] == 0.25 and result["statistics"]["rejected"]["reference"] == 0.0
    assert result["window"]["waiting"] == {NO_CAPTION_YET: 1}
    assert any(f"{NO_CAPTION_YET} 1" in reason for reason in result["reasons"])


def test_arrivals_without_captions_are_told_and_never_compared(world: Path, workspace: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, "drifted", range(30))
    for caption in source.glob("*.txt"):
        caption.unlink()
    result = looked(config_of(workspace, source))
    assert (result["verdict"], result["new_images"], result["spent"]) == ("not_enough_data", 0, 0.0)
    assert f"30 files are no arrivals yet: {NO_CAPTION_YET} 30" in result["reasons"]


def test_files_that_may_still_change_are_waited_for(world: Path, workspace: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, "base", range(30))
    config = with_overrides(config_of(workspace, source), {"monitor.settle_s": 60.0})
    assert looked(config)["window"]["waiting"] == {CHANGING: 30}
    assert looked(config, days=61 / DAY_S)["window"]["pictures"] == 30
    quick = with_overrides(config_of(workspace, world / "same"), {"monitor.settle_s": 0.01})
    assert monitor.run(quick, wait=True)["window"]["pictures"] == ARRIVALS


def test_a_folder_that_shrinks_takes_its_pictures_out_of_the_window(
    world: Path, workspace: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(world / "new", source)
    config = config_of(workspace, source)
    assert looked(config)["verdict"] == "drift"
    for path in sorted(source.iterdir())[60:]:
        path.unlink()
    less = looked(config, days=1e-5)
    assert (less["window"]["pictures"], less["verdict"], less["tested"]) == (30, "not_enough_data", False)
    assert any("60 pictures of the sample are gone" in reason for reason in less["reasons"])
    assert looked(config, days=2e-5)["verdict"] == "not_enough_data", "what was said of the others stands no more"
    assert looked(config, days=1)["verdict"] == "drift"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("champion", RegistryError, "monitor expected a champion of nobody .* fresco promote RUN_ID"),
        ("source", InputError, "data.source expected captioned pictures at .*gone.*check the path"),
        ("emblems", InputError, "data.source expected a folder or an s3:// prefix .* which never grows"),
        ("data", InputError, "models:/fresco/1 expected its data fresco@.* found it gone"),
        ("pixels", InputError, "models:/fresco/1 expected the pixels of its held-out pictures .* found them gone"),
    ],
)
def test_bad_input_is_one_clear_message(
    damage: str, error: type[Exception], message: str, world: Path, workspace: Path
) -> None:
    config = config_of(workspace, world / "same")
    if damage == "champion":
        config = with_overrides(config, {"name": "nobody"})
    if damage == "source":
        config = with_overrides(config, {"data.source": str(workspace / "gone")})
    if damage == "emblems":
        config = with_overrides(config, {"data.source": "emblems://drifted"})
    if damage == "data":
        shutil.rmtree(workspace / "data")
    if damage == "pixels":
        shutil.rmtree(workspace / "encoded")
        shutil.rmtree(workspace / "monitor")
    with pytest.raises(error, match=message):
        monitor.run(config)
    assert told(workspace) == []


def test_two_monitors_at_once_spend_once(world: Path, workspace: Path) -> None:
    config = config_of(workspace, world / "same")
    at = pinned_s(config)
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: results.append(monitor.run(config, at=at))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one["tested"] for one in results) == [False, True]
    assert results[0]["spent"] == results[1]["spent"] == state(workspace)["ledger"]["spent"]
    assert (state(workspace)["ledger"]["looks"], len(told(workspace))) == (1, 1)


def test_a_monitor_killed_before_its_line_has_it_written_by_the_next(
    world: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(workspace, world / "same")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(monitor, "append_journal", killed)
        looked(config)
    assert told(workspace) == []
    assert not looked(config)["tested"]
    assert [line["tested"] for line in told(workspace)] == [True]
    assert looked(config)["spent"] == told(workspace)[0]["spent"]
    assert len(told(workspace)) == 1


def test_plan_touches_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path / "workspace", tmp_path)
    assert all(isinstance(text, str) and text for text in monitor.plan(config))
    assert list(tmp_path.iterdir()) == []
