"""Files that appear whole or not at all, whoever else writes there, and folders that have one writer at a time.

A file is written under a name of its own beside its place and takes that place in one rename. So a reader, a second
writer, a full disk and a kill at any moment all find what stood there before, or what stands there now, whole.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks, but each file still appears whole
    fcntl = None  # type: ignore[assignment]

STALE = 3600  # seconds after which an unfinished file is one that a killed writer has left
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}

# Folders that this process holds, by what locked them: a lock of the system tells processes apart, but not threads.
_held: dict[tuple[int, int], object] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)  # locks stay with the parent


@contextmanager
def replacing(path: str | PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when the block ends, and of which a failure leaves nothing.

    Args:
        path: in a folder that is there. A link is followed; a pipe or a device is written to as it is.

    Raises:
        OSError: it cannot be written, such as for a full disk; what stood there before still does.

    Example:
        >>> import pathlib, tempfile
        >>> from l2l_fast.files import replacing
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "numbers"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"1 2 3")
        >>> path.read_bytes(), [entry.name for entry in path.parent.iterdir()]
        (b'1 2 3', ['numbers'])
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or the rename may outlive a power cut that the contents do not
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, so it stays as it was before", str(path)) from error
    finally:
        with suppress(OSError):  # of a failure; after a success there is none
            part.unlink()
    remove_unfinished(path, STALE)


def write_text(path: str | PathLike, text: str) -> None:
    """Put a text, in UTF-8 whatever the locale, in the place of what is there: see :func:`replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def append_line(path: str | PathLike, text: str) -> None:
    """Put a line, in UTF-8 whatever the locale, after what is there; a kill in between may leave a part of it."""
    with Path(path).open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # what a kill has left
                file.write(b"\n")
        file.write(text.encode() + b"\n")


def remove_unfinished(path: Path, age: float) -> None:
    """Remove what writers of ``path`` that were killed have left beside it, if it is older than ``age`` seconds."""
    for part in path.parent.iterdir():
        if part.name.startswith(f".{path.name}.") and part.suffix == ".part":
            with suppress(OSError):  # another writer was quicker, or it is not ours
                if time.time() - part.stat().st_mtime >= age:
                    part.unlink()


class HeldError(RuntimeError):
    """Another run holds the folder."""


@contextmanager
def locked(folder: str | PathLike) -> Iterator[None]:
    """Hold a folder, in which the file ``.lock`` says by whom; the lock ends with the process, however that ends.

    A file system without locks is warned of, and nothing is held there.

    Args:
        folder: one that is there.

    Raises:
        HeldError: (a RuntimeError) another process, or another holder in this one, has it.
        OSError: ``.lock`` cannot be opened.

    Example:
        >>> import tempfile
        >>> from l2l_fast.files import HeldError, locked
        >>> folder = tempfile.mkdtemp()
        >>> with locked(folder):
        ...     try:
        ...         with locked(folder):
        ...             pass
        ...     except HeldError:
        ...         print("held")
        held
    """
    place, ours = os.stat(folder), object()
    key = place.st_dev, place.st_ino
    # Looked at first: to close any file of the lock's would end a lock that this process has.
    if _held.setdefault(key, ours) is not ours:
        raise HeldError(f"another run of this process is using {folder}: wait for it, or name another folder")
    try:
        with (Path(folder) / ".lock").open("ab+", buffering=0) as file:
            _lock(file, folder)
            yield
    finally:
        if _held.get(key) is ours:
            del _held[key]


def _lock(file: BinaryIO, folder: str | PathLike) -> None:
    """By the system's own record of locks: a child of ours that outlives us does not keep it."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            warnings.warn(
                f"the file system of {folder} has no locks ({error.strerror}): see to it that no other run uses it",
                stacklevel=2,
            )
            return
        file.seek(0)
        holder = file.read(200).decode(errors="replace") or "whose process is not known"
        raise HeldError(
            f"another run ({holder}) is using {folder}: wait for it or stop it, or name another folder"
        ) from None
    with suppress(OSError):  # of a full disk: the lock holds without a name in it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
