"""Who proposes the next trial: Optuna behind one small class that can be told everything again.

The proposal for trial `number` depends on (seed, number) and on what was told before, not on a generator's history: a
search that was killed and told its finished trials again proposes what it would have proposed. Stopped trials are told
as pruned at their step, so TPE ranks them below complete ones and by how far they came; failed ones as pruned at
nothing, which is the worst. Values are relative to the loss before training, so that earlier searches can be told too.
TPE: Bergstra et al. 2011. ray.tune's own OptunaSearch tells a stopped trial's loss as if it were final.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"
LEARNED_TRIES = 10
PARTS_OF_A_RUN = 1000  # steps are told as thousandths of a run: searches may differ in length


@dataclass(frozen=True)
class Told:
    """How one trial ended."""

    state: str
    overrides: Mapping[str, Any]
    curve: Sequence[tuple[float, float]]
    """(share of the run, loss relative to the loss before training)."""


class Proposer:
    """Asks for overrides and is told how they did. `draw` takes an Optuna trial and returns overrides."""

    def __init__(self, sampler: str, seed: int, random_trials: int, draw: Callable[[Any], dict[str, Any]]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("optuna").setLevel(logging.ERROR)
        self.sampler, self.seed, self.random_trials, self.draw = sampler, seed, random_trials, draw
        self._study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=seed))
        self._asked: dict[int, Any] = {}

    def propose(self, number: int, attempt: int = 0) -> dict[str, Any]:
        """Return overrides for trial `number`; another `attempt` draws others, after `discard`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's notes on experimental samplers
            self._study.sampler = self._sampler(number, attempt)
            trial = self._study.ask()
            overrides = self.draw(trial)
        self._asked[number] = trial
        return overrides

    def repeat(self, number: int, overrides: Mapping[str, Any]) -> None:
        """Make trial `number` one with these overrides: proposed by an earlier command, or given."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study.enqueue_trial(dict(overrides))
            trial = self._study.ask()
            self.draw(trial)
        self._asked[number] = trial

    def tell(self, number: int, told: Told) -> None:
        """Take in how trial `number` ended."""
        import optuna

        trial = self._asked.pop(number)
        for share, value in told.curve:
            trial.report(value, round(share * PARTS_OF_A_RUN))
        if told.state == COMPLETE and told.curve:
            self._study.tell(trial, told.curve[-1][1])
        else:
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def tell_earlier(self, told: Told) -> bool:
        """Take in a trial of an earlier search; False when this space could not have drawn it."""
        import optuna

        fixed = optuna.trial.FixedTrial(dict(told.overrides))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a value outside its range is a warning there
                drawn = self.draw(fixed)
        except (ValueError, UserWarning):
            return False
        if set(drawn) != set(told.overrides):
            return False
        finished = told.state == COMPLETE and bool(told.curve)
        state = optuna.trial.TrialState.COMPLETE if finished else optuna.trial.TrialState.PRUNED
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=told.curve[-1][1] if finished else None,
                params=dict(told.overrides),
                distributions=fixed.distributions,
                intermediate_values={round(share * PARTS_OF_A_RUN): value for share, value in told.curve},
            )
        )
        return True

    def discard(self, number: int) -> None:
        """Forget a proposal that will not be tried."""
        import optuna

        self._study.tell(self._asked.pop(number), state=optuna.trial.TrialState.FAIL)

    def _sampler(self, number: int, attempt: int) -> Any:
        import optuna

        seed = (self.seed * 100_003 + number * 101 + attempt) % 2**32
        # A sampler that has learned keeps proposing what it likes: in a small space the rest is found at random.
        if self.sampler == "random" or number < self.random_trials or attempt >= LEARNED_TRIES:
            return optuna.samplers.RandomSampler(seed=seed)
        if self.sampler == "evolution":
            return optuna.samplers.NSGAIISampler(population_size=max(4, self.random_trials), seed=seed)
        return optuna.samplers.TPESampler(
            n_startup_trials=1, multivariate=True, group=True, constant_liar=True, seed=seed
        )
