"""Compiled denoisers: their pictures are the plain one's, nothing compiles while they serve, failures leave it plain.

Most tests give `torch.compile` a backend that runs what it is handed, so they need no C++ compiler: what is captured,
for which shapes and when, is PyTorch's own doing there as with the real backend. One test runs that where g++ is.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from components.compiled import CompiledDenoiser, with_compiled
from components.draw_requests import Done, DrawRequest, Event
from components.engine_status import EngineLimits
from components.models import Parts, make_tiny
from components.sampler import PictureRequest, draw
from components.step_batch import StepBatchEngine

SIDE = {"width_px": 16, "height_px": 16}
BUCKETS = (1, 2, 4)


class Compiler:
    """A backend of `torch.compile` that runs each graph as it is and counts them."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.num_graphs = self.num_calls = 0
        self.change = change

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.num_graphs += 1

        def run(*arguments: Any) -> Any:
            self.num_calls += 1
            outputs = graph.forward(*arguments)
            return outputs if self.change is None else tuple(self.change(one) for one in outputs)

        return run


@pytest.fixture(autouse=True)
def no_code_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["stable_diffusion", "z_image"])
def parts(request: pytest.FixtureRequest) -> Parts:
    return make_tiny(request.param)


def picture(prompt: str = "a red circle", **options: Any) -> PictureRequest:
    return PictureRequest(prompt, **{"steps": 3, **SIDE, **options})


MIXED = [
    picture(seed=1),
    picture("word " * 40, seed=2, steps=5, guidance_scale=6.0),
    picture(seed=3, steps=2, guidance_scale=0.0),
    picture(seed=4),
]


def draw_in_engine(
    versions: dict[str, Parts], rows: list[PictureRequest], buckets: tuple[int, ...] = BUCKETS
) -> dict[str, list[Any]]:
    """Draw the rows with every version, requests joining between steps."""
    ended: dict[str, Event] = {}
    engine = StepBatchEngine(EngineLimits(max_batch_rows=4, row_buckets=buckets))
    for name, parts in versions.items():
        engine.load(name, parts, serve=False)
    engine.start()
    for name in versions:
        for number, row in enumerate(rows):
            request = DrawRequest(f"{name} {number}", (row,))
            engine.submit(request, lambda event: ended.update({event.request_id: event}), name)
    engine.close()
    pictures: dict[str, list[Any]] = {name: [] for name in versions}
    for name in versions:
        for number in range(len(rows)):
            event = ended[f"{name} {number}"]
            assert isinstance(event, Done), event
            pictures[name] += event.pictures
    return pictures


def check_alike(found: list[Any], parts: Parts, rows: list[PictureRequest], levels: int = 1) -> None:
    for own, row in zip(found, rows, strict=True):
        alone = draw(parts, [row])[0]
        assert np.abs(np.asarray(own).astype(int) - np.asarray(alone).astype(int)).max() <= levels, row
    assert all(np.asarray(own).std() > 1 for own in found), "a flat picture would equal anything"


def test_every_call_of_the_engine_is_compiled_beforehand_and_draws_the_plain_pictures(parts: Parts) -> None:
    compiler = Compiler()
    compiled = with_compiled(parts, BUCKETS, [(16, 16)], compiler)
    assert compiled.compiled is not None and parts.compiled is None
    assert {shape[0] for shape, _ in compiled.compiled.shapes} == set(BUCKETS)
    theirs = dict(compiled.compiled.denoiser.named_parameters())
    assert theirs and all(theirs[name] is own for name, own in parts.denoiser.named_parameters()), "no second copy"
    graphs, calls = compiler.num_graphs, compiler.num_calls
    assert graphs >= len(BUCKETS)
    found = draw_in_engine({"v1": compiled}, MIXED)["v1"]
    assert compiler.num_graphs == graphs, "something was compiled while pictures waited"
    assert compiler.num_calls > calls + 5, "the compiled code drew"
    check_alike(found, parts, MIXED)
    calls, others = compiler.num_calls, [picture(width_px=32), picture(seed=2, width_px=32, height_px=32)]
    check_alike(draw_in_engine({"v1": compiled}, others)["v1"], parts, others)
    assert (compiler.num_graphs, compiler.num_calls) == (graphs, calls), "other sizes take the plain denoiser"


