"""The folder from which a run of meta-training can go on: one file, one writer, and no half of anything."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from l2l_fast.files import locked, remove_unfinished, replacing
from l2l_fast.meta import ranks
from l2l_fast.meta.identity import differences

FORMAT_VERSION = 3  # 1 knew tasks by their plain options alone, 2 optimizers and teachers by their class or not at all
NAMED = 5  # differences that the refusal of a checkpoint names
SECONDS = 60.0  # that a kill may cost, where meta-steps are long


class CheckpointFolder:
    """A folder with the file ``trainer.pt``, of which rank 0 is the writer.

    Args:
        folder: where; made when it is first held.
        device: where the tensors of a checkpoint are loaded, and from which ranks agree.
    """

    def __init__(self, folder: str | os.PathLike, device: torch.device) -> None:
        self.folder, self.path, self.device = Path(folder), Path(folder) / "trainer.pt", device
        self._ours: tuple | None = None  # what the file was like when this run last read or wrote it
        self._written = time.monotonic()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the one run that uses the folder; before any work, as what cannot be saved need not be begun.

        Raises:
            ValueError: the folder cannot be made or written to.
            RuntimeError: another run uses it, or has written to it since this one did.
        """
        with ExitStack() as stack:
            refusal = None
            if ranks.rank() == 0:
                try:
                    self._make()
                    stack.enter_context(locked(self.folder))
                    remove_unfinished(self.path, 0)  # nobody else is writing now
                    self._require_ours()
                except (ValueError, RuntimeError, OSError) as error:
                    refusal = error
            ranks.raise_together(refusal, self.device)
            self._written = time.monotonic()
            yield

    def read(self, settings: dict) -> dict | None:
        """What the last run with the same settings saved; None if there is nothing.

        Raises:
            ValueError: there is something else, or it is of a run with other settings; the message names them.
        """
        saved = refusal = None
        if found := self.path.exists():
            try:
                saved = self._read(settings)
            except ValueError as error:
                refusal = error
        if ranks.any_rank(found, self.device) and not found:
            refusal = ValueError(f"{self.path} is on another rank and not here: name a folder that all ranks share")
        ranks.raise_together(refusal, self.device)
        self._ours = self._signature()
        return saved

    def due(self, meta_step: int, every: int) -> bool:
        """Whether to write one after this meta-step: every so many, or as the last was long ago on any rank."""
        late = time.monotonic() - self._written > SECONDS
        return meta_step % every == 0 or ranks.any_rank(late, self.device)

    def write(self, saved: dict | None) -> None:
        """Put a checkpoint in the place of the last one: a kill leaves one of them, whole. All ranks wait for it.

        Args:
            saved: on rank 0, what to save.

        Raises:
            OSError: it cannot be written, such as for a full disk; the last one is there still.
        """
        failure = None
        if ranks.rank() == 0:
            # In memory first: torch turns what a disk says into an error of its own.
            contents = io.BytesIO()
            torch.save({"format_version": FORMAT_VERSION, **saved}, contents)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with replacing(self.path) as file:
                    file.write(contents.getbuffer())
            except OSError as error:
                failure = error
            self._ours = self._signature()
        ranks.raise_together(failure, self.device)
        self._written = time.monotonic()

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            reason = None if os.access(self.folder, os.W_OK | os.X_OK) else "it cannot be written to"
        except OSError as error:
            reason = error.strerror
        if reason:
            raise ValueError(f"checkpoint must be a folder, got {str(self.folder)!r} ({reason}): name another one")

    def _require_ours(self) -> None:
        """Between two calls of ``fit`` the folder is free: another run may have gone on from what this one left."""
        if self._ours is not None and self._signature() not in (None, self._ours):
            raise RuntimeError(
                f"another run has written {self.path} since this one did: go on from it with a new MetaTrainer, or "
                "name another folder"
            )

    def _signature(self) -> tuple | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self, settings: dict) -> dict:
        path = self.path
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            version, theirs = saved["format_version"], saved["settings"]
        except Exception as error:
            raise ValueError(
                f"{path} is not a checkpoint of MetaTrainer ({error}); give another checkpoint folder"
            ) from None
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format {version}, this l2l_fast reads {FORMAT_VERSION}: give another folder")
        if differing := differences(theirs, settings):
            more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
            raise ValueError(
                f"{path} belongs to a run with {', '.join(differing[:NAMED])}{more}: use the same options and tasks to "
                "go on with it, or another checkpoint folder to start anew"
            )
        return saved
