"""Which pictures of a run's data are old, checked before anything starts: `train.replay_of` and what it needs.

The old pictures are those of the named dataset version; they must be in the run's own data too (a version that grew
from it has them all), because a run reads one dataset's encodings. What batches are made of: `components/replay.py`.
"""

from cluster.artifacts import open_workspace
from components.dataset import TRAIN, DatasetVersion
from components.errors import InputError
from flows.config import Config
from flows.dataset_versions import named_version


def old_version(config: Config) -> DatasetVersion | None:
    """Return the version named by train.replay_of, None where it is empty; InputError when it is not here.

    With data.version set, its pictures are checked at once, before Ray or anything else starts.
    """
    if not config.train.replay_of:
        return None
    workspace = open_workspace(config.workspace)
    try:
        old, _ = named_version(workspace, config.train.replay_of)
    except InputError as error:
        raise InputError(f"train.replay_of: {error}") from error
    if config.data.version:
        check_parts(config, old, named_version(workspace, config.data.version)[0])
    return old


def check_parts(config: Config, old: DatasetVersion, dataset: DatasetVersion) -> None:
    """InputError when a run on `dataset` would have no new training pictures, or none to replay."""
    known = {item.sha256 for item in old.items}
    total = len(dataset.split(TRAIN))
    num_old = sum(item.sha256 in known for item in dataset.split(TRAIN))
    if num_old == total:
        raise InputError(
            f"train.replay_of={old.id} expected training pictures in {dataset.id} that are not in it, found none of"
            f" {total}; wait for new pictures, or train on all of them alike with train.replay_of=''"
            " train.replay_fraction=0"
        )
    if config.train.replay_fraction and not num_old:
        raise InputError(
            f"train.replay_fraction={config.train.replay_fraction:g} expected training pictures of {old.id} in"
            f" {dataset.id}, found none of {total}; name a version that it grew from, or set train.replay_fraction=0"
        )
