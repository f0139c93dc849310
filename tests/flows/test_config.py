"""The config tree: unknown keys, overrides, YAML, and a fingerprint that placement cannot change."""

import json
import re
import traceback
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from cluster.placement import PlacementSection, ServeSection
from components.errors import InputError
from components.recipe import DataSection, EvaluateSection, GateSection, LearningRate, TrainSection
from flows import config as config_module
from flows.config import Config, known_keys, load_config, recipe_fingerprint, told_config, with_overrides
from flows.presets import PRESETS, tiny_cpu

DATASET, BASE = "emblems@0123456789ab", "ba5e00000000"
# Any valid value that differs from the default; the others are found by type below.
OTHER: dict[str, Any] = {
    "serve.safety_options": {"threshold": 0.3},
    "serve.min_replicas": 0,
    "serve.otlp_endpoint": "http://collector:4318",
    "serve.row_buckets": [2, 8],
    "train.freezing": "denoiser",
    "train.learning_rate.denoiser": 0.5,
    "train.learning_rate.text_encoder": 0.5,
    "placement.zero_stage": 3,
    "evaluate.classes": ["a red circle", "a blue square"],
    "gate.significance": 0.1,
    "gate.power": 0.9,
    "gate.anchor_prompts": ["a red circle"],
}

# What a value of a key is nothing without.
NEEDS = {"train.replay_fraction": ["train.replay_of=emblems@0123456789ab"]}


def fingerprint(config: Config, dataset: str = DATASET, base: str = BASE) -> str:
    return recipe_fingerprint(config, dataset, base)


