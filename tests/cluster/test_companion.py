"""Companion: runs a function beside the endpoint, says why it ended, and ends it."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cluster.companion import Companion
from cluster.errors import EndpointError

STARTED: dict[str, threading.Event] = {}


def wait_for_the_end(arguments: Mapping[str, Any], ended: threading.Event) -> None:
    STARTED[arguments["name"]].set()
    ended.wait()


def break_down(arguments: Mapping[str, Any], ended: threading.Event) -> None:
    raise ValueError(f"{arguments['name']} is gone")


def leave(arguments: Mapping[str, Any], ended: threading.Event) -> None:
    return


def ended_companion(function: Callable[..., None]) -> Companion:
    companion = Companion(f"{__name__}:{function.__name__}", {"name": "the registry"})
    companion._thread.join(10)
    return companion


def test_function_runs_until_the_companion_is_closed(request: pytest.FixtureRequest) -> None:
    STARTED["x"] = threading.Event()
    companion = Companion(f"{__name__}:wait_for_the_end", {"name": "x"})
    assert STARTED["x"].wait(10)
    companion.check_health()
    companion.close()
    assert not companion._thread.is_alive()


def test_what_ended_the_function_fails_the_health_check() -> None:
    with pytest.raises(EndpointError, match=r"break_down expected to run .*, found: the registry is gone"):
        ended_companion(break_down).check_health()
    with pytest.raises(EndpointError, match="leave expected to run as long as the endpoint, found it ended"):
        ended_companion(leave).check_health()
    with pytest.raises(EndpointError, match="nowhere expected to run"):
        companion = Companion("cluster.companion:nowhere", {})
        companion._thread.join(10)
        companion.check_health()
