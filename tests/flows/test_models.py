"""Every way to name a model, and what is said when there is none."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cluster.artifacts import open_workspace
from cluster.champion import move_champion
from cluster.errors import RegistryError
from cluster.registry import CHAMPION, TAG_MODEL_FINGERPRINT, TAG_RUN, Registry
from components.errors import InputError
from components.models import model_fingerprint
from flows.config import Config
from flows.models import keep_in_workspace, resolve_model


def register(config: Config, run_id: str) -> None:
    registry = Registry(open_workspace(config.workspace))
    found = resolve_model(config, run_id)
    tags = {**found.lineage, TAG_MODEL_FINGERPRINT: found.fingerprint}
    number = registry.register("fresco", found.directory, tags).number
    move_champion(registry, "fresco", number)


def test_run_id_its_folder_and_its_pipeline_name_the_same_run(config: Config, make_run) -> None:
    run = make_run("fresco-aaa", 0)
    by_id = resolve_model(config, "fresco-aaa")
    assert by_id.run_id == by_id.name == "fresco-aaa" and by_id.version is None
    assert by_id.directory == run / "pipeline" and by_id.dataset == "emblems@0123456789ab"
    assert by_id.fingerprint == model_fingerprint(run / "pipeline")
    assert resolve_model(config, str(run)) == by_id
    assert resolve_model(config, str(run / "pipeline")) == by_id


def test_diffusers_directory_anywhere_has_no_lineage(config: Config, tiny_pipelines) -> None:
    found = resolve_model(config, str(tiny_pipelines[0]))
    assert (found.run_id, found.version, found.dataset) == (None, None, None)
    assert found.directory == tiny_pipelines[0]


def test_registered_version_is_found_by_alias_and_by_number(config: Config, make_run) -> None:
    run = make_run("fresco-aaa", 0)
    register(config, "fresco-aaa")
    by_alias, by_number = (resolve_model(config, f"models:/fresco{end}") for end in (f"@{CHAMPION}", "/1"))
    assert by_alias.version == by_number.version == 1 and by_alias.name == "fresco"
    assert by_alias.directory == run / "pipeline" and by_alias.run_id == "fresco-aaa"
    assert by_alias.dataset == "emblems@0123456789ab" and by_alias.lineage[TAG_RUN] == "fresco-aaa"


def test_registered_version_whose_weights_changed_is_refused(config: Config, make_run, tiny_pipelines) -> None:
    run = make_run("fresco-aaa", 0)
    register(config, "fresco-aaa")
    shutil.rmtree(run / "pipeline")
    shutil.copytree(tiny_pipelines[1], run / "pipeline")
    with pytest.raises(RegistryError, match="the files changed after they were registered"):
        resolve_model(config, "models:/fresco@champion")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models:/fresco", r"models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/fresco/two", r"models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("fresco-aab", r"no run in .*; runs there: fresco-aaa"),
        ("", r"expected as a diffusers directory, a run id"),
        ("/no/such/folder", r"expected as a diffusers directory, a run id"),
        ("half", r"run 'half' expected to be finished"),
        (".", r"found a folder without it"),
    ],
)
def test_wrong_name_is_answered_with_what_was_tried(
    config: Config, make_run, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("fresco-aaa", 0)
    open_workspace(config.workspace).run_dir("half").mkdir(parents=True)
    with pytest.raises(InputError, match=said):
        resolve_model(config, text)


def test_missing_alias_and_version_are_registry_errors(config: Config, make_run) -> None:
    with pytest.raises(RegistryError, match="no version of it; set the alias with: fresco promote"):
        resolve_model(config, "models:/fresco@champion")
    make_run("fresco-aaa", 0)
    register(config, "fresco-aaa")
    with pytest.raises(RegistryError, match="found versions: 1;"):
        resolve_model(config, "models:/fresco/9")


def test_folder_of_an_unknown_architecture_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    with pytest.raises(InputError, match="OtherPipeline"):
        resolve_model(config, str(tmp_path))


def test_model_from_outside_is_kept_in_the_workspace_without_pickles(config: Config, tiny_pipelines, tmp_path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(tiny_pipelines[0], outside)
    (outside / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    workspace = open_workspace(config.workspace)
    found = resolve_model(config, str(outside))
    kept = keep_in_workspace(workspace, found)
    shutil.rmtree(outside)
    assert kept.is_relative_to(workspace.root) and model_fingerprint(kept) == found.fingerprint
    assert not list(kept.rglob("*.bin")) and not list(kept.parent.glob(".unfinished*"))
    inside = resolve_model(config, str(kept))
    assert keep_in_workspace(workspace, inside) == kept


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="models")
    yield "models"
    server.stop()


def test_s3_prefix_is_downloaded_once_and_again_when_it_changes(config: Config, tiny_pipelines, bucket: str) -> None:
    s3 = boto3.client("s3")

    def upload(pipeline: Path) -> None:
        for path in pipeline.rglob("*"):
            if path.is_file():
                s3.upload_file(str(path), bucket, f"tiny/{os.fspath(path.relative_to(pipeline))}")

    upload(tiny_pipelines[0])
    first = resolve_model(config, f"s3://{bucket}/tiny/")
    assert first.fingerprint == model_fingerprint(tiny_pipelines[0]) and first.name == f"s3://{bucket}/tiny/"
    assert resolve_model(config, f"s3://{bucket}/tiny").directory == first.directory
    upload(tiny_pipelines[1])
    assert resolve_model(config, f"s3://{bucket}/tiny").fingerprint == model_fingerprint(tiny_pipelines[1])
    with pytest.raises(InputError, match=r"model_index\.json\) at s3://models/nothing, found nothing"):
        resolve_model(config, f"s3://{bucket}/nothing")
