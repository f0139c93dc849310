"""What every worker of a run is told: small, picklable, the same for all ranks."""

from dataclasses import dataclass
from pathlib import Path

from flows.config import Config
from flows.encode import EncodedPaths


@dataclass(frozen=True)
class Job:
    """One run: its config, where its inputs lie, and where its outputs and numbers go."""

    config: Config
    base: Path
    directory: Path
    data: EncodedPaths
    dataset: Path
    mlflow_uri: str
    mlflow_run_id: str
    old: Path | None = None
    """Dataset version whose pictures are replayed; None: all pictures are alike."""
    pictures_at_end: bool = False
    """Draw where the run ends or is stopped, and not at every evaluation: a search looks at losses."""
