"""Rows that make their steps together: stacked tensors that rows join and leave, and one step for all of them.

A batch is a value: a step, a join or a selection returns a new one. Which rows are guided and how many tokens they have
is known on the host, so a step is tensor arithmetic alone and never waits for the device. In strict mode every denoiser
call has the same number of rows (spare ones are copies) and rows of one text length class, so a row's arithmetic is the
same to the last bit whoever its neighbours are.

Shape letters: B rows, G guided rows, S steps, K columns of a table, C channels, H, W latent height and width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.models import TextStates
from components.sampler import Predict
from components.solvers import NEXT_SIGNAL, NEXT_SPREAD, TIMESTEP, advance, columns_at

TOKENS_PER_CLASS = 32
"""Z-Image pads captions to multiples of this; rows of one multiple have one shape."""

Guide = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Repair:
    """What is kept of a picture: its latents, and where the mask says 1 it is drawn anew."""

    mask_B1HW: Tensor
    picture_BCHW: Tensor
    noise_BCHW: Tensor


@dataclass(frozen=True)
class RowBatch:
    """The state of B rows of one shape between two steps."""

    latents_BCHW: Tensor
    clean_BCHW: Tensor
    """Estimate of the final latents by the step before; zeros at first."""
    columns_BSK: Tensor
    """Step tables, padded to the longest."""
    step_B: Tensor
    """int64: the step that comes next."""
    scale_B111: Tensor
    text: TextStates
    negative: TextStates
    guided: tuple[bool, ...]
    repair: Repair | None = None

    def __len__(self) -> int:
        return len(self.guided)

    @property
    def call_rows(self) -> int:
        """Rows of a denoiser call: guided rows count twice."""
        return len(self.guided) + sum(self.guided)

    def select(self, rows: list[int]) -> "RowBatch":
        """Return the rows at these places, in this order."""
        repair = self.repair
        if repair is not None:
            repair = Repair(repair.mask_B1HW[rows], repair.picture_BCHW[rows], repair.noise_BCHW[rows])
        return RowBatch(
            self.latents_BCHW[rows],
            self.clean_BCHW[rows],
            self.columns_BSK[rows],
            self.step_B[rows],
            self.scale_B111[rows],
            self.text.rows(rows),
            self.negative.rows(rows),
            tuple(self.guided[row] for row in rows),
            repair,
        )


def join(batches: Sequence[RowBatch]) -> RowBatch:
    """Stack batches of one shape, in order."""
    if len(batches) == 1:
        return batches[0]
    longest = max(batch.columns_BSK.shape[1] for batch in batches)
    columns = [
        torch.nn.functional.pad(batch.columns_BSK, (0, 0, 0, longest - batch.columns_BSK.shape[1])) for batch in batches
    ]
    repair = None
    if any(batch.repair is not None for batch in batches):
        repairs = [batch.repair or _no_repair(batch.latents_BCHW) for batch in batches]
        repair = Repair(
            torch.cat([one.mask_B1HW for one in repairs]),
            torch.cat([one.picture_BCHW for one in repairs]),
            torch.cat([one.noise_BCHW for one in repairs]),
        )
    return RowBatch(
        torch.cat([batch.latents_BCHW for batch in batches]),
        torch.cat([batch.clean_BCHW for batch in batches]),
        torch.cat(columns),
        torch.cat([batch.step_B for batch in batches]),
        torch.cat([batch.scale_B111 for batch in batches]),
        _join_text([batch.text for batch in batches]),
        _join_text([batch.negative for batch in batches]),
        tuple(guided for batch in batches for guided in batch.guided),
        repair,
    )


def _no_repair(latents_BCHW: Tensor) -> Repair:
    zeros_BCHW = torch.zeros_like(latents_BCHW)
    return Repair(torch.ones_like(latents_BCHW[:, :1]), zeros_BCHW, zeros_BCHW)


def _join_text(texts: list[TextStates]) -> TextStates:
    counts = [text.num_tokens for text in texts if text.num_tokens is not None]
    num_tokens = tuple(count for row in counts for count in row) if len(counts) == len(texts) else None
    states_BLD = torch.cat([text.states_BLD for text in texts])
    return TextStates(states_BLD, torch.cat([text.mask_BL for text in texts]), num_tokens)


@dataclass(frozen=True)
class Call:
    """One denoiser call: which of the conditional rows followed by the guided ones, and their texts."""

    rows: Tensor | None
    """int64 indexes; None takes all as they stand."""
    text: TextStates


@dataclass(frozen=True)
class CallPlan:
    """How the rows of a batch meet the denoiser; it holds as long as no row joins or leaves."""

    calls: tuple[Call, ...]
    guided_G: Tensor | None
    """int64 places of the guided rows; None where there are none."""
    restore: Tensor | None
    """int64: where each row's prediction stands among those of all calls; None: in order."""


