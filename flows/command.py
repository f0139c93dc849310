"""How does a function become a command that also takes the options of all? By the signature that typer reads."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def as_command(shared_type: type, body: Callable[..., None]) -> Callable[..., None]:
    """Return `body(shared, ...)` with its own arguments, the fields of `shared_type`, and its own options, by name."""
    own = list(inspect.signature(body).parameters.values())[1:]
    shared = list(inspect.signature(shared_type).parameters.values())
    arguments = [parameter for parameter in own if parameter.default is inspect.Parameter.empty]
    options = [parameter for parameter in own if parameter not in arguments]

    @functools.wraps(body)
    def command(**values: Any) -> None:
        body(shared_type(**{parameter.name: values.pop(parameter.name) for parameter in shared}), **values)

    parameters = [*arguments, *shared, *options]
    by_name = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    command.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
