"""How old is an object, by the clock of the storage that keeps it? Machines' own clocks differ, and are set."""

from email.utils import parsedate_to_datetime

from cluster import s3, storage


def age_s(uri: str) -> float | None:
    """Seconds since an object on S3 was written, in whole ones; None for a file: a disk tells no time of its own.

    FileNotFoundError when it is not there, StorageError when it cannot be asked.
    """
    if not storage.is_s3(uri):
        return None
    bucket, _, key = uri.removeprefix(storage.S3_SCHEME).partition("/")
    with s3.worded("read", uri):
        answer = s3.head(bucket, key)
    now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return (parsedate_to_datetime(now) - answer["LastModified"]).total_seconds() if now else None
