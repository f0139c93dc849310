"""Requests become orders: every field checked, every limit named, forms read as JSON is."""

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.resources.images import Images
from pydantic import ValidationError

from cluster.api_errors import ApiError
from cluster.images_schema import EditsRequest, ImagesRequest, make_order
from cluster.placement import ServeSection

LIMITS = ServeSection(max_images=4, max_prompt_chars=50, max_steps=30, max_side_px=64, max_partial_images=3)
INFO: dict[str, Any] = {"width_px": 16, "height_px": 24, "size_multiple_px": 8, "min_side_px": 16}
INFO |= {"schedulers": ("euler", "ddim"), "postprocess": ("sharpen", "upscale_2x")}
VIDEO_AND_VECTOR = {"frame_count", "frame_duration_ms", "svg", "markup"}
"""What belongs to formats we do not make, and a second kind of picture for edits."""


def order(**fields: Any) -> Any:
    return make_order(ImagesRequest(prompt="x", **fields), LIMITS, INFO)


def test_only_a_prompt_takes_every_default() -> None:
    asked = order()
    assert (asked.output_format, asked.quality, asked.as_url, asked.stream, asked.partial_images) == (
        *("png", 100, False, False),
        0,
    )
    assert (asked.priority, asked.deadline_s, asked.scheduler, asked.postprocess) == (5, None, None, ())
    assert asked.size == "16x24" and len(asked.rows) == 1
    assert asked.rows[0]["steps"] == LIMITS.default_steps


def test_retouched_pictures_have_a_largest_size_too() -> None:
    info = INFO | {"postprocess": ("upscale_2x", "upscale_4x"), "enlarges": {"upscale_2x": 2, "upscale_4x": 4}}
    limits = LIMITS.model_copy(update={"max_output_side_px": 192})
    make_order(ImagesRequest(prompt="x", size="24x16", postprocess=["upscale_2x", "upscale_4x"]), limits, info)
    with pytest.raises(ApiError, match=r"192 px a side \(serve.max_output_side_px\), found 256: 8 times 16x32"):
        make_order(ImagesRequest(prompt="x", size="16x32", postprocess=["upscale_2x", "upscale_4x"]), limits, info)
    # What is not enlarged is bounded by max_side_px.
    tiny = LIMITS.model_copy(update={"max_output_side_px": 8})
    assert make_order(ImagesRequest(prompt="x"), tiny, info).size == "16x24"


