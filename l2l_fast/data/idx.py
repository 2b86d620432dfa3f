"""IDX files, the format of MNIST: 0, 0, type, number of dimensions, the sizes as big-endian uint32, then the values."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

_UNSIGNED_BYTE = 0x08
_GZIP = b"\x1f\x8b"


class IdxError(ValueError):
    """A file that is not the IDX file expected; ``what`` says why without naming the file."""

    def __init__(self, path: str | Path, what: str) -> None:
        super().__init__(f"cannot use {path}: {what}. Replace the file, or delete it (MNIST is then downloaded again)")
        self.what = what


def read_idx(path: str | Path, *, dimensions: int, sha256: str | None = None) -> Tensor:
    """An IDX file of unsigned bytes, gzipped or not (its first bytes tell, not its name).

    Args:
        path: the file.
        dimensions: how many dimensions it must have (3 for MNIST's images, 1 for its labels).
        sha256: what its unzipped content must hash to, in hexadecimal; None takes any content.

    Raises:
        IdxError: (a ValueError) if the file is not exactly that, naming the file, what is wrong and the cure.
        FileNotFoundError: if there is no such file.

    Example:
        >>> import struct, tempfile, pathlib
        >>> from l2l_fast.data import read_idx
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels"
        >>> _ = path.write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + bytes([5, 0, 4]))
        >>> read_idx(path, dimensions=1)
        tensor([5, 0, 4], dtype=torch.uint8)

    References:
        The IDX format, at the end of http://yann.lecun.com/exdb/mnist/
    """
    content, values = _parse(path, dimensions)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise IdxError(path, f"its content is not the published one (sha256 of the unzipped bytes is not {sha256})")
    return values


def _parse(path: str | Path, dimensions: int) -> tuple[bytearray, Tensor]:
    content = bytearray(_unzipped(path))  # torch.frombuffer wants writable memory
    if len(content) < 4 or content[:2] != b"\0\0":
        raise IdxError(path, "it is not an IDX file: the first two bytes are not zero")
    if content[2] != _UNSIGNED_BYTE:
        raise IdxError(path, f"its values have type 0x{content[2]:02x}; only unsigned bytes, 0x08, are read")
    if content[3] != dimensions:
        raise IdxError(path, f"it has {content[3]} dimensions where {dimensions} are expected")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise IdxError(path, "it is truncated inside its header")
    sizes = struct.unpack_from(f">{dimensions}I", content, 4)
    found, wanted = len(content) - start, math.prod(sizes)
    if found != wanted:
        what = "is truncated" if found < wanted else "has bytes left over"
        raise IdxError(path, f"it {what}: {found} bytes of values where its sizes {list(sizes)} need {wanted}")
    if wanted == 0:
        raise IdxError(path, f"it is empty: its sizes are {list(sizes)}")
    return content, torch.frombuffer(content, dtype=torch.uint8, offset=start).view(sizes)


def _unzipped(path: str | Path) -> bytes:
    content = Path(path).read_bytes()
    if not content.startswith(_GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise IdxError(path, f"it is truncated or corrupted: {error}") from error
