"""Features of many images, one row each: in memory, or in a temporary file if they are too large.

20 000 activations of 32 x 32 x 64 are 5 GB. DeepSAD reads them in random batches, epoch after
epoch, so they have to lie somewhere; here they lie in memory up to `IN_MEMORY` bytes, and beyond
that in an unnamed temporary file that is read row by row. The file is read and not mapped: mapped
pages would count as the process's own memory.
"""

import os
import tempfile
from collections.abc import Iterator

import numpy as np

__all__ = ["IN_MEMORY", "FeatureRows"]

IN_MEMORY = 2**29  # bytes; two of these, own and real, stay far below the 3 GiB of a small machine


class FeatureRows:
    """`[n, ...]` float32, written by slices and read by slices or by an array of row numbers.

    It has what code that takes a NumPy array needs of one: `shape`, `dtype`, `ndim`, `len` and
    indexing along the first axis, which returns NumPy arrays. The file has no name and vanishes
    with the object, or with the process.

    Args:
      shape: n and the shape of a row.
      in_memory: bytes up to which the rows stay in memory.
    Raises:
      OSError: if the temporary folder has no room; TMPDIR names another one.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...], *, in_memory: int | None = None) -> None:
        self.shape = tuple(int(side) for side in shape)
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        limit = IN_MEMORY if in_memory is None else in_memory
        self._array: np.ndarray | None = None
        if self.shape[0] * self._row_bytes <= limit:
            self._array = np.zeros(self.shape, self.dtype)
        else:
            self._file = tempfile.TemporaryFile(prefix="flipad_jax-features-", buffering=0)
            self._file.truncate(self.shape[0] * self._row_bytes)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def on_disk(self) -> bool:
        """Whether the rows lie in a file."""
        return self._array is None

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, where: slice, rows: np.ndarray) -> None:
        start, stop, step = where.indices(len(self))
        rows = np.ascontiguousarray(rows, self.dtype)
        if step != 1 or rows.shape != (stop - start, *self.shape[1:]):
            raise ValueError(
                f"rows {start}:{stop}:{step} of {list(self.shape)} got {list(rows.shape)}; "
                f"expected {[stop - start, *self.shape[1:]]} in one piece"
            )
        if self._array is not None:
            self._array[where] = rows
            return
        content, offset = rows.reshape(-1).data.cast("B"), start * self._row_bytes
        while content.nbytes:
            written = os.pwrite(self._file.fileno(), content, offset)
            content, offset = content[written:], offset + written

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        if self._array is not None:
            return self._array[where]
        index = np.arange(len(self))[where]
        rows = np.empty((len(index), *self.shape[1:]), self.dtype)
        # A run of neighbours is one read.
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        for part in np.split(np.arange(len(index)), breaks):
            if part.size:
                self._read(rows[part[0] : part[-1] + 1], int(index[part[0]]) * self._row_bytes)
        return rows

    def _read(self, into: np.ndarray, offset: int) -> None:
        buffer = into.reshape(-1).data.cast("B")
        while buffer.nbytes:
            count = os.preadv(self._file.fileno(), [buffer], offset)
            if count == 0:
                raise OSError("the temporary file of the features ends early")
            buffer, offset = buffer[count:], offset + count

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]
