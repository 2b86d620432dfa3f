"""The processes of a data-parallel run, as ``torchrun`` starts them; without one there is a single rank."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


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
