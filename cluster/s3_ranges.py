"""How is an object of a bucket read like a file, from any place in it, without having it here?

Every read is one request for a range of the version that was there at the start; one that was replaced meanwhile is
refused, never mixed. Faults of the network are `s3`'s matter.
"""

import io
from typing import Any

from cluster import s3

READ_AHEAD_BYTES = 4 * 2**20


def open_seekable(bucket: str, key: str) -> io.BufferedReader:
    """Open an object for reading with seek; all ranges are of one version of it, or reading fails."""
    return io.BufferedReader(_Ranges(bucket, key), buffer_size=READ_AHEAD_BYTES)


class _Ranges(io.RawIOBase):
    """An object as a file: every read is one request for a range of the version that was there at the start."""

    def __init__(self, bucket: str, key: str) -> None:
        self._bucket, self._key, self._at = bucket, key, 0
        found = s3.head(bucket, key)
        self._size, self._etag = int(found["ContentLength"]), found["ETag"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readall(self) -> bytes:
        rest = bytearray(max(0, self._size - self._at))
        self.readinto(rest)
        return bytes(rest)

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        span = f"bytes={self._at}-{self._at + wanted - 1}"
        uri = f"s3://{self._bucket}/{self._key}"
        with s3.worded("read", uri):
            try:
                content, _ = s3.read(self._bucket, self._key, Range=span, IfMatch=self._etag)
            except s3.client().exceptions.ClientError as error:
                if error.response["Error"]["Code"] not in s3.CONDITION_FAILED:
                    raise
                raise OSError("it was replaced while it was read; read it again") from None
            if len(content) != wanted:
                raise OSError(f"{wanted} bytes were asked for, {len(content)} came")
        buffer[:wanted] = content
        self._at += wanted
        return wanted
