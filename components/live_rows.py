"""Bookkeeping of the engine: requests that were accepted, their rows, and the groups of rows that step together.

Tensors live in a group's batch, which the loop's thread alone touches; a row here is what the host knows about it. The
engine's lock guards all the rest, save `AcceptedRequest.send_lock`, which puts the events of one request in order.

Shape letters: C channels, H, W latent height and width.
"""

import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from components.draw_requests import DrawRequest, Receiver, partial_steps
from components.row_batch import CallPlan, RowBatch, join, make_plan, step_rows
from components.side_by_side import SideBySide, in_turn
from components.versions import Version

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class AcceptedRequest:
    """A request between acceptance and its last event."""

    request: DrawRequest
    version: Version
    receive: Receiver
    accepted_at: float
    pinned: bool
    """It asked for this version by name, so a swap does not move it."""
    prepared: list[RowBatch]
    """Each row's state before its first step."""
    rows: list["LiveRow"] = field(default_factory=list)
    pictures: list[Image.Image | None] = field(default_factory=list)
    started_at: float | None = None
    ended: bool = False
    send_lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.rows = [LiveRow(self, index) for index in range(len(self.request.rows))]
        self.pictures = [None] * len(self.rows)

    @property
    def deadline(self) -> float | None:
        limit_s = self.request.deadline_s
        return None if limit_s is None else self.accepted_at - self.request.waited_s + limit_s

    def is_late(self, now: float) -> bool:
        return self.deadline is not None and now > self.deadline

    @property
    def steps_left(self) -> int:
        return sum(row.steps_left for row in self.rows)


@dataclass(eq=False)
class LiveRow:
    """One picture of a request; what the fair queue and the groups ask of it."""

    owner: AcceptedRequest
    index: int

    def __post_init__(self) -> None:
        asked, request = self.owner.request.rows[self.index], self.owner.request
        self.key, self.priority = request.key, request.priority
        self.shape: Hashable = (asked.height_px, asked.width_px)
        self.step = request.start.first_step(asked.steps) if request.start is not None else 0
        """Steps behind it, those left out at the start included."""
        self.steps = asked.steps
        self.partial_steps = partial_steps(request.partial_images, self.step, self.steps)
        self.call_rows = self.owner.prepared[self.index].call_rows
        self.pixels = asked.height_px * asked.width_px
        self.step_pixels = self.pixels * self.call_rows
        """Pixel-steps of one step."""
        self.pixel_steps = self.step_pixels * self.steps_left

    @property
    def steps_left(self) -> int:
        return self.steps - self.step

    @property
    def weight(self) -> float:
        """Its part of its request's priority."""
        return self.priority / len(self.owner.rows)


