"""Bookkeeping of the engine: requests that were accepted, their rows, and the groups of rows that step together.

Tensors live in a group's batch; a row here is what the host knows about it. The engine's lock guards all of it, save
`AcceptedRequest.send_lock`, which puts the events of one request in order.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

from PIL import Image

from components.draw_requests import DrawRequest, Receiver, partial_steps
from components.row_batch import CallPlan, RowBatch, join, make_plan, step_rows
from components.versions import Version


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
        return None if limit_s is None else self.accepted_at + limit_s

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
    """Rows of one version and shape, stacked; the order of `rows` is the order of the batch."""

    def __init__(self, version: Version, buckets: tuple[int, ...]) -> None:
        """`buckets`: see `row_batch.make_plan`."""
        self.version, self.buckets = version, buckets
        self.rows: list[LiveRow] = []
        self.batch: RowBatch | None = None
        """Of the rows that have joined; those that join with the next step come after them."""
        self._joining: list[RowBatch] = []
        self._plan: CallPlan | None = None

    @property
    def call_rows(self) -> int:
        return sum(row.call_rows for row in self.rows)

    @property
    def step_pixels(self) -> int:
        return sum(row.step_pixels for row in self.rows)

    @property
    def weight(self) -> float:
        return sum(row.weight for row in self.rows)

    def add(self, row: LiveRow) -> None:
        """Let a row join before the next step."""
        self.rows.append(row)
        self._joining.append(row.owner.prepared[row.index])

    def keep(self, places: list[int]) -> None:
        """Let all rows go but those at `places`; between a step and the next joins."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        self.batch = self.batch.select(places) if self.batch is not None and places else None
        self._plan = None

    def advance(self) -> dict[AcceptedRequest, Exception]:
        """Make one step of every row; returns the requests whose rows could not make it, which have left."""
        if self._joining:
            self.batch = join([*([self.batch] if self.batch is not None else []), *self._joining])
            self._joining, self._plan = [], None
        assert self.batch is not None
        try:
            self.batch = self._stepped(self.batch)
            return {}
        except Exception as error:  # whatever a denoiser raises must not reach the neighbours
            owners = list(dict.fromkeys(row.owner for row in self.rows))
            if len(owners) == 1:
                self.keep([])
                return {owners[0]: error}
            return self._advance_apart(owners)

    def _stepped(self, batch: RowBatch) -> RowBatch:
        plan = self._plan if batch is self.batch else None
        plan = plan or make_plan(batch, self.buckets)
        if batch is self.batch:
            self._plan = plan
        return step_rows(batch, plan, self.version.predict, self.version.family.guide)

    def _advance_apart(self, owners: list[AcceptedRequest]) -> dict[AcceptedRequest, Exception]:
        """Find out whose rows fail: each request's rows step alone."""
        assert self.batch is not None
        failed: dict[AcceptedRequest, Exception] = {}
        rows, states = [], []
        for owner in owners:
            places = [place for place, row in enumerate(self.rows) if row.owner is owner]
            try:
                states.append(self._stepped(self.batch.select(places)))
                rows += [self.rows[place] for place in places]
            except Exception as error:  # as above, and now it is known whose
                failed[owner] = error
        self.rows, self.batch, self._plan = rows, join(states) if states else None, None
        return failed
