"""The errors this folder raises on purpose; each takes one message: what was expected, what was found, what to do.

A single string survives pickling between processes, which a constructor with two arguments does not.
`exit_code` is what the command line returns for it (2: the input is wrong and nothing was touched; 1: it failed).
"""


class InputError(ValueError):
    """What the user gave cannot be used; nothing was touched."""

    exit_code = 2


class DataError(RuntimeError):
    """The data was read, and too much of it is unusable."""

    exit_code = 1


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; no weight was moved by it."""

    exit_code = 1
    on_all_ranks = True
    """Raised by every rank at the same place, so that they can go on to other work together."""


class QueueFullError(RuntimeError):
    """As much waits as may wait; `retry_after_s` says when some of it will be gone, where the speed is known."""

    exit_code = 1
    retry_after_s: float | None = None


class DeadlineError(RuntimeError):
    """A picture cannot be, or was not, ready in time; nothing is drawn for it any more.

    `retry_after_s` says when the same request could be met, where only other requests stand in its way.
    """

    exit_code = 1
    retry_after_s: float | None = None
