"""The errors this folder raises on purpose; each takes one message: what was expected, what was found, what to do.

`exit_code` is what the command line returns for it (2: the input is wrong and nothing was touched; 1: it failed).
"""


class PlacementError(ValueError):
    """The asked-for workers, devices or addresses cannot be had; nothing was touched."""

    exit_code = 2


class StorageError(RuntimeError):
    """Bytes could not be read or written; nothing half-written counts as whole."""

    exit_code = 1


class BucketError(StorageError):
    """A bucket that was named does not exist."""

    exit_code = 2


class DamagedError(StorageError):
    """What was written once is there and not as it was, or a part of it is gone: no waiting mends that."""


class LeaseLostError(StorageError):
    """Another process took the lease over, or wrote with a newer token; nothing was changed by the late one."""


class WorkerError(RuntimeError):
    """The worker group failed and its failure budget is spent."""

    exit_code = 1


class EndpointError(RuntimeError):
    """The endpoint cannot be started or reached."""

    exit_code = 1


def reason_of(error: Exception) -> str:
    """What MLflow's client says of a failed call, in one line; its many words for a dead address in three."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "nothing answers there" if "Failed to establish a new connection" in first else first[:300]


class TrackingError(RuntimeError):
    """The MLflow tracking server, or the model registry there, could not be asked."""

    exit_code = 1


class RegistryError(RuntimeError):
    """The model registry has no such model, version or alias, or refused a change."""

    exit_code = 1


class ChallengerBusyError(RegistryError):
    """Another version is being tried on traffic."""


class ChampionMovedError(RegistryError):
    """Another promoter changed the champion between the evidence and the move; nothing was changed."""
