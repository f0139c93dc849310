"""Where are computed things kept so that they are computed once, whatever is renamed, added or killed?

A `ShardStore` is a folder of Parquet shards with a `key` column; a key names content, so equal keys mean equal rows and
nothing is ever updated. A shard appears whole or not at all (temporary name, flush, rename), so killing a writer loses
the shard in the making and no other. Packed tables are the same rows in a wanted order, as .npy for memory mapping.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.errors import DataError

KEY = "key"


class ShardStore:
    """A folder of shards; missing is empty."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def index(self) -> dict[str, str]:
        """Return key -> name of the shard that holds it (the first by name, should two hold it)."""
        index: dict[str, str] = {}
        for name in self._names():
            for key in self._read(name, [KEY])[KEY].to_pylist():
                index.setdefault(key, name)
        return index

    def keys(self) -> set[str]:
        """Return every stored key; only key columns are read."""
        return set(self.index())

    def scan(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield every shard's key and `columns`."""
        for name in self._names():
            yield self._read(name, [KEY, *columns])

    def write(self, table: pa.Table) -> str:
        """Store the rows as one shard and return its name, which its keys decide; OSError leaves nothing behind."""
        keys = sorted(table[KEY].to_pylist())
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:24] + ".parquet"
        self.directory.mkdir(parents=True, exist_ok=True)
        with _whole_file(self.directory / name) as file:
            # Pictures, latents and text states do not compress; trying would cost more than reading them.
            pq.write_table(table, file, compression="none", use_dictionary=False, write_statistics=False)
        return name

    def read(self, keys: Collection[str], columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield key and `columns` of the wanted keys shard by shard, each key once; DataError names what is missing."""
        index = self.index()
        by_shard: dict[str, list[str]] = {}
        missing = []
        for key in keys:
            if key in index:
                by_shard.setdefault(index[key], []).append(key)
            else:
                missing.append(key)
        if missing:
            raise DataError(
                f"{self.directory} expected {len(keys)} entries, found {len(missing)} missing (first {missing[0]});"
                " run `fresco prepare` again"
            )
        for name in sorted(by_shard):
            yield self.read_shard(name, by_shard[name], columns)

    def read_shard(self, name: str, keys: Collection[str], columns: Sequence[str]) -> pa.Table:
        """Return key and `columns` of the wanted keys of one shard, in its order."""
        table = self._read(name, [KEY, *columns])
        return table.filter(pc.is_in(table[KEY], value_set=pa.array(list(keys), pa.string())))

    def discard(self, names: Collection[str]) -> None:
        """Remove shards; the folder goes too when it is empty."""
        for name in names:
            (self.directory / name).unlink(missing_ok=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("[!.]*.parquet"))

    def _read(self, name: str, columns: list[str]) -> pa.Table:
        path = self.directory / name
        try:
            return pq.ParquetFile(path).read(columns=columns)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{path} expected to be a whole shard, found it damaged: {error}; delete that file and run the command"
                " again: what it held is computed anew"
            ) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Hold a temporary folder that becomes `path` when the block ends well, and disappears when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():  # else another process packed the same rows meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class RowFile:
    """A .npy file of known shape whose rows are written in any order; rows never written are zero.

    Not a memory map: on a full disk writing to one kills the process, where writing to a file raises OSError.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self._dtype.itemsize
        self._file = path.open("wb")
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._first = self._file.tell()
        self._file.truncate(self._first + shape[0] * self._row_bytes)

    def put(self, row: int, values: np.ndarray) -> None:
        """Write the start of one row (all of it when `values` is whole)."""
        self._file.seek(self._first + row * self._row_bytes)
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            if failed is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