class Group:
    """Rows of one version and shape, stacked; the order of `rows` is the order of the batch.

    Rows come and go under the engine's lock by bookkeeping alone; the tensors follow in `advance`, without it.
    """

    def __init__(self, version: Version, buckets: tuple[int, ...], calls: SideBySide) -> None:
        """`buckets`: see `row_batch.make_plan`; `calls` makes those of a step."""
        self.version, self.buckets, self.calls = version, buckets, calls
        self.rows: list[LiveRow] = []
        """Those that have joined the batch, then those that join with the next step."""
        self.batch: RowBatch | None = None
        """As the last step left it: rows that are gone since may still be in it."""
        self.most_call_rows: int | None = None
        """Rows of a denoiser call that the device could make, once it failed at more; None: no such limit is known."""
        self._places: list[int] = []
        """Where in the batch each row that has joined stands."""
        self._joining: list[RowBatch] = []
        self._plan: CallPlan | None = None

    @property
    def call_rows(self) -> int:
        return sum(row.call_rows for row in self.rows)

    @property
    def step_pixels(self) -> int:
        return sum(row.step_pixels for row in self.rows)

    def add(self, row: LiveRow) -> None:
        """Let a row join before the next step."""
        self.rows.append(row)
        self._joining.append(row.owner.prepared[row.index])

    def keep(self, places: list[int]) -> None:
        """Let all rows go but those at `places`, in that order: those that have joined first."""
        joined = len(self._places)
        self._joining = [self._joining[place - joined] for place in places if place >= joined]
        self._places = [self._places[place] for place in places if place < joined]
        self.rows = [self.rows[place] for place in places]

    def advance(self) -> dict[AcceptedRequest, Exception]:
        """Make one step of every row; returns the requests whose rows could not make it, which have left.

        A batch that fails is halved until it is known whose row fails. Where none does, the batch was too large for the
        device (its memory, as a rule): from then on the group makes its steps in parts of the size that went well.
        """
        failed = self._join()
        made: list[tuple[list[int], RowBatch]] = []
        waiting, whole, reason = self._parts(), True, ""
        while waiting:
            places = [place for place in waiting.pop(0) if self.rows[place].owner not in failed]
            try:
                if places:
                    made.append((places, self._stepped(places)))
                continue
            except Exception as error:  # whatever a denoiser raises must not reach the neighbours
                whole = False
                if len(places) == 1:
                    failed[self.rows[places[0]].owner] = error
                    continue
                reason = f"{type(error).__name__}: {error}"
            # Outside the handler, which keeps the failed step's tensors alive.
            half = len(places) // 2
            waiting[:0] = [places[:half], places[half:]]
        if not whole and not failed:
            self._shrink(max(state.call_rows for _, state in made), reason)
        self._gather(made, failed)
        # A wrong pairing would hand a client another one's picture.
        assert len(self._places) == len(self.rows) and not self._joining
        return failed

    def latents_at(self, place: int) -> Tensor:
        """Return a copy of a row's latents: a view would keep those of the whole batch alive."""
        assert self.batch is not None
        return self.batch.latents_BCHW[self._places[place]].clone()

    def clean_at(self, place: int) -> Tensor:
        """Return a copy of the estimate of a row's final latents."""
        assert self.batch is not None
        return self.batch.clean_BCHW[self._places[place]].clone()

    def _join(self) -> dict[AcceptedRequest, Exception]:
        """Bring the batch up to the rows; where there is no memory for that, those that would join fail."""
        if self.batch is not None and not self._joining and len(self._places) == len(self.batch):
            return {}
        try:
            joined = [self._select(self._places)] if self._places else []
            self._take(join([*joined, *self._joining]))
        except Exception as error:  # out of memory, as a rule
            failed: dict[AcceptedRequest, Exception] = {row.owner: error for row in self.rows[len(self._places) :]}
            self.keep([place for place, row in enumerate(self.rows) if row.owner not in failed])
            return failed
        return {}

    def _select(self, places: list[int]) -> RowBatch:
        assert self.batch is not None
        return self.batch if places == list(range(len(self.batch))) else self.batch.select(places)

    def _take(self, batch: RowBatch | None) -> None:
        self.batch, self._plan, self._joining = batch, None, []
        self._places = list(range(len(batch) if batch is not None else 0))

    def _parts(self) -> list[list[int]]:
        """Split the rows, in order, so that each part's call stays below what the device can make."""
        parts: list[list[int]] = []
        size = 0
        for place, row in enumerate(self.rows):
            size += row.call_rows
            if not parts or (self.most_call_rows is not None and size > self.most_call_rows):
                parts.append([])
                size = row.call_rows
            parts[-1].append(place)
        return parts

    def _stepped(self, places: list[int]) -> RowBatch:
        batch = self._select([self._places[place] for place in places])
        plan = self._plan if batch is self.batch else None
        plan = plan or make_plan(batch, self.buckets, self.calls.parts)
        if batch is self.batch:
            self._plan = plan
        make_calls = in_turn if self.buckets else self.calls
        return step_rows(batch, plan, self.version.predict, self.version.family.guide, make_calls)

    def _shrink(self, call_rows: int, reason: str) -> None:
        logger.warning(
            "a step of %d rows failed and its parts did not (%s): pictures of this size are drawn in calls of at most"
            " %d rows, guided ones counted twice, until none of them is at work; lower serve.max_batch_rows",
            self.call_rows,
            reason,
            call_rows,
        )
        self.most_call_rows = call_rows

    def _gather(self, made: list[tuple[list[int], RowBatch]], failed: dict[AcceptedRequest, Exception]) -> None:
        """Put the parts of a step together again, without the rows of requests that failed in it."""
        if self.batch is not None and len(made) == 1 and len(made[0][0]) == len(self.rows) == len(self.batch):
            self.batch = made[0][1]  # the plan still holds
            return
        self.rows = [self.rows[place] for places, _ in made for place in places]
        try:
            self._take(join([state for _, state in made]) if made else None)
        except Exception as error:  # no memory for the whole beside its parts
            failed.update({row.owner: error for row in self.rows})
            self.rows = []
            self._take(None)
        self.keep([place for place, row in enumerate(self.rows) if row.owner not in failed])
