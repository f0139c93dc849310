"""The whole verb on real files, a real tiny base and a real Ray session of two logical CPUs."""

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from cluster import artifacts
from components.dataset import SPLITS
from components.encode import EMPTY_ROW, open_latents, open_text, read_pictures
from components.errors import DataError, InputError
from components.models import make_tiny, save_parts
from components.store import ShardStore
from flows import prepare
from flows.config import Config, load_config
from flows.encode import ensure_encoded

ROOT = Path(__file__).parents[2]
NUM_PICTURES = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_parts(make_tiny("stable_diffusion"), directory)
    return directory


def config_of(tmp_path: Path, source: Path | str, base: Path | None = None, **data: Any) -> Config:
    overrides = [f"data.source={source}", "data.resolution_px=16", "data.validation_fraction=0.2"]
    overrides += [f"data.{key}={value}" for key, value in data.items()]
    overrides += [f"model.base={base}", "train.freezing=denoiser", "placement.workers=2"]
    return load_config(overrides=overrides, workspace=str(tmp_path / "workspace"))


def write_folder(folder: Path, count: int = NUM_PICTURES) -> Path:
    """Noise pictures 000.png ... with captions in metadata.jsonl."""
    folder.mkdir(parents=True)
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index:03}.png")
    write_captions(folder, {f"{index:03}.png": f"caption {index}" for index in range(count)})
    return folder


def write_captions(folder: Path, captions: dict[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def rows_by_shard(config: Config, kind: str) -> dict[str, int]:
    """Shard name -> number of rows, over the stores of one kind."""
    stores = Path(config.workspace).glob(f"encoded/{kind}-*/*.parquet")
    return {path.name: pq.read_metadata(path).num_rows for path in stores}


def workspace_files(config: Config) -> list[Path]:
    return [path for path in Path(config.workspace).rglob("*") if path.is_file()]


def test_prepare_encodes_once_and_afterwards_only_what_changed(
    ray_session: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "source")
    config = config_of(tmp_path, source, base)
    result = prepare.run(config)
    assert result["images"] == NUM_PICTURES == sum(result[split] for split in SPLITS)
    assert result["rejected"] == {}
    assert sum(rows_by_shard(config, "latents").values()) == NUM_PICTURES
    assert sum(rows_by_shard(config, "text").values()) == NUM_PICTURES + 1

    dataset = prepare.ensure_dataset(config)
    paths = ensure_encoded(config, dataset, base, with_text=True)
    train = dataset.split("train")
    latents, text = open_latents(paths.latents["train"]), open_text(paths.text["train"])
    assert latents.mean.shape == latents.spread.shape == (len(train), 4, 4, 4)
    assert text.rows.shape == (len(train),)
    assert EMPTY_ROW not in text.rows
    assert read_pictures(paths.pixels, [train[0].sha256])[0].size == (16, 16)

    before = {path: path.stat().st_mtime_ns for path in workspace_files(config)}
    capsys.readouterr()
    assert prepare.run(config) == result
    assert {path: path.stat().st_mtime_ns for path in workspace_files(config)} == before
    assert "complete for this source, nothing to do" in capsys.readouterr().err

    Image.new("RGB", (30, 30), (9, 9, 9)).save(source / "007.png")
    shards = {kind: rows_by_shard(config, kind) for kind in ("pixels", "latents", "text")}
    changed = prepare.run(config)
    assert changed["dataset"] != result["dataset"]
    for kind, grown_by in (("pixels", 1), ("latents", 1), ("text", 0)):
        after = rows_by_shard(config, kind)
        assert shards[kind].items() <= after.items()
        assert sum(after.values()) - sum(shards[kind].values()) == grown_by, kind

    source.rename(tmp_path / "renamed")
    moved = config_of(tmp_path, tmp_path / "renamed", base)
    shards = {kind: rows_by_shard(config, kind) for kind in ("pixels", "latents", "text")}
    assert prepare.run(moved) == changed
    assert {kind: rows_by_shard(config, kind) for kind in shards} == shards


def test_every_rejection_is_counted_and_listed_and_the_rest_is_kept(ray_session: Any, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (20, 20)).save(secret)
    (source / "link.png").symlink_to(secret)
    (source / "zero.png").write_bytes(b"")
    (source / "text.png").write_text("not a picture")
    (source / "cut.png").write_bytes((source / "000.png").read_bytes()[:600])
    (source / "copy.png").write_bytes((source / "000.png").read_bytes())
    (source / "uncaptioned.png").write_bytes((source / "000.png").read_bytes())
    Image.new("RGB", (20, 8)).save(source / "small.png")
    Image.new("1", (1001, 1000)).save(source / "bomb.png")
    bad = ["link.png", "zero.png", "text.png", "cut.png", "small.png", "bomb.png", "gone.png", "../secret.png"]
    captions = {f"{index:03}.png": f"caption {index}" for index in range(NUM_PICTURES)}
    captions |= dict.fromkeys(bad, "x") | {"copy.png": "a smaller caption", "001.png": "  ", "002.png": "\n 猫と犬 \t"}
    write_captions(source, captions)
    config = config_of(tmp_path, source, max_pixels=1_000_000, max_rejected_fraction=0.5)
    dataset = prepare.ensure_dataset(config)
    card = artifacts.read_json(dataset.directory / "card.json")
    assert card["rejected"] == {
        "path_outside_source": 2,
        **dict.fromkeys(("decompression_bomb", "duplicate_bytes", "empty_caption", "missing_file", "no_caption"), 1),
        **dict.fromkeys(("too_small", "truncated", "unreadable", "zero_bytes"), 1),
    }
    assert {"uri": str(source / "000.png"), "reason": "duplicate_bytes"} in card["rejected_items"]
    assert len(dataset.items) == NUM_PICTURES - 1
    assert {"a smaller caption", "猫と犬"} <= {item.caption for item in dataset.items}


def test_past_the_limit_it_fails_with_the_table_and_leaves_nothing(ray_session: Any, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    for index in range(5):
        (source / f"{index:03}.png").write_text("not a picture")
    config = config_of(tmp_path, source)
    with pytest.raises(
        DataError, match=r"at most 10% .* found 12\.5% \(35 usable\):\n +5  unreadable .*000\.png\n +5  of 40"
    ):
        prepare.ensure_dataset(config)
    assert workspace_files(config) == []


def test_the_same_pictures_from_any_place_layout_and_order_are_one_dataset_version(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_endpoint: str
) -> None:
    source = write_folder(tmp_path / "source")
    first = prepare.ensure_dataset(config_of(tmp_path, source))

    texts = tmp_path / "texts"
    (texts / "sub").mkdir(parents=True)
    for index in reversed(range(NUM_PICTURES)):
        shutil.copy(source / f"{index:03}.png", texts / "sub" / f"{99 - index}.png")
        (texts / "sub" / f"{99 - index}.txt").write_text(f"caption {index}\n")
    assert prepare.ensure_dataset(config_of(tmp_path, texts)).id == first.id

    images = [{"bytes": (source / f"{index:03}.png").read_bytes(), "path": None} for index in range(NUM_PICTURES)]
    table = pa.table({"image": images, "text": [f"caption {index}" for index in range(NUM_PICTURES)]})
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=15)
    assert prepare.ensure_dataset(config_of(tmp_path, tmp_path / "one.parquet")).id == first.id

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    bucket, client = f"bucket-{uuid.uuid4().hex[:8]}", boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    for path in source.iterdir():
        client.upload_file(str(path), bucket, f"set/{path.name}")
    elsewhere = tmp_path / "elsewhere"
    from_s3 = prepare.ensure_dataset(config_of(elsewhere, f"s3://{bucket}/set"))
    assert from_s3.id == first.id
    assert from_s3.items[0].uri.startswith(f"s3://{bucket}/set/")


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_built_in_data_is_prepared_and_growing_it_keeps_every_split(ray_session: Any, tmp_path: Path) -> None:
    few = prepare.ensure_dataset(config_of(tmp_path, "emblems://base?count=30&seed=3"))
    more = prepare.ensure_dataset(config_of(tmp_path, "emblems://base?count=50&seed=3"))
    assert (len(few.items), len(more.items)) == (30, 50)
    split = {item.sha256: item.split for item in more.items}
    assert all(split[item.sha256] == item.split for item in few.items)


def test_a_dataset_whose_pixels_are_gone_is_examined_again(ray_session: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path, "emblems://base?count=30&seed=3")
    dataset = prepare.ensure_dataset(config)
    shutil.rmtree(Path(config.workspace) / "encoded")
    assert prepare.find_dataset(config) is None
    assert prepare.ensure_dataset(config) == dataset
    assert len(ShardStore(next(Path(config.workspace).glob("encoded/pixels-*"))).keys()) == 30


def make_source(kind: str, tmp_path: Path) -> Path:
    folder = tmp_path / kind
    if kind != "missing":
        folder.mkdir()
    if kind == "uncaptioned":
        Image.new("RGB", (20, 20)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"expected captioned pictures at '.*missing', found nothing there; check the path"),
        ("empty", r"found an empty folder; put in metadata\.jsonl"),
        ("uncaptioned", r"expected captions, found 1 pictures and no caption"),
    ],
)
def test_a_source_that_holds_nothing_usable_is_refused_before_anything_is_written(
    kind: str, message: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, make_source(kind, tmp_path))
    with pytest.raises(InputError, match=message):
        prepare.ensure_dataset(config)
    assert not Path(config.workspace).exists()


