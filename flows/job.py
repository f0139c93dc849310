"""What every worker of a run is told: small, picklable, the same for all ranks."""

from dataclasses import dataclass
from pathlib import Path

from cluster import stage
from cluster.artifacts import read_record
from cluster.whole_folders import fetch_whole
from components.dataset import load_dataset
from flows.config import Config
from flows.encode import EncodedPaths, pack_tables


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

    def fetch_inputs(self) -> None:
        """Have what the run reads on this machine; only a workspace on S3 ever has it elsewhere."""
        if stage.root_address(self.directory) is None:
            return
        if stage.root_address(self.base) is not None:
            fetch_whole(self.base)
        if self.old is not None:
            read_record(self.old)
        if read_record(self.dataset) is not None:
            pack_tables(load_dataset(self.dataset), self.data)
