"""One function that runs beside an endpoint for as long as Ray Serve runs it.

`fresco serve` is a process of ours that looks after its endpoint. Where somebody else's Serve deploys it (KubeRay's
RayService, `serve deploy`) no process of ours stays, so Serve keeps one more deployment with this class.
"""

import importlib
import threading
from collections.abc import Mapping
from typing import Any

from cluster.errors import EndpointError

END_LIMIT_S = 10.0


class Companion:
    """Runs `module:function(arguments, ended)` in a thread, `ended` being the event that asks it to return.

    When the function returns by itself or raises, the health check says why and Serve starts a fresh one.
    """

    def __init__(self, function: str, arguments: Mapping[str, Any]) -> None:
        self._ended = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._run, args=(function, arguments), name=function, daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """EndpointError once the function has ended."""
        if self._problem:
            raise EndpointError(self._problem)

    def close(self) -> None:
        """Ask the function to return, and wait for it."""
        self._ended.set()
        self._thread.join(END_LIMIT_S)

    def __del__(self) -> None:
        """Serve calls it when it ends the replica."""
        self.close()

    def _run(self, function: str, arguments: Mapping[str, Any]) -> None:
        module, _, name = function.partition(":")
        try:
            getattr(importlib.import_module(module), name)(arguments, self._ended)
            self._problem = f"{function} expected to run as long as the endpoint, found it ended"
        except Exception as error:  # told by the health check, which Serve writes down
            self._problem = f"{function} expected to run as long as the endpoint, found: {error}"
