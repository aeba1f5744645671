"""Parquet files, opened with suspicion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """pyarrow's ParquetFile of a path, whose size has been held against the rows that it promises.

    Raises:
        ValueError: pyarrow is not installed, or the file, or what is read of it within the context, is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install 'prefixmem_fast[train]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_size(file.metadata, path)
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"it is no Parquet file that can be read: {error}") from None


def _check_size(metadata: Any, path: Path) -> None:
    """A damaged file may promise any number of rows; Parquet's encodings hold a few thousand in a byte at most."""
    promised, size = metadata.num_rows, path.stat().st_size
    if promised > 10_000 * size:
        raise ValueError(f"it promises {promised:,} rows in a file of {size:,} bytes")