def leaves(model: type[BaseModel], prefix: str) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, annotation, default) of every field below a section."""
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += leaves(kind, f"{prefix}.{name}")
        else:
            found.append((f"{prefix}.{name}", kind, field.get_default()))
    return found


def another(key: str, kind: Any, default: Any) -> Any:
    """Return a valid value that is not the default."""
    if key in OTHER:
        return OTHER[key]
    if get_origin(kind) is not None:  # a Literal
        return next(value for value in get_args(kind) if value != default)
    if kind is bool:
        return not default
    if kind is int:
        return default + 8
    if kind is float:
        return default / 2 or 0.25
    return f"{default}x"


def changed(key: str, value: Any) -> Config:
    return load_config(overrides=[*NEEDS.get(key, []), f"{key}={json.dumps(value)}"])


@pytest.mark.parametrize(("key", "kind", "default"), leaves(TrainSection, "train"), ids=lambda value: str(value))
def test_fingerprint_follows_every_train_field(key: str, kind: Any, default: Any) -> None:
    config, without = changed(key, another(key, kind, default)), load_config(overrides=NEEDS.get(key))
    assert config != without
    assert fingerprint(config) != fingerprint(without)


def test_fingerprint_of_a_recipe_from_before_replay_is_still_the_same() -> None:
    # Computed by the version before train had replay_of, replay_fraction and average_with_base.
    assert fingerprint(load_config(), "a@b", "c") == "d0d2fcae2667"
    spelled_out = ["train.replay_of=", "train.replay_fraction=0", "train.average_with_base=0.0"]
    assert fingerprint(load_config(overrides=spelled_out), "a@b", "c") == "d0d2fcae2667"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.replay_fraction=0.2"], "expected train.replay_of to name the dataset version"),
        (["train.freezing=lora:4", "train.average_with_base=0.1"], "found lora:4: averaged adapters"),
        (["train.replay_of=a@b", "train.replay_fraction=1"], "less than 1"),
        (["train.average_with_base=1"], "less than 1"),
    ],
)
def test_replay_and_averaging_that_cannot_be_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        *leaves(PlacementSection, "placement"),
        *leaves(ServeSection, "serve"),
        *leaves(EvaluateSection, "evaluate"),
        *leaves(GateSection, "gate"),
    ],
    ids=lambda value: str(value),
)
def test_fingerprint_ignores_every_placement_serve_evaluate_and_gate_field(key: str, kind: Any, default: Any) -> None:
    config = changed(key, another(key, kind, default))
    assert config != load_config(), "the value must have changed"
    assert fingerprint(config) == fingerprint(load_config())


def test_fingerprint_ignores_locations_and_names_and_follows_contents() -> None:
    plain = fingerprint(load_config())
    for key in ("workspace", "name", "data.source", "model.base", "model.clip"):
        assert fingerprint(load_config(overrides=[f"{key}=elsewhere"])) == plain, key
    assert fingerprint(load_config(), dataset="renamed@0123456789ab") == plain
    assert fingerprint(load_config(), dataset="emblems@ffffffffffff") != plain
    old, renamed = (load_config(overrides=[f"train.replay_of={name}@0123456789ab"]) for name in ("emblems", "renamed"))
    assert fingerprint(old) == fingerprint(renamed) != plain
    assert fingerprint(load_config(), base="000000000000") != plain
    assert fingerprint(load_config(overrides=["data.resolution_px=32"])) != plain
    assert len(plain) == 12 and int(plain, 16) >= 0


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.step=3", "train.steps"),
        ("train.learning_rte.denoiser=1", "train.learning_rate"),
        ("train.learning_rate.denoser=1", "train.learning_rate.denoiser"),
        ("placement.num_workers=3", "placement.workers"),
        ("trian.steps=3", "train"),
        ("workspce=x", "workspace"),
    ],
)
def test_unknown_key_names_the_nearest_one(override: str, nearest: str) -> None:
    with pytest.raises(
        InputError, match=rf"'{override.partition('=')[0].split('.')[0]}.* is unknown; nearest key: '{nearest}"
    ):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate.denoiser=1e-4", 1e-4),
        ("train.learning_rate.denoiser=5E-05", 5e-5),
        ("train.learning_rate.denoiser=0.25", 0.25),
        ("train.learning_rate.denoiser = 1", 1.0),
        ("train.steps=600", 600),
        ("train.gradient_checkpointing=true", True),
        ("train.freezing=lora:8", "lora:8"),
        ("placement.zero_stage=3", 3),
        ("placement.zero_stage=auto", "auto"),
        ("model.base=", ""),
        ("model.base=~/models/my base", "~/models/my base"),
        ("data.source=emblems://drifted?count=10&seed=1", "emblems://drifted?count=10&seed=1"),
        ("train.steps=1e3", 1000),
        ("name='123'", "123"),
        ("name='1e-4'", "1e-4"),
    ],
)
def test_set_reads_values_as_people_write_them(override: str, value: Any) -> None:
    found: Any = load_config(overrides=[override])
    for key in override.partition("=")[0].strip().split("."):
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "path=value"),
        ("=3", "path=value"),
        ("train.steps.more=3", "'steps' is a value, not a section"),
        ("train.steps=[", "not readable as YAML"),
        ("train.steps=many", r"config train\.steps: .*integer.*found 'many'"),
        ("train.steps=0", r"config train\.steps: .*greater than or equal to 1.*found 0"),
        ("train.freezing=nothing", r"config train: freezing plan expected to be one of denoiser"),
        ("train.optimizer=adam", r"config train\.optimizer: .*'adamw' or 'sgd'.*found 'adam'"),
        ("train.seed=99999999999999999999", r"config train\.seed: .*less than"),
        ("data.resolution_px=60", r"config data\.resolution_px: .*multiple of 8"),
        ("train=3", r"config train: .*found 3"),
        ("evaluate.classes=[a cat]", r"config evaluate\.classes: expected none, or at least 2 different texts"),
    ],
)
def test_wrong_values_are_input_errors_with_path_and_value(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(overrides=[override])


@pytest.mark.parametrize("address", ["http://me:wo-rd7@host:5000", "http://me:wo/rd7@host", "http://me:wo@rd7@host"])
def test_tracking_server_with_a_password_in_its_address_is_refused_with_the_variables_and_without_the_password(
    address: str, tmp_path: Path
) -> None:
    written = tmp_path / "fresco.yaml"
    written.write_text(f"placement: {{tracking_uri: '{address}'}}\n")
    for read in (
        lambda: load_config(overrides=[f"placement.tracking_uri={address}"]),
        lambda: load_config(str(written)),
        lambda: with_overrides(load_config(), {"placement.tracking_uri": address}),
    ):
        with pytest.raises(InputError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as error:
            read()
        shown = "".join(traceback.format_exception(error.value))
        assert "rd7" not in shown and "me:wo" not in shown


def test_later_overrides_win_and_the_workspace_option_wins_over_all() -> None:
    config = load_config(overrides=["train.steps=1", "train.steps=2", "workspace=a"], workspace="b")
    assert config.train.steps == 2 and config.workspace == "b"


def test_yaml_file_has_the_same_tree_and_missing_keys_take_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  steps: 7\n  learning_rate: {denoiser: 3e-4}\nplacement: {workers: 1}\n")
    config = load_config(str(path))
    assert config.train.steps == 7 and config.train.learning_rate.denoiser == 3e-4
    assert config.train.learning_rate.text_encoder == LearningRate().text_encoder
    assert config.placement.zero_stage == "auto"


def test_printed_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(overrides=["train.freezing=lora:4", "placement.workers=4", "train.clip_norm=1e-5"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    assert load_config(str(path)) == config


def test_empty_yaml_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("")
    assert load_config(str(path)) == Config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "mapping of sections .*found a list"),
        (b"train: [", "expected YAML"),
        (b"\xff\xfe\x00", "expected YAML"),
        (b"trian: {}\n", "'trian' is unknown; nearest key: 'train"),
        (b"train:\n", r"config train: .*found None"),
    ],
    ids=["list", "cut", "binary", "unknown", "empty section"],
)
def test_files_that_are_no_config_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_config(str(path))


def test_missing_file_folder_unknown_preset_and_both_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found nothing at '.*none\.yaml'"):
        load_config(str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match="--config"):
        load_config(str(tmp_path))
    with pytest.raises(InputError, match=f"one of {', '.join(PRESETS)}, found 'tiny'"):
        load_config(preset="tiny")
    with pytest.raises(InputError, match="one at a time"):
        load_config("a.yaml", "tiny_cpu")


def test_without_config_and_preset_it_is_tiny_cpu() -> None:
    assert load_config() == tiny_cpu()
    assert load_config(preset="tiny_cpu") == tiny_cpu()


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().train.steps = 3  # type: ignore[misc]


def test_known_keys_are_all_of_the_tree_and_every_field_has_a_note_or_a_plain_name() -> None:
    keys = known_keys()
    for key in ("workspace", "name", "data.source", "train.learning_rate.denoiser", "serve.port", "placement.offload"):
        assert key in keys
    assert len(keys) == len(set(keys))
    assert {key.split(".")[0] for key in keys} == set(Config.model_fields)
    assert DataSection().source.startswith("emblems://")


@pytest.mark.parametrize(
    ("webhook", "command", "told"),
    [
        (
            "https://chat.example:8443/hooks/T0-secret?key=secret",
            "/opt/tell --token secret",
            "https://chat.example:8443",
        ),
        ("http://[::1]:8900/secret", "sh -c 'curl https://secret'", "http://[::1]:8900"),
        ("", "", ""),
    ],
)
def test_a_config_is_told_without_what_may_be_a_secret_and_is_a_config_still(
    webhook: str, command: str, told: str
) -> None:
    receivers = {"retrain.webhook": webhook, "retrain.command": command, "retrain.webhook_secret_file": "hook.key"}
    config = with_overrides(load_config(), receivers)
    tree = told_config(config.model_dump(mode="json"))
    assert "secret" not in json.dumps(tree).replace("webhook_secret_file", "")
    assert tree["retrain"]["webhook"] == told and tree["retrain"]["command"] in ("tell", "sh", "")
    names = {path: tree["retrain"][path.partition(".")[2]] for path in receivers}
    assert Config.model_validate(tree) == with_overrides(config, names), "nothing else is changed"
    assert told_config({"train": {"steps": 3}}) == {"train": {"steps": 3}}, "a record of before there was a loop"


def test_whole_configs_are_written_as_they_may_be_told() -> None:
    whole, told = [], 0
    for path in sorted(Path(config_module.__file__).parent.glob("*.py")):
        for line in path.read_text().splitlines():
            if re.search(r"config(\.model_copy\(.*\))?\.model_dump\((mode=\"json\")?\)", line):
                told += "told_config(" in line
                whole += [] if "told_config(" in line else [f"{path.name}: {line.strip()}"]
    assert whole == ["config.py: tree = config.model_dump()"] and told >= 7, "with_overrides alone needs all of it"