def test_a_bucket_that_does_not_exist_is_named_as_what_is_wrong(bucket: str, tmp_path: Path) -> None:
    found = (
        r"data\.source expected captioned pictures at 's3://no-such-bucket/set', found: .*bucket 'no-such-bucket' does"
    )
    with pytest.raises(InputError, match=found + " not exist; create it, or correct the name"):
        prepare.ensure_dataset(config_of(tmp_path, "s3://no-such-bucket/set"))
    assert not Path(config_of(tmp_path, "x").workspace).exists()


def test_another_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a folder, s3://bucket/prefix or emblems://WORLD, found 'gs://b'"):
        prepare.ensure_dataset(config_of(tmp_path, "gs://b"))


def test_a_text_file_named_png_is_rejected_by_its_content(ray_session: Any, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").write_text("hello")
    (tmp_path / "source" / "a.txt").write_text("a caption")
    with pytest.raises(DataError, match=r"found 100\.0% \(0 usable\):\n +1  unreadable"):
        prepare.ensure_dataset(config_of(tmp_path, tmp_path / "source"))


def test_a_base_that_is_no_model_is_refused_before_the_source_is_read(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path / "missing", base=tmp_path)
    with pytest.raises(InputError, match=r"model expected a diffusers directory"):
        prepare.run(config)
    assert not Path(config.workspace).exists()


def test_a_split_without_pictures_is_an_error_that_says_so(ray_session: Any, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", count=1)
    with pytest.raises(DataError, match=r"none in .*train.* \(1 candidates, 1 accepted\); add pictures"):
        prepare.ensure_dataset(config_of(tmp_path, source))


def test_the_plan_tells_the_steps_and_touches_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path / "missing")
    assert any("10%" in line for line in prepare.plan(config))
    assert not Path(config.workspace).exists()


def test_importing_the_flow_does_not_import_torch_or_ray() -> None:
    code = "import sys, flows.prepare; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False False\n"
