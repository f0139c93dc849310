"""The stages of the safety check, with the embedded CLIP as the classifier, and classifiers of one's own by name."""

import sys
import traceback
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.blocklist import Blocklist
from components.emblems import draw, parse_caption
from components.errors import InputError
from components.safety import (
    EMBEDDED_CLIP,
    Decision,
    Safety,
    SafetyError,
    clip_classifier,
    load_classifier,
    open_safety,
)

OWN = """
class Judge:
    def __init__(self, word): self.word = word
    def judge_prompts(self, texts): return ["own" if self.word in text else None for text in texts]
def make(word="x"): return Judge(word)
def nothing(): return object()
number = 5
"""


def emblem(caption: str) -> Image.Image:
    found = parse_caption(caption)
    assert found is not None
    return draw(found, None)


@pytest.fixture(scope="module")
def clip() -> Any:
    shapes = ["a large red circle on a white background", "a large red square on a white background"]
    return clip_classifier({"crosses": "a large red cross on a white background"}, shapes)


def test_embedded_clip_refuses_pictures_of_what_it_was_told_to(clip: Any) -> None:
    captions = [
        f"a large {colour} {shape} on a white background"
        for shape in ("cross", "circle", "square")
        for colour in ("red", "blue")
    ]
    found = Safety(classifier=clip).check_pictures([emblem(caption) for caption in captions])
    refused = Decision(False, "classifier", "crosses")
    assert found[0] == refused and [decision.allowed for decision in found[2:]] == [True] * 4


def test_embedded_clip_refuses_prompts_too(clip: Any) -> None:
    safety = Safety(classifier=clip)
    assert safety.check_prompt("a large red cross on a white background") == Decision(False, "classifier", "crosses")
    assert safety.check_prompt("a large red circle on a white background").allowed


def test_classifier_that_fails_lets_nothing_through_and_repeats_no_prompt() -> None:
    class Broken:
        def judge_prompts(self, texts: list[str]) -> list[str | None]:
            raise ValueError(f"cannot read {texts[0]}")

    with pytest.raises(SafetyError, match="found ValueError") as failed:
        Safety(classifier=Broken()).check_prompt("my secret")
    told = "".join(traceback.format_exception(failed.value))
    assert "my secret" not in told.replace('check_prompt("my secret")', "")


def test_threshold_decides(clip: Any) -> None:
    cross = emblem("a large red cross on a white background")
    certain = clip_classifier({"crosses": "a large red cross on a white background"}, ["a red cross"], threshold=1.0)
    assert Safety(classifier=clip).check_pictures([cross])[0].allowed is False
    assert Safety(classifier=certain).check_pictures([cross])[0].allowed is True


def test_blocklist_comes_first_and_without_stages_everything_passes() -> None:
    listed = Safety(Blocklist([("violence", "kill")]))
    assert listed.check_prompt("k1ll") == Decision(False, "blocklist", "violence")
    assert listed.check_prompt("draw").allowed
    assert open_safety().check_prompt("kill").allowed
    assert open_safety().check_pictures([Image.new("RGB", (8, 8))]) == [Decision(True)]
    assert listed.check_pictures([]) == []


def test_own_classifier_is_loaded_from_a_file_or_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    by_file = open_safety(classifier=f"{path}:make", options={"word": "rain"})
    assert by_file.check_prompt("rain") == Decision(False, "classifier", "own") and by_file.check_prompt("sun").allowed
    assert by_file.check_pictures([Image.new("RGB", (8, 8))])[0].allowed, "it has no opinion about pictures"
    module = types.ModuleType("my_classifier")
    exec(OWN, module.__dict__)
    monkeypatch.setitem(sys.modules, "my_classifier", module)
    assert not open_safety(classifier="my_classifier:make").check_prompt("x").allowed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("make", "module:function"),
        (":make", "module:function"),
        ("mine.py:", "module:function"),
        ("no_such_module_here:make", "importable module"),
        ("{folder}/none.py:make", "nothing at"),
        ("{folder}/mine.py:absent", "a function 'absent'"),
        ("{folder}/mine.py:number", "a function 'number'"),
        ("{folder}/mine.py:nothing", "judge_prompts or judge_pictures"),
    ],
)
def test_classifier_that_cannot_be_had_is_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    with pytest.raises(InputError, match=said):
        load_classifier(name.format(folder=tmp_path), {})


def test_wrong_options_and_answers_are_refused() -> None:
    for options in ({"refuse": {}, "allow": ["x"]}, {"refuse": {"a": "b"}, "allow": []}):
        with pytest.raises(InputError, match="one side empty"):
            clip_classifier(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="threshold"):
        clip_classifier({"a": "b"}, ["c"], threshold=0)
    short = types.SimpleNamespace(judge_prompts=lambda texts: [])
    with pytest.raises(RuntimeError, match="expected 1 answers, found 0"):
        Safety(classifier=short).check_prompt("x")
    assert EMBEDDED_CLIP.is_dir()
