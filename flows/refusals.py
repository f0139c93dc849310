"""What a client is told when the engine refuses a request or gives it up: status, code, and when to come again.

Full queues and backlogs pass, so they are 429 with Retry-After; what no waiting can mend is 400; what was begun and
lost must not be asked for again by a client that nobody watches.
"""

import math

from cluster.api_errors import ONCE, ApiError, later, once
from cluster.failures import log_failure
from components.errors import DeadlineError, QueueFullError

MOST_RETRY_AFTER_S = 60
"""The OpenAI client does not wait longer by itself."""
UNKNOWN_RETRY_AFTER_S = 2


def queue_full(error: QueueFullError) -> ApiError:
    seconds = _retry_after_s(error.retry_after_s)
    return later(429, f"{error} (serve.max_queue), in {seconds} s", "queue_full", seconds)


def unmet_deadline(error: DeadlineError) -> ApiError:
    """A deadline that cannot be met: 400 when it never can, 429 while others are at work.

    No client may repeat the latter by itself: its pictures would come after the time that its user named.
    """
    if error.retry_after_s is None:
        return ApiError(str(error), "deadline_s", "deadline_too_short")
    seconds = _retry_after_s(error.retry_after_s)
    busy = later(429, f"{error}, in {seconds} s", "queue_too_long", seconds)
    busy.param = "deadline_s"
    busy.headers |= ONCE
    return busy


def failure(error: Exception, request_id: str) -> ApiError:
    """What ends a request that was accepted; a client must not ask for the same work again by itself."""
    if isinstance(error, DeadlineError):
        return once(504, str(error), "deadline_exceeded")
    if isinstance(error, InterruptedError):
        return shutting_down()
    log_failure(request_id, error)
    told = f"drawing failed: {type(error).__name__}; the endpoint's log says more of request {request_id}"
    return once(500, told, "drawing_failed")


def shutting_down() -> ApiError:
    return later(503, "the endpoint is ending; ask again", "shutting_down", UNKNOWN_RETRY_AFTER_S)


def _retry_after_s(seconds: float | None) -> int:
    return min(MOST_RETRY_AFTER_S, max(1, math.ceil(seconds))) if seconds is not None else UNKNOWN_RETRY_AFTER_S
