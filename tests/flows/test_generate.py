"""generate: files with their provenance, never one written over another, and what is said when nobody draws."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from cluster.errors import EndpointError
from components.errors import InputError
from flows import generate
from flows.config import Config
from flows.generate import Wish, write_new


def test_local_model_draws_files_that_say_what_made_them(config: Config, make_run, tmp_path: Path) -> None:
    make_run("fresco-aaa", 0)
    out = tmp_path / "pictures"
    wish = Wish(n=2, seed=5, steps=3, guidance_scale=2.0, negative_prompt="blurry", size="32x16")
    result = generate.run(config, ["a red circle ☀", "ein Quadrat"], str(out), wish, model="fresco-aaa")
    names = ["a-red-circle-seed5.png", "a-red-circle-seed6.png", "ein-quadrat-seed5.png", "ein-quadrat-seed6.png"]
    assert [Path(file).name for file in result["files"]] == names
    assert (result["seed"], result["seeds"], result["model_version"]) == (5, [5, 6, 5, 6], None)
    with Image.open(result["files"][1]) as picture:
        assert picture.size == (32, 16)
        assert picture.text == {
            "prompt": "a red circle ☀",
            "negative_prompt": "blurry",
            "seed": "6",
            "steps": "3",
            "guidance_scale": "2.0",
            "model_version": "",
            "dataset": "emblems@0123456789ab",
            "run_id": "fresco-aaa",
        }


def test_same_command_twice_keeps_the_first_files_and_draws_the_same(config: Config, make_run, tmp_path: Path) -> None:
    make_run("fresco-aaa", 0)
    first, second = (
        generate.run(config, ["x"], str(tmp_path), Wish(seed=1), model="fresco-aaa")["files"] for _ in range(2)
    )
    assert [Path(file).name for file in first + second] == ["x-seed1.png", "x-seed1-2.png"]
    assert Path(first[0]).read_bytes() == Path(second[0]).read_bytes()


def test_seeds_are_random_and_told_when_none_is_given(config: Config, make_run, tmp_path: Path) -> None:
    make_run("fresco-aaa", 0)
    seeds = {generate.run(config, ["x"], str(tmp_path), model="fresco-aaa")["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_limits_hold_locally_too(config: Config, make_run, tmp_path: Path) -> None:
    make_run("fresco-aaa", 0)
    with pytest.raises(InputError, match="n expected 1 to 3, found 4"):
        generate.run(config, ["x"], str(tmp_path), Wish(n=4), model="fresco-aaa")
    with pytest.raises(InputError, match="size expected to be auto"):
        generate.run(config, ["x"], str(tmp_path), Wish(size="17x17"), model="fresco-aaa")
    assert list(tmp_path.glob("*.png")) == []


def test_without_an_endpoint_the_two_ways_on_are_told(config: Config, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"fresco serve --detach, or draw here with --model RUN_ID"):
        generate.run(config, ["x"], str(tmp_path))
    with pytest.raises(EndpointError, match=r"expected to answer at http://127.0.0.1:9/v1/images/generations"):
        generate.run(config, ["x"], str(tmp_path), url="http://127.0.0.1:9/v1/")


def test_key_is_presented_to_the_endpoint_and_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    wish = Wish(n=2, api_key="fresco-secret")
    assert wish.body("x") == {"prompt": "x", "n": 2} and "secret" not in repr(wish)
    sent: dict[str, Any] = {}

    def answer(url: str, **options: Any) -> httpx.Response:
        sent.update(options)
        return httpx.Response(401, json={"error": {"message": "unknown key"}})

    monkeypatch.setattr(httpx, "post", answer)
    with pytest.raises(EndpointError, match="status 401: unknown key") as refused:
        generate.post("http://127.0.0.1:9/v1/images/generations", wish.body("x"), wish.api_key)
    assert sent["headers"] == {"Authorization": "Bearer fresco-secret"} and "secret" not in str(refused.value)


def test_wrong_commands_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one prompt"):
        generate.run(config, [], str(tmp_path))
    with pytest.raises(InputError, match="--model or --url, found both"):
        generate.run(config, ["x"], str(tmp_path), model="a", url="b")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red, BIG circle!", "a-red-big-circle"),
        ("☀", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 99, "x" * 40),
    ],
)
def test_file_names_come_from_the_prompt_and_stay_in_the_folder(prompt: str, name: str, tmp_path: Path) -> None:
    path = write_new(tmp_path / "new", prompt, 3, b"png")
    assert path == tmp_path / "new" / f"{name}-seed3.png" and path.read_bytes() == b"png"


def test_one_file_can_be_named_and_is_numbered_when_it_exists(tmp_path: Path) -> None:
    paths = [write_new(tmp_path / "sun.png", "x", 1, b"png") for _ in range(3)]
    assert [path.name for path in paths] == ["sun.png", "sun-2.png", "sun-3.png"]


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out expected a folder or a \.png file"):
        write_new(tmp_path / "file", "x", 1, b"png")
