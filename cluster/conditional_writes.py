"""Does a bucket's server refuse what S3's conditional writes must refuse? Asked before anything depends on it.

A server that ignores If-None-Match or If-Match answers every such write with success: two holders of one lease, lines
of the journal that replace each other, and nobody would be told. So a small object is written that must not be, once
for each process and bucket, beside the lease that is claimed first, and removed again.
"""

import posixpath
import uuid
from contextlib import suppress

from cluster import s3, storage
from cluster.errors import StorageError

_honoured: set[tuple[str, str]] = set()
"""(server, bucket) that were tried in this process."""


def check_conditional_writes(uri: str) -> None:
    """Try that the server of `uri` honours both conditions; StorageError when not. A disk needs no trial."""
    if not storage.is_s3(uri):
        return
    bucket = uri.removeprefix(storage.S3_SCHEME).partition("/")[0]
    with s3.worded("open", uri):
        server = s3.client().meta.endpoint_url
    if (server, bucket) not in _honoured:
        _try(storage.join(posixpath.dirname(uri), f".conditional-{uuid.uuid4().hex}"), uri)
        _honoured.add((server, bucket))


def _try(probe: str, uri: str) -> None:
    try:
        storage.put_if_absent(probe, b"1")
        ignored = ["If-None-Match"] if storage.put_if_absent(probe, b"2") else []
        ignored += ["If-Match"] if storage.replace_if(probe, b"3", "0" * 32) else []
    finally:
        with suppress(StorageError):  # who may not delete keeps a small hidden file
            storage.delete(probe)
    if ignored:
        raise StorageError(
            f"{uri} expected on a server that honours If-None-Match and If-Match on PutObject, found that it ignores"
            f" {' and '.join(ignored)}: without them two processes could hold one lease; update that server, or a proxy"
            " before it that drops these headers, or use a workspace on another one"
        )