def test_code_holds_for_the_threads_that_draw_whatever_number_the_compiling_one_has(parts: Parts) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    other = threading.Thread(target=torch.set_num_threads, args=(1,))  # for threads that first compute from now on
    other.start()
    other.join()
    try:
        compiler = Compiler()
        compiled = with_compiled(parts, BUCKETS, [(16, 16)], compiler)
        graphs = compiler.num_graphs
        draw_in_engine({"v1": compiled}, MIXED[:1])
        assert compiler.num_graphs == graphs
    finally:
        torch.set_num_threads(before)


def test_two_versions_keep_their_own_weights_however_many_were_compiled_before() -> None:
    """Compiled code is shared between models of one shape, and PyTorch stops at 8 or 256 variants of a function."""
    compiler = Compiler()
    for seed in range(9):
        with_compiled(make_tiny("stable_diffusion", seed=seed), (2,), [(16, 16)], compiler)
    graphs, calls = compiler.num_graphs, compiler.num_calls
    models = {f"v{seed}": make_tiny("stable_diffusion", seed=seed) for seed in (20, 21)}
    versions = {name: with_compiled(model, (2,), [(16, 16)], compiler) for name, model in models.items()}
    assert compiler.num_graphs == graphs, "a swap between models of one shape compiles nothing"
    rows = [picture(seed=1), picture(seed=2)]
    found = draw_in_engine(versions, rows, (2,))
    for name, model in models.items():
        check_alike(found[name], model, rows)
    assert compiler.num_calls >= calls + 2 * (1 + 3), "both were still drawn by compiled code"
    apart = np.asarray(found["v20"][0]).astype(int) - np.asarray(found["v21"][0]).astype(int)
    assert np.abs(apart).max() > 1, "two models that draw alike would prove nothing"


def test_what_cannot_be_compiled_draws_with_the_plain_denoiser_and_says_why(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\n" + "advice " * 200)

    kept = with_compiled(parts, BUCKETS, [(16, 16)], broken)
    assert kept is parts
    (record,) = [record for record in caplog.records if record.name == "components.compiled"]
    assert record.levelname == "WARNING" and "no C++ compiler was found" in record.getMessage()
    assert "serve.compile=false" in record.getMessage() and len(record.getMessage()) < 700
    check_alike(draw_in_engine({"v1": kept}, MIXED[:1])["v1"], parts, MIXED[:1])


def test_code_that_computes_something_else_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    parts = make_tiny("stable_diffusion")
    assert with_compiled(parts, (2,), [(16, 16)], Compiler(lambda tensor: tensor * 1.5)) is parts
    assert "compiled predictions differ by 0.500" in caplog.text


def test_a_bf16_denoiser_is_compiled_too() -> None:
    parts = make_tiny("stable_diffusion")
    for module in (parts.text_encoder, parts.denoiser):
        module.to(torch.bfloat16)
    compiler = Compiler()
    compiled = with_compiled(parts, (2,), [(16, 16)], compiler)
    calls = compiler.num_calls
    check_alike(draw_in_engine({"v1": compiled}, MIXED[:1], (2,))["v1"], parts, MIXED[:1])
    assert compiler.num_graphs == 1 and compiler.num_calls == calls + MIXED[0].steps


def test_status_tells_how_many_shapes_are_compiled() -> None:
    plain = make_tiny("stable_diffusion")
    shapes = frozenset({((1, 4, 4, 4), 1), ((2, 4, 4, 4), 1)})
    engine = StepBatchEngine(EngineLimits(row_buckets=(1, 2)))
    assert engine.status().compiled_shapes == 0
    engine.load("v1", plain.with_modules(compiled=CompiledDenoiser(plain.denoiser, shapes)))
    assert engine.status().compiled_shapes == 2
    engine.load("v2", plain)
    assert engine.status().compiled_shapes == 0
    engine.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's own backend needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own imports
def test_pytorchs_own_backend_draws_the_plain_pictures(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Slow: making C++ code of the blocks and compiling it takes minutes on two cores."""
    monkeypatch.setattr("components.compiled.MAX_TEXT_CLASSES", 1)
    parts = make_tiny("z_image")
    compiled = with_compiled(parts, (2,), [(16, 16)])
    assert compiled.compiled is not None, [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    # Fused sums round differently, by about 1e-6 of a prediction.
    check_alike(draw_in_engine({"v1": compiled}, MIXED[:1], (2,))["v1"], parts, MIXED[:1])
