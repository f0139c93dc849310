"""What the monitor's encoder sees: the same rows from this process and from Ray Data, and nothing computed twice."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose
from PIL import Image

from cluster.artifacts import open_workspace
from components.drift_features import FeatureJob, read_pictures_seen, read_texts_seen
from components.encode import pixels_name
from components.examine import PIXELS_SCHEMA
from components.images import to_png
from components.store import ShardStore
from flows import features
from flows.config import Config, load_config

SIDE_PX = 16
CAPTIONS = [f"a red circle, number {number}" for number in range(5)]


def pictures_of(config: Config) -> list[str]:
    """Lay six preprocessed pictures into the workspace's pixel store; return their keys."""
    rows = []
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        png = to_png(Image.fromarray(noise))
        key = hashlib.sha256(png).hexdigest()
        rows.append({"key": key, "png": png, "width_px": SIDE_PX, "height_px": SIDE_PX})
    store = open_workspace(config.workspace).encoded / pixels_name(SIDE_PX)
    ShardStore(store).write(pa.Table.from_pylist(rows, schema=PIXELS_SCHEMA))
    return [row["key"] for row in rows]


def encoded(config: Config, keys: list[str]) -> FeatureJob:
    eye = features.monitor_eye(config)
    return features.ensure_features(config, open_workspace(config.workspace), eye, keys, CAPTIONS)


def config_of(clip: Path, workspace: Path) -> Config:
    overrides = [f"data.resolution_px={SIDE_PX}", f"monitor.encoder={clip}", "placement.workers=2"]
    return load_config(overrides=overrides, workspace=str(workspace))


def files_of(job: FeatureJob) -> list[tuple[str, int]]:
    return [(str(path), path.stat().st_mtime_ns) for store in (job.pictures, job.texts) for path in store.rglob("*")]


def test_rows_from_ray_data_are_those_of_this_process_and_a_second_call_encodes_nothing(
    clip_directory: Path,
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, there = (config_of(clip_directory, tmp_path / name) for name in ("here", "there"))
    keys = pictures_of(here)
    assert pictures_of(there) == keys
    one = encoded(here, keys)

    monkeypatch.setattr(features, "HANDFUL", 0)
    pools: list[Any] = []
    map_blocks = features.map_blocks

    def mapped(*given: Any) -> Any:
        pools.append(given[3])
        return map_blocks(*given)

    monkeypatch.setattr(features, "map_blocks", mapped)
    other = encoded(there, keys)
    assert [pool.actors for pool in pools] == [2], "on Ray Data"
    assert one.pictures != other.pictures
    mine, theirs = read_pictures_seen(one.pictures, keys), read_pictures_seen(other.pictures, keys)
    assert set(mine) == set(theirs) and len(mine["picture_row"]) == len(keys)
    for name in mine:  # a process of its own may have another number of threads, so other sums of the same products
        assert_allclose(theirs[name], mine[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert_allclose(read_texts_seen(other.texts, CAPTIONS), read_texts_seen(one.texts, CAPTIONS), rtol=1e-5, atol=1e-6)

    files = files_of(other)
    assert "encoding 6 pictures and 5 captions" in capsys.readouterr().err and len(files) >= 2
    assert encoded(there, keys) == other
    assert capsys.readouterr().err == "" and len(pools) == 1 and files_of(other) == files
