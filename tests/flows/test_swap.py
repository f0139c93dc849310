"""The line-up: swaps beside the old weights and after draining, what comes back when loading fails, the challenger."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.api_errors import ApiError
from cluster.free_memory import NoTurnError
from cluster.images_schema import ImagesRequest, make_order
from cluster.painter_contract import Job, SwappingError
from cluster.placement import ServeSection
from components.draw_requests import Done, DrawRequest, Event
from components.engine_status import EngineLimits
from components.models import make_tiny, save_parts
from components.sampler import PictureRequest
from flows import swap
from flows.config import Config
from flows.loaded_model import LoadedModel, load_model
from flows.models import resolve_model
from flows.paint import painter_arguments
from flows.swap import Lineup, VersionSettings
from tests.endpoint import wait_for

PLENTY = 2**40
SMALL = 16


class Models:
    """Arguments of `load_model` by version number, over runs that `train` left; counts what is loaded."""

    def __init__(self, config: Config, make_run: Callable[[str, int], Path]) -> None:
        for name, seed in (("fresco-aaa", 0), ("fresco-bbb", 1)):
            make_run(name, seed)
        names = ("fresco-aaa", "fresco-bbb")
        told = [painter_arguments(config, resolve_model(config, name), "cpu")["model"] for name in names]
        self._told = {1: told[0], 2: told[1], 3: told[0]}
        self.loads: list[Any] = []
        self.denoisers: list[weakref.ref[Any]] = []
        """Of all that were loaded, in order, as long as somebody holds them."""
        self.while_loading: Callable[[], None] = lambda: None
        self.free = PLENTY

    def __getitem__(self, version: int) -> dict[str, Any]:
        told = self._told[version]
        return {**told, "facts": {**told["facts"], "model_version": version}}

    def broken(self, folder: Path) -> dict[str, Any]:
        parts = make_tiny("stable_diffusion", seed=0)
        parts.denoiser.conv_out.bias.data.fill_(float("nan"))
        save_parts(parts, folder)
        return {**self[2], "directory": str(folder)}

    def load(self, **arguments: Any) -> LoadedModel:
        self.loads.append(arguments["facts"]["model_version"])
        self.while_loading()
        model = load_model(**arguments)
        self.denoisers.append(weakref.ref(model.parts.denoiser))
        return model

    def lineup(self, first: Mapping[str, Any], **settings: Any) -> Lineup:
        return Lineup(first, EngineLimits(), VersionSettings(**settings), self.load, lambda device: self.free)


@pytest.fixture
def models(config: Config, make_run: Callable[[str, int], Path]) -> Models:
    return Models(config, make_run)


@contextmanager
def closing(lineup: Lineup) -> Iterator[Lineup]:
    """The engine's loop is the test's own: it steps when the test says so."""
    try:
        yield lineup
    finally:
        lineup.engine.close(drain=False)


def request(name: str, steps: int = 2) -> DrawRequest:
    return DrawRequest(name, (PictureRequest("x", steps=steps, width_px=SMALL, height_px=SMALL),))


def job(name: str, lineup: Lineup, version: int | None = None, **fields: Any) -> Job:
    order = make_order(ImagesRequest(prompt="x", **fields), ServeSection(), lineup.champion.info)
    return Job(name, order, version=version)


def finish(lineup: Lineup) -> None:
    while lineup.engine.step():
        pass


def names(lineup: Lineup) -> list[str]:
    return list(lineup.engine.status().versions)


def test_waiting_for_a_turn_at_memory_is_no_failure_of_the_version(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(models.lineup(models[1], challenger_share=0.5)) as lineup:
        monkeypatch.setattr(swap, "memory_turn", never)
        with pytest.raises(NoTurnError):
            lineup.follow(models[2], None)
        with pytest.raises(RuntimeError, match="the challenger, version 2, could not be loaded"):
            lineup.follow(models[1], models[2])
        assert lineup.counts.swap_failures == 0 and lineup.champion.version == 1


@contextmanager
def never(*_: Any, **__: Any) -> Iterator[None]:
    raise NoTurnError("another replica loads a model")
    yield


def test_while_a_version_loads_requests_are_accepted_stepped_and_finished_by_the_one_before(models: Models) -> None:
    with closing(models.lineup(models[1])) as lineup, ThreadPoolExecutor(1) as client:
        lineup.engine.start()
        ended: list[Event] = []
        steps: list[int] = []

        def draw() -> None:
            done = threading.Event()
            lineup.engine.submit(request("meanwhile", steps=5), lambda event: (ended.append(event), done.set()))  # type: ignore[func-returns-value]
            assert done.wait(60)

        def while_loading() -> None:
            steps.append(lineup.engine.counters.steps)
            client.submit(draw).result(60)  # from another thread: no lock of the swap may be needed for it
            steps.append(lineup.engine.counters.steps)

        models.while_loading = while_loading
        lineup.follow(models[2], None)
        assert isinstance(ended[0], Done) and ended[0].version == "1 (1)"
        assert steps[1] == steps[0] + 5
        assert names(lineup) == ["2 (2)"] and (lineup.counts.swaps, lineup.counts.swaps_drained) == (1, 0)


def test_where_memory_is_short_old_requests_finish_the_old_weights_go_and_the_new_ones_load(models: Models) -> None:
    with closing(models.lineup(models[1], memory_headroom_bytes=2 * PLENTY)) as lineup:
        ended: list[Event] = []
        lineup.engine.submit(request("at work"), ended.append)
        lineup.engine.step()
        lineup.engine.submit(request("waiting"), ended.append)
        left: list[Any] = []
        models.while_loading = lambda: left.append(models.denoisers[0]())
        swap = threading.Thread(target=lineup.follow, args=(models[2], None))
        swap.start()
        wait_for(lambda: lineup.waiting)
        assert "version 2 needs" in lineup.waiting and "serve.memory_headroom_bytes" in lineup.waiting
        assert lineup.numbers()["swapping"] == 1 and lineup.champion.info["model_version"] == 1
        with pytest.raises(SwappingError, match="version 2 needs"):
            lineup.choose(job("new", lineup))
        assert models.loads == [1], "not before the old rows are drawn"
        while len(ended) < 2:
            lineup.engine.step()
        swap.join(60)
        assert [event.version for event in ended if isinstance(event, Done)] == ["1 (1)", "1 (1)"]
        assert left == [None], "the old weights are gone when the new ones load"
        assert lineup.choose(job("new", lineup))[0].version == 2 and names(lineup) == ["2 (2)"]
        assert lineup.numbers()["swapping"] == 0
        assert (lineup.counts.swaps, lineup.counts.swaps_drained, lineup.counts.swap_failures) == (1, 1, 0)


def test_model_that_fails_after_draining_brings_the_old_one_back(models: Models, tmp_path: Path) -> None:
    with closing(models.lineup(models[1], memory_headroom_bytes=2 * PLENTY)) as lineup:
        lineup.engine.start()
        left: list[Any] = []
        models.while_loading = lambda: left.extend(one() for one in models.denoisers)
        with pytest.raises(RuntimeError, match="expected finite"):
            lineup.follow(models.broken(tmp_path / "broken"), None)
        assert left == [None, None, None], "one at a time: old, new, old"
        assert models.loads == [1, 2, 1] and names(lineup) == ["1 (2)"] and lineup.waiting == lineup.lost == ""
        assert lineup.choose(job("new", lineup))[0].version == 1
        assert (lineup.counts.swaps, lineup.counts.swap_failures) == (0, 1)
        ended: list[Event] = []
        lineup.engine.submit(request("after"), ended.append)
        wait_for(lambda: ended)
        assert isinstance(ended[0], Done)


def test_replica_that_has_lost_both_models_says_so_and_draws_again_with_the_next(
    models: Models, tmp_path: Path
) -> None:
    with closing(models.lineup(models[1], memory_headroom_bytes=2 * PLENTY)) as lineup:
        damaged = models.broken(tmp_path / "broken")

        def fail_to_restore() -> None:
            if models.loads == [1, 2, 1]:
                raise OSError("the disk is away")

        models.while_loading = fail_to_restore
        with pytest.raises(RuntimeError, match="no model is loaded"):
            lineup.follow(damaged, None)
        assert "expected finite" in lineup.lost and "the disk is away" in lineup.lost
        with pytest.raises(ApiError, match="no model is loaded") as refused:
            lineup.choose(job("new", lineup))
        assert refused.value.status == 503
        lineup.follow(models[2], None)
        assert lineup.lost == "" and lineup.choose(job("new", lineup))[0].version == 2


def test_model_that_fits_in_no_way_is_refused_and_nothing_is_touched(models: Models) -> None:
    with closing(models.lineup(models[1])) as lineup:
        models.free = 0
        with pytest.raises(MemoryError, match=r"0\.00 GiB are free, even without what serves"):
            lineup.follow(models[2], None)
        assert models.loads == [1] and names(lineup) == ["1 (1)"] and lineup.waiting == ""


def test_replicas_of_one_machine_look_at_its_memory_and_load_one_after_the_other(
    config: Config, make_run: Callable[[str, int], Path], tmp_path: Path
) -> None:
    """What is free is free for all: two that look at the same moment would both take it."""
    make_models = Models(config, make_run)
    looks: list[str] = []
    loading, go_on = threading.Event(), threading.Event()

    def replica(name: str, models: Models) -> Lineup:
        def free(device: str) -> int:
            looks.append(name)
            return PLENTY

        settings = VersionSettings(turns_folder=str(tmp_path / "serving"))
        return Lineup(models[1], EngineLimits(), settings, models.load, free)

    other_models = copy.copy(make_models)
    with closing(replica("one", make_models)) as one, closing(replica("other", other_models)) as other:

        def hold() -> None:
            loading.set()
            assert go_on.wait(60)

        make_models.while_loading = hold
        threads = [threading.Thread(target=lineup.follow, args=(make_models[2], None)) for lineup in (one, other)]
        threads[0].start()
        assert loading.wait(60)
        threads[1].start()
        other.engine.start()
        threads[1].join(0.3)
        assert looks == ["one"] and threads[1].is_alive(), "the other one waits, and draws on"
        go_on.set()
        for thread in threads:
            thread.join(60)
        assert looks == ["one", "other"] and {names(one)[0], names(other)[0]} == {"2 (2)"}


def test_challenger_answers_its_share_and_a_request_id_is_always_on_one_side(models: Models) -> None:
    with closing(models.lineup(models[1], challenger_share=0.3)) as lineup:
        assert {lineup.choose(job(f"request-{number}", lineup))[1] for number in range(50)} == {"champion"}
        lineup.follow(models[1], models[2])
        sides = {number: lineup.choose(job(f"request-{number}", lineup)) for number in range(1000)}
        roles = [role for _, role in sides.values()]
        # Five standard deviations of a binomial of 1,000.
        assert abs(roles.count("challenger") - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5
        assert all(loaded.version == {"champion": 1, "challenger": 2}[role] for loaded, role in sides.values())
        assert sides == {number: lineup.choose(job(f"request-{number}", lineup)) for number in range(1000)}
        assert lineup.numbers()["role_versions"] == {"champion": 1, "challenger": 2}
        lineup.follow(models[1], None)
        assert {lineup.choose(job(f"request-{number}", lineup))[1] for number in range(50)} == {"champion"}
        assert names(lineup) == ["1 (1)"] and models.loads == [1, 2]


def test_loaded_version_may_be_named_and_one_that_is_not_is_refused(models: Models) -> None:
    with closing(models.lineup(models[1], challenger_share=1e-12)) as lineup:
        lineup.follow(models[1], models[2])
        assert lineup.versions() == [1, 2]
        assert lineup.choose(job("request-1", lineup, version=2))[1] == "challenger"
        assert lineup.choose(job("request-1", lineup, version=1))[1] == "champion"
        with pytest.raises(ApiError, match=r"\[1, 2\], found 3") as refused:
            lineup.choose(job("request-1", lineup, version=3))
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_solver_that_the_challenger_does_not_know_is_the_champions(
    config: Config, models: Models, tiny_z_image: Path
) -> None:
    foreign = {**models[2], "directory": str(tiny_z_image)}
    with closing(models.lineup(models[1], challenger_share=1.0)) as lineup:
        lineup.follow(models[1], foreign)
        assert lineup.choose(job("request-1", lineup, scheduler="ddim"))[1] == "champion"
        assert lineup.choose(job("request-1", lineup, scheduler="euler"))[1] == "challenger"


def test_challenger_that_becomes_the_champion_is_not_loaded_again_and_its_rows_go_on(models: Models) -> None:
    with closing(models.lineup(models[1], challenger_share=1.0)) as lineup:
        lineup.follow(models[1], models[2])
        ended: list[Event] = []
        lineup.engine.submit(request("tried", steps=4), ended.append, version=lineup.choose(job("r", lineup))[0].name)
        lineup.engine.step()
        lineup.follow(models[2], models[2])
        assert models.loads == [1, 2] and names(lineup) == ["2 (2)"] and lineup.counts.swaps == 1
        assert lineup.numbers()["role_versions"] == {"champion": 2} and lineup.challenger is None
        finish(lineup)
        wait_for(lambda: ended)
        assert isinstance(ended[0], Done)
        lineup.follow(models[3], models[2])
        assert lineup.numbers()["role_versions"] == {"champion": 3, "challenger": 2}


def test_challenger_that_cannot_be_had_never_hurts_the_champion(models: Models, tmp_path: Path) -> None:
    with closing(models.lineup(models[1], challenger_share=1.0)) as lineup:
        with pytest.raises(RuntimeError, match=r"the challenger, version 2, could not be loaded .*expected finite"):
            lineup.follow(models[1], models.broken(tmp_path / "broken"))
        models.free = 0
        with pytest.raises(RuntimeError, match=r"the challenger, version 2, could not be loaded .*are free"):
            lineup.follow(models[1], models[2])
        assert models.loads == [1, 2], "what does not fit is not tried"
        assert lineup.choose(job("request-1", lineup))[1] == "champion" and names(lineup) == ["1 (1)"]
        assert lineup.counts.swap_failures == 2


def test_challenger_makes_room_for_a_champion_and_comes_back_where_there_is_some(models: Models) -> None:
    with closing(models.lineup(models[1], challenger_share=1.0)) as lineup:
        lineup.engine.start()
        lineup.follow(models[1], models[2])
        # Too little for a second model beside two, enough once both were let go.
        models.free = 0
        held = lineup.champion
        with pytest.raises(RuntimeError, match="the challenger, version 2, could not be loaded"):
            lineup.follow(models[3], models[2])
        assert held.parts is None and lineup.champion.version == 3 and names(lineup) == ["3 (3)"]
        assert lineup.counts.swaps_drained == 1
        models.free = PLENTY
        lineup.follow(models[3], models[2])
        assert names(lineup) == ["3 (3)", "2 (4)"]


def test_without_a_share_no_challenger_is_loaded(models: Models) -> None:
    with closing(models.lineup(models[1])) as lineup:
        lineup.follow(models[1], models[2])
        assert models.loads == [1] and names(lineup) == ["1 (1)"]


def test_retired_weights_are_freed_with_their_last_picture(models: Models) -> None:
    """Also what the decoding thread held last, though no other picture is decoded after it."""
    with closing(models.lineup(models[1])) as lineup:
        lineup.engine.start()
        ended: list[Event] = []
        lineup.engine.submit(request("last"), ended.append)
        wait_for(lambda: ended)
        lineup.follow(models[2], None)

        def gone() -> bool:
            gc.collect()
            return models.denoisers[0]() is None

        wait_for(gone, limit_s=60)
