"""The processes of a data-parallel run, as ``torchrun`` starts them; without one there is a single rank."""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed


def require_group() -> None:
    """Refuse to be one of several processes that know nothing of each other.

    Raises:
        RuntimeError: the environment has a ``WORLD_SIZE`` above 1, and there is no process group.
    """
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdecimal() and int(size) > 1 and not _grouped():
        raise RuntimeError(
            f"WORLD_SIZE is {size} and torch.distributed has no process group, so that every process would train the "
            "same run: call torch.distributed.init_process_group() before MetaTrainer, or start one process alone, "
            "without torchrun or with WORLD_SIZE unset, as commands of l2l-fast must be"
        )


def rank() -> int:
    return distributed.get_rank() if _grouped() else 0


def world() -> int:
    return distributed.get_world_size() if _grouped() else 1


def average_(*tensors: Tensor) -> None:
    """Put the mean over the ranks in place of the tensors, in one reduction."""
    if world() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    pieces = (flat / world()).split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view_as(tensor))


def any_rank(flag: bool) -> bool:
    """Whether any rank says so: all stop together."""
    if world() == 1:
        return flag
    flags = torch.tensor(float(flag))
    distributed.all_reduce(flags)
    return flags.item() > 0


def gather(value) -> list:
    """Every rank's value, on rank 0."""
    if world() == 1:
        return [value]
    values = [None] * world() if rank() == 0 else None
    distributed.gather_object(value, values)
    return values


def wait_for_all() -> None:
    if world() > 1:
        distributed.barrier()


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()