def test_everything_asked_for_arrives() -> None:
    fields = {"n": 2, "seed": 7, "steps": 9, "output_format": "webp", "output_compression": 30, "stream": True}
    fields |= {"partial_images": 3, "scheduler": "ddim", "deadline_s": 2.5, "priority": 0}
    asked = order(**fields, postprocess=["upscale_2x", "sharpen"], size="32x16")
    assert [row["seed"] for row in asked.rows] == [7, 8] and asked.rows[1]["width_px"] == 32
    assert (asked.output_format, asked.quality, asked.stream, asked.partial_images) == ("webp", 30, True, 3)
    assert (asked.scheduler, asked.deadline_s, asked.priority) == ("ddim", 2.5, 0)
    assert asked.postprocess == ("upscale_2x", "sharpen")
    assert order(response_format="url").as_url
    assert order(postprocess="sharpen").postprocess == ("sharpen",)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"scheduler": "heun"}, "scheduler", "euler, ddim; found 'heun'"),
        ({"postprocess": ["blur"]}, "postprocess", "sharpen, upscale_2x; found 'blur'"),
        ({"postprocess": ["sharpen", "sharpen"]}, "postprocess", "repeated"),
        ({"deadline_s": 0}, "deadline_s", "serve.max_deadline_s"),
        ({"deadline_s": 1e9}, "deadline_s", "0.001 to 600"),
        ({"priority": 10}, "priority", "0 to 9, found 10"),
        ({"partial_images": 4}, "partial_images", "0 to 3, found 4 (the limit is serve.max_partial_images)"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "0 to 100"),
        ({"output_compression": 50}, "output_compression", "png"),
        ({"stream": True, "response_format": "url"}, "response_format", "b64_json"),
        ({"size": "9" * 5000 + "x8"}, "size", "serve.max_side_px"),
        ({"size": "３２x３２"}, "size", "WIDTHxHEIGHT"),
        ({"n": 5}, "n", "serve.max_images"),
        ({"steps": 31}, "steps", "serve.max_steps"),
    ],
)
def test_what_is_out_of_its_limits_is_named(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(ApiError) as refused:
        order(**fields)
    assert (refused.value.status, refused.value.param) == (400, param) and said in refused.value.message


def test_priority_is_the_keys_own_unless_a_lower_one_is_asked() -> None:
    body = ImagesRequest(prompt="x")
    assert make_order(body, LIMITS, INFO).priority == 5
    assert [make_order(body, LIMITS, INFO, key_priority=own).priority for own in (0, 2, 8)] == [0, 2, 8]
    lower = body.model_copy(update={"priority": 5})
    assert make_order(lower, LIMITS, INFO, key_priority=8).priority == 5
    with pytest.raises(ApiError, match="0 to 2, found 3"):
        make_order(body.model_copy(update={"priority": 3}), LIMITS, INFO, key_priority=2)


def test_priority_doubles_the_share_with_each_step() -> None:
    assert [order(priority=priority).weight for priority in (0, 4, 5, 6, 9)] == [1 / 32, 0.5, 1, 2, 16]


def test_endpoint_without_choices_says_so() -> None:
    with pytest.raises(ApiError, match="one choice"):
        make_order(ImagesRequest(prompt="x", scheduler="euler"), LIMITS, {**INFO, "schedulers": ()})


@pytest.mark.parametrize(
    ("size", "own", "drawn"),
    [(None, (32, 40), "32x40"), ("auto", (33, 40), "16x24"), (None, (128, 64), "16x24"), ("64x64", (32, 40), "64x64")],
)
def test_edit_keeps_the_size_of_its_picture_where_that_can_be_drawn(
    size: str | None, own: tuple[int, int], drawn: str
) -> None:
    assert make_order(EditsRequest(prompt="x", size=size), LIMITS, INFO, own_size=own).size == drawn


def test_form_texts_mean_what_json_means() -> None:
    texts = {"prompt": "7", "n": "2", "seed": "5", "guidance_scale": "2.5", "stream": "true", "strength": "1"}
    body = EditsRequest.model_validate({**texts, "deadline_s": "3", "user": "12"})
    assert (body.prompt, body.n, body.seed, body.guidance_scale) == ("7", 2, 5, 2.5)
    assert (body.stream, body.strength, body.deadline_s, body.user) == (True, 1.0, 3.0, "12")


@given(
    st.sampled_from(["n", "seed", "steps", "guidance_scale", "stream", "strength", "priority"]), st.text(max_size=40)
)
def test_any_form_text_is_read_or_refused(field: str, text: str) -> None:
    try:
        make_order(EditsRequest.model_validate({"prompt": "x", field: text}), LIMITS, INFO)
    except (ValidationError, ApiError):
        pass


@given(st.dictionaries(st.sampled_from(sorted(ImagesRequest.model_fields)), st.none() | st.integers() | st.text()))
def test_any_values_are_ordered_within_the_limits_or_refused(fields: dict[str, Any]) -> None:
    try:
        asked = make_order(ImagesRequest.model_validate({"prompt": "x", **fields}), LIMITS, INFO)
    except (ValidationError, ApiError):
        return
    assert 1 <= len(asked.rows) <= 4 and all(1 <= row["steps"] <= 30 for row in asked.rows)
    assert all(16 <= row[side] <= 64 for row in asked.rows for side in ("width_px", "height_px"))


@pytest.mark.parametrize(("method", "model"), [("generate", ImagesRequest), ("edit", EditsRequest)])
def test_every_parameter_of_the_openai_client_is_known(method: str, model: Any) -> None:
    given_by_client = set(inspect.signature(getattr(Images, method)).parameters)
    client_own = {"self", "extra_headers", "extra_query", "extra_body", "timeout", "image", "mask"}
    assert given_by_client - client_own - VIDEO_AND_VECTOR <= set(model.model_fields)
