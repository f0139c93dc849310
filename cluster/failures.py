"""What a log may say of an error whose words may be a client's: its class, its frames and whose request it was.

Libraries quote what they could not take, a prompt among it, and what is quoted may be cut or escaped, so looking for
the prompt is no way out. The words of the errors of this code are shown: they never repeat private fields.
"""

import logging
import traceback
from collections.abc import Iterator

LOG = logging.getLogger(__name__)
OWN = ("cluster.", "components.", "flows.")


def log_failure(request_id: str, error: BaseException) -> None:
    """Log what ended a request, and what led to it."""
    LOG.error("request %s failed: %s", request_id, described(error))


def described(error: BaseException) -> str:
    """Return classes and frames of an error, its causes and its parts; words only where they are our own."""
    return "\n".join(_told(error, set())).rstrip()


def _told(error: BaseException, seen: set[int]) -> Iterator[str]:
    if id(error) in seen:
        return
    seen.add(id(error))
    kind = type(error)
    words = f": {error}" if kind.__module__.startswith(OWN) else " (its words may quote what was asked)"
    yield f"{kind.__module__}.{kind.__qualname__}{words}"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
    for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield "of which:"
        yield from _told(part, seen)
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield "which came of:"
        yield from _told(before, seen)
