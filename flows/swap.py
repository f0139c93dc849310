"""Which weights are loaded, and who draws with them: the champion, and perhaps a challenger that is tried beside it.

A new champion loads beside the old one while that draws on; rows at work finish on the weights they began with. Where
memory is short for two, new requests wait, the old weights finish their rows and are let go, then the new ones load; if
they cannot be, the old ones come back. A challenger is never worth that: it loads where there is room, or not at all.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.api_errors import ApiError, later
from cluster.free_memory import NoTurnError, collect_memory, free_bytes, memory_turn
from cluster.painter_contract import Job, SwappingError
from cluster.request_shares import in_share
from cluster.role_metrics import Role
from components.engine_status import EngineLimits
from components.model_memory import Plan, held_bytes, needed_bytes, num_values, plan_swap
from components.sampler import PictureRequest, draw
from components.step_batch import StepBatchEngine
from flows.loaded_model import LoadedModel, load_model, value_bytes

if TYPE_CHECKING:
    from components.models import Parts

LOG = logging.getLogger(__name__)
WARM_UP = "warm up"
SALT = "challenger"
LOST_RETRY_S = 5
TURN_LIMIT_S, START_LIMIT_S = 600.0, 60.0
"""For a turn at memory: of a swap, which is tried again later, and of a start, which is wanted more than it is safe."""
GIB = 2**30


@dataclass(frozen=True)
class VersionSettings:
    """Of the section `serve`, what concerns several versions."""

    challenger_share: float = 0.0
    shadow_share: float = 0.0
    memory_headroom_bytes: int = 0
    turns_folder: str = ""
    """Where replicas of one machine take turns to load: what is free for one is free for all. Empty: no turns."""


@dataclass
class SwapCounts:
    swaps: int = 0
    swap_s: float = 0.0
    swaps_drained: int = 0
    swap_failures: int = 0


@dataclass(eq=False)
class Loaded:
    """A model in the engine, under a name of its own: a version may come back while its rows of before are drawn."""

    name: str
    arguments: Mapping[str, Any]
    """Of `load_model`."""
    info: Mapping[str, Any]
    parts: "Parts | None"
    """None once it is let go."""

    @property
    def version(self) -> Any:
        return self.info.get("model_version")


class Lineup:
    """Owns the engine and says which of its versions draws a job; `follow` may be called while it draws."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        limits: EngineLimits,
        settings: VersionSettings,
        load: Callable[..., LoadedModel] = load_model,
        free: Callable[[str], int] = free_bytes,
    ) -> None:
        """Load the first champion; `free` says how many bytes a device has left."""
        self.settings, self.counts = settings, SwapCounts()
        self.waiting = ""
        """Why new requests wait; empty while they do not."""
        self.lost = ""
        """Why there is no champion any more."""
        self.challenger: Loaded | None = None
        self.before_drain: Callable[[], None] = lambda: None
        """Called when new requests wait and old ones are about to be finished: what may be given up should be."""
        self._load_model, self._free, self._numbers = load, free, count(1)
        self._at_work: dict[str, Loaded] = {}
        self._changed = threading.Condition()
        self._following = threading.Lock()
        self._failed_drained: Mapping[str, Any] | None = None
        """What did not load when everything else had been let go for it: nobody waits for a second try."""
        self._turns = Path(settings.turns_folder) if settings.turns_folder else None
        with memory_turn(self._turns, arguments["device"], START_LIMIT_S, alone=False):
            model = load(**arguments)
        self.engine = StepBatchEngine(limits, on_dropped=self._forget)
        self._crown(self._add(arguments, model))

    def choose(self, job: Job) -> tuple[Loaded, Role]:
        """Return the weights that draw a new job; SwappingError while it must wait, ApiError when it never will."""
        if self.waiting:
            raise SwappingError(self.waiting)
        if self.lost:
            raise later(503, self.lost, "model_failed", LOST_RETRY_S)
        challenger = self.challenger
        if job.version is not None:
            return self.named(job.version)
        chosen = in_share(job.request_id, self.settings.challenger_share, SALT)
        if challenger is not None and chosen and can_draw(challenger, job):
            return challenger, "challenger"
        return self.champion, "champion"

    def named(self, version: int) -> tuple[Loaded, Role]:
        """Return a version that was asked for by number; ApiError 404 when it is not (or no longer) loaded."""
        champion, challenger = self.champion, self.challenger
        if champion.version == version:
            return champion, "champion"
        if challenger is not None and challenger.version == version:
            return challenger, "challenger"
        message = f"model expected a version that is loaded, {self.versions()}, found {version}; ask for one of those"
        raise ApiError(message, "model", "model_not_found", 404)

    def versions(self) -> list[int]:
        """Return the numbers of the versions that may be named, the champion's first."""
        loaded = (self.champion, self.challenger)
        return [one.version for one in loaded if one is not None and one.version is not None]

    def serves(self, loaded: Loaded) -> bool:
        """Whether new rows may still begin with these weights."""
        return loaded in (self.champion, self.challenger) and loaded.parts is not None

    def facts(self, name: str) -> Mapping[str, Any]:
        """Return the info of a version that draws, by the engine's name."""
        return self._at_work[name].info

    def numbers(self) -> dict[str, Any]:
        roles = {"champion": self.champion.version}
        if self.challenger is not None:
            shares = {"challenger": self.settings.challenger_share, "shadow": self.settings.shadow_share}
            roles |= {role: self.challenger.version for role, share in shares.items() if share}
        return {**asdict(self.counts), "swapping": float(bool(self.waiting)), "role_versions": roles}

    def follow(self, champion: Mapping[str, Any], challenger: Mapping[str, Any] | None) -> None:
        """Load what is not loaded yet, let go what is not wanted any more; raises when a model cannot be had."""
        tried = self.settings.challenger_share > 0 or self.settings.shadow_share > 0
        with self._following:
            try:
                if champion != self.champion.arguments or self.lost:
                    self._swap(champion)
            finally:
                self._follow_challenger(challenger if tried else None)

    def _swap(self, arguments: Mapping[str, Any]) -> None:
        start = time.monotonic()
        try:
            challenger = self.challenger
            if challenger is not None and challenger.arguments == arguments:
                self._crown(challenger)
                self.challenger = None
            else:
                with memory_turn(self._turns, arguments["device"], TURN_LIMIT_S):
                    self._load_champion(arguments)
        except NoTurnError:
            raise
        except Exception:  # counted whatever it is, and handed on
            self.counts.swap_failures += 1
            raise
        self.lost = ""
        self.counts.swaps += 1
        self.counts.swap_s += time.monotonic() - start

    def _load_champion(self, arguments: Mapping[str, Any]) -> None:
        plan, reason = self._plan(arguments)
        if plan == "refuse":
            raise MemoryError(f"{reason}, even without what serves; free memory, or give the replica more")
        if plan == "beside":
            self._crown(self._add(arguments, self._drawing(arguments)))
        elif arguments == self._failed_drained:
            raise MemoryError(f"{reason}; it could not be loaded when what serves had made room for it")
        else:
            self._drain(arguments, f"{reason}; what serves finishes its requests first, new ones wait")

    def _drain(self, arguments: Mapping[str, Any], reason: str) -> None:
        """Let go of the old weights first; when the new ones cannot be loaded, the old ones are again."""
        old, self.waiting = self.champion, reason
        LOG.warning("%s", reason)
        try:
            self._let_go()
            try:
                self._crown(self._add(arguments, self._drawing(arguments)))
            except Exception as error:  # whatever a model's code raises
                # Its frames hold what was loaded of the new weights, and there is no room for both.
                traceback.clear_frames(error.__traceback__)
                self._failed_drained = arguments
                self._restore(old, error)
                raise
            self.counts.swaps_drained += 1
        finally:
            self.waiting = ""

    def _restore(self, old: Loaded, error: Exception) -> None:
        collect_memory(str(old.arguments.get("device")))
        try:
            self._crown(self._add(old.arguments, self._load_model(**old.arguments)))
        except Exception as second:  # whatever it is, it must be told: nothing draws any more
            self.lost = f"no model is loaded: neither the new one ({error}) nor the one before ({second}) could be"
            raise RuntimeError(self.lost) from second

    def _let_go(self) -> None:
        """Finish everything at work, and drop all weights."""
        self.before_drain()
        for loaded in filter(None, (self.champion, self.challenger)):
            if loaded.parts is not None:
                self.engine.retire(loaded.name)
            loaded.parts = None
        self.challenger = None
        with self._changed:
            self._changed.wait_for(lambda: not self._at_work)
        collect_memory(str(self.champion.arguments.get("device")))

    def _follow_challenger(self, wanted: Mapping[str, Any] | None) -> None:
        """Keep, exchange or let go of the challenger; one that cannot be loaded is left out, and that is told."""
        current = self.challenger
        if current is not None and current.arguments != wanted:
            self.challenger = None
            self.engine.retire(current.name)
            current.parts = None
        if wanted is None or self.challenger is not None or wanted == self.champion.arguments:
            return
        try:
            with memory_turn(self._turns, wanted["device"], TURN_LIMIT_S):
                plan, reason = self._plan(wanted)
                if plan != "beside":
                    raise MemoryError(reason)
                self.challenger = self._add(wanted, self._drawing(wanted))
        except Exception as error:  # whatever a model's code raises, the champion draws on
            self.counts.swap_failures += not isinstance(error, NoTurnError)
            version = wanted.get("facts", {}).get("model_version")
            raise RuntimeError(
                f"the challenger, version {version}, could not be loaded ({type(error).__name__}: {error}); the"
                " champion answers without it"
            ) from error

    def _plan(self, arguments: Mapping[str, Any]) -> tuple[Plan, str]:
        """Return how a model comes in, and the numbers that say so."""
        device = arguments["device"]
        needed = needed_bytes(num_values(arguments["directory"]), value_bytes(arguments))
        free, headroom = self._free(device), self.settings.memory_headroom_bytes
        held = sum(held_bytes(one.parts) for one in (self.champion, self.challenger) if one and one.parts)
        version = arguments.get("facts", {}).get("model_version")
        reason = (
            f"version {version} needs {needed / GIB:.2f} GiB and {headroom / GIB:.2f} GiB headroom"
            f" (serve.memory_headroom_bytes), {free / GIB:.2f} GiB are free"
        )
        return plan_swap(needed, free, held, headroom), reason

    def _drawing(self, arguments: Mapping[str, Any]) -> LoadedModel:
        """Load a model and draw a picture with it, before any request depends on it."""
        model = self._load_model(**arguments)
        draw(model.parts, [warm_up_row(model.info)])
        return model

    def _crown(self, loaded: Loaded) -> None:
        # First: what is held to a version by name must never be told one that starts no more rows.
        self.champion = loaded
        self.engine.serve(loaded.name)

    def _add(self, arguments: Mapping[str, Any], model: LoadedModel) -> Loaded:
        name = f"{model.info.get('model_version')} ({next(self._numbers)})"
        loaded = Loaded(name, dict(arguments), model.info, model.parts)
        self._at_work[name] = loaded
        self.engine.load(name, model.parts, serve=False)
        return loaded

    def _forget(self, name: str) -> None:
        with self._changed:
            self._at_work.pop(name)
            self._changed.notify_all()


def can_draw(loaded: Loaded, job: Job) -> bool:
    """Whether a model knows the solver and draws the size that were asked for: architectures may not share theirs."""
    row, multiple = job.order.rows[0], loaded.info["size_multiple_px"]
    fits = row["width_px"] % multiple == 0 and row["height_px"] % multiple == 0
    return fits and job.order.scheduler in (None, *loaded.info["schedulers"])


def warm_up_row(info: Mapping[str, Any]) -> PictureRequest:
    return PictureRequest(WARM_UP, steps=2, width_px=info["width_px"], height_px=info["height_px"])
