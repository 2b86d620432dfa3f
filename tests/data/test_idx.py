"""IDX files: what is read, and that everything else is refused with the file's name and a cure."""

import gzip
import struct

import pytest
import torch

from l2l_fast.data import read_idx

VALUES = bytes(range(24))


def idx(sizes=(2, 3, 4), values=VALUES, *, kind=8, magic=b"\0\0") -> bytes:
    return magic + bytes([kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + values


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["images", "images.gz"])  # the content tells, not the name
def test_reads_gzipped_or_not(tmp_path, pack, name):
    path = tmp_path / name
    path.write_bytes(pack(idx()))
    values = read_idx(path, dimensions=3)
    assert values.dtype == torch.uint8
    assert torch.equal(values, torch.arange(24, dtype=torch.uint8).view(2, 3, 4))


GOOD = gzip.compress(idx())
BAD = {
    "empty file": (b"", "not an IDX file"),
    "text": (b"<html>not found</html>", "not an IDX file"),
    "magic": (idx(magic=b"\0\1"), "not an IDX file"),
    "floats": (idx(kind=0x0D), "type 0x0d"),
    "dimensions": (idx(sizes=(24,)), "1 dimensions where 3"),
    "header": (idx()[:9], "inside its header"),
    "truncated": (idx()[:-1], "truncated: 23 bytes"),
    "left over": (idx(values=VALUES + b"!"), "left over"),
    "no examples": (idx(sizes=(0, 3, 4), values=b""), "empty"),
    "gzip truncated": (GOOD[:-9], "truncated or corrupted"),
    "gzip corrupted": (GOOD[:20] + bytes([GOOD[20] ^ 0xFF]) + GOOD[21:], "truncated or corrupted"),
    "gzip checksum": (GOOD[:-8] + b"\0\0\0\0" + GOOD[-4:], "truncated or corrupted"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(tmp_path, case):
    content, why = BAD[case]
    path = tmp_path / "some-images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=why) as caught:
        read_idx(path, dimensions=3)
    assert str(path) in str(caught.value)
    assert "Replace the file, or delete it" in str(caught.value)


def test_refuses_another_content(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx())
    with pytest.raises(ValueError, match="not the published one"):
        read_idx(path, dimensions=3, sha256="0" * 64)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "nothing", dimensions=1)
