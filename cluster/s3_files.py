"""How does a whole file get from a disk into a bucket and back, so that what arrives is what was sent?

Every upload carries the SHA-256 of its bytes in the object's metadata, and every download is compared with it (S3's own
checksums end where an upload has parts), is read again a few times when it differs, and appears on the disk by rename
or not at all. Large files travel in parts and never lie in memory whole. Faults of the network are `s3`'s matter.
"""

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from cluster import s3
from cluster.s3 import tag_of

SHA256 = "fresco-sha256"
IN_MEMORY_BYTES = s3.MULTIPART_BYTES


def upload(bucket: str, key: str, content: bytes) -> str:
    """Write a whole object or none, replacing what was there; return its ETag.

    Empty where it was uploaded in parts and another writer replaced it before its ETag could be asked for.
    """
    if len(content) >= IN_MEMORY_BYTES:
        return _in_parts(bucket, key, io.BytesIO(content), hashlib.sha256(content).hexdigest())
    metadata = {SHA256: hashlib.sha256(content).hexdigest()}
    return tag_of(s3.client().put_object(Bucket=bucket, Key=key, Body=content, Metadata=metadata))


def upload_file(bucket: str, key: str, path: Path) -> str:
    """Write a file of the disk as `upload` does; it must not change meanwhile."""
    if path.stat().st_size < IN_MEMORY_BYTES:
        return upload(bucket, key, path.read_bytes())
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return _in_parts(bucket, key, file, digest)


def describe(bucket: str, key: str) -> dict[str, Any] | None:
    """Return what boto3 says of an object (ContentLength, ETag, Metadata, LastModified); None when there is none."""
    try:
        return s3.head(bucket, key)
    except s3.client().exceptions.ClientError as error:
        if error.response["Error"]["Code"] == s3.NOT_THERE:
            return None
        raise


def download(bucket: str, key: str, path: Path) -> tuple[str, os.stat_result] | None:
    """Put the object on the disk, whole and as it was uploaded, replacing what is there; return its ETag and facts.

    None, and nothing changed, when there is no such object. OSError when what comes is not what was uploaded.
    """
    for attempt in range(1, s3.MAX_ATTEMPTS + 1):
        found = describe(bucket, key)
        if found is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                digest, etag, expected = _fetch(bucket, key, found, file)
                file.flush()
                os.fsync(file.fileno())
            if digest == expected:
                Path(temporary).chmod(0o644)
                facts = Path(temporary).stat()  # of this file, whoever replaces it a moment later
                os.replace(temporary, path)
                return etag, facts
        except s3.client().exceptions.ClientError as error:
            # Replaced or removed between two requests: looked at again.
            if error.response["Error"]["Code"] not in (*s3.CONDITION_FAILED, s3.NOT_THERE):
                raise
        finally:
            Path(temporary).unlink(missing_ok=True)
        s3.pause(attempt, f"read s3://{bucket}/{key}", OSError("what came differs from what was uploaded"))
    raise AssertionError("the last pause raises")


def _fetch(bucket: str, key: str, found: dict[str, Any], file: Any) -> tuple[str, str, str]:
    """Write the object's bytes to a file; return their SHA-256, the ETag, and the SHA-256 that they should have."""
    digest, size = hashlib.sha256(), int(found["ContentLength"])
    if size < IN_MEMORY_BYTES:
        content, answer = s3.read_answer(bucket, key)
        digest.update(content)
        file.write(content)
        found = answer
    else:
        for start in range(0, size, s3.PART_BYTES):
            span = f"bytes={start}-{min(start + s3.PART_BYTES, size) - 1}"
            content, _ = s3.read(bucket, key, Range=span, IfMatch=found["ETag"])
            digest.update(content)
            file.write(content)
    # What other tools put there has no digest of ours; its length, and where S3 has one its checksum, were compared.
    return digest.hexdigest(), tag_of(found), found["Metadata"].get(SHA256, digest.hexdigest())


def _in_parts(bucket: str, key: str, file: Any, digest: str) -> str:
    """Upload in parts, each tried again by itself; the object appears when all are there, or never."""
    from boto3.s3.transfer import TransferConfig

    parts = TransferConfig(multipart_threshold=IN_MEMORY_BYTES, multipart_chunksize=s3.PART_BYTES)
    s3.client().upload_fileobj(file, bucket, key, Config=parts, ExtraArgs={"Metadata": {SHA256: digest}})
    found = describe(bucket, key)
    ours = found is not None and found["Metadata"].get(SHA256) == digest
    return tag_of(found) if found is not None and ours else ""


def folders(bucket: str, prefix: str) -> list[str]:
    """Return the names of what a prefix that ends in "/" holds folders of, in order."""
    pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
    found = [one["Prefix"] for page in pages for one in page.get("CommonPrefixes", ())]
    return [name.removeprefix(prefix).rstrip("/") for name in found]