def make_plan(batch: RowBatch, strict_rows: int | None = None) -> CallPlan:
    """Plan one call for all rows, guided ones a second time without their prompt.

    One call, because measured faster on 2 CPU cores than two: 8 + 8 rows in 54 ms, two calls of 8 in 71 ms.
    `strict_rows` (strict mode) is the fixed number of rows of every call.
    """
    device = batch.latents_BCHW.device
    guided = [row for row, is_guided in enumerate(batch.guided) if is_guided]
    guided_G = torch.tensor(guided, device=device) if guided else None
    text = batch.text.cat(batch.negative.rows(guided)) if guided else batch.text
    if strict_rows is None:
        return CallPlan((Call(None, text),), guided_G, None)
    calls: list[Call] = []
    places: dict[int, int] = {}
    for alike in _rows_by_text_length(text):
        for start in range(0, len(alike), strict_rows):
            chosen = alike[start : start + strict_rows]
            for place, row in enumerate(chosen):
                places[row] = len(calls) * strict_rows + place
            filled = chosen + [chosen[0]] * (strict_rows - len(chosen))
            calls.append(Call(torch.tensor(filled, device=device), text.rows(filled)))
    restore = torch.tensor([places[row] for row in range(len(places))], device=device)
    return CallPlan(tuple(calls), guided_G, restore)


def _rows_by_text_length(text: TextStates) -> list[list[int]]:
    counts = text.num_tokens or (text.mask_BL.shape[1],) * len(text.mask_BL)
    classes: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        classes.setdefault(-(-count // TOKENS_PER_CLASS), []).append(row)
    return list(classes.values())


def step_rows(batch: RowBatch, plan: CallPlan, predict: Predict, guide: Guide) -> RowBatch:
    """Make one step of every row at its own place in its own table; no value is read on the host."""
    columns_BK = columns_at(batch.columns_BSK, batch.step_B)
    prediction_BCHW = _predict_rows(batch, plan, columns_BK[:, TIMESTEP], predict, guide)
    latents_BCHW, clean_BCHW = advance(batch.latents_BCHW, prediction_BCHW, batch.clean_BCHW, columns_BK)
    if batch.repair is not None:
        latents_BCHW = _keep_the_rest(batch.repair, latents_BCHW, columns_BK)
    return RowBatch(
        latents_BCHW,
        clean_BCHW,
        batch.columns_BSK,
        batch.step_B + 1,
        batch.scale_B111,
        batch.text,
        batch.negative,
        batch.guided,
        batch.repair,
    )


def _predict_rows(batch: RowBatch, plan: CallPlan, timestep_B: Tensor, predict: Predict, guide: Guide) -> Tensor:
    latents, timesteps = batch.latents_BCHW, timestep_B
    if plan.guided_G is not None:
        latents = torch.cat([latents, latents.index_select(0, plan.guided_G)])
        timesteps = torch.cat([timesteps, timesteps.index_select(0, plan.guided_G)])
    outputs = []
    for call in plan.calls:
        if call.rows is None:
            outputs.append(predict(latents, timesteps, call.text))
        else:
            chosen = latents.index_select(0, call.rows)
            outputs.append(predict(chosen, timesteps.index_select(0, call.rows), call.text))
    predictions = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    predictions = predictions.float()
    if plan.restore is not None:
        predictions = predictions.index_select(0, plan.restore)
    if plan.guided_G is None:
        return predictions
    with_prompt, without = predictions[: len(batch)], predictions[len(batch) :]
    if len(without) == len(batch):
        return guide(with_prompt, without, batch.scale_B111)
    pulled = guide(with_prompt.index_select(0, plan.guided_G), without, batch.scale_B111.index_select(0, plan.guided_G))
    return with_prompt.index_copy(0, plan.guided_G, pulled)


def _keep_the_rest(repair: Repair, latents_BCHW: Tensor, columns_BK: Tensor) -> Tensor:
    """Put the kept part of the picture back, as noisy as the step's end (as diffusers' inpainting does)."""
    signal_B111 = columns_BK[:, NEXT_SIGNAL].view(-1, 1, 1, 1)
    spread_B111 = columns_BK[:, NEXT_SPREAD].view(-1, 1, 1, 1)
    kept_BCHW = signal_B111 * repair.picture_BCHW + spread_B111 * repair.noise_BCHW
    return repair.mask_B1HW * latents_BCHW + (1 - repair.mask_B1HW) * kept_BCHW
