"""The processes of a data-parallel run, as ``torchrun`` starts them; without one there is a single rank.

NCCL, which may be all that a group has, knows the tensors of a GPU alone, and each rank's on a GPU of its own: what is
sent says from which device.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_map_only


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
            "without torchrun or with WORLD_SIZE unset, as commands of l2l-fast but meta-train must be"
        )


# For another rank, after which torchrun starts all again: ranks do equal work, so a long wait is for one that is gone.
PATIENCE = timedelta(minutes=2)


@contextmanager
def joined(device: torch.device | str) -> Iterator[torch.device]:
    """Be a rank of the group that torchrun has started this process for; without torchrun, nothing.

    Args:
        device: that was asked for; of "cuda" each rank has a GPU of its own, by its number on the machine.

    Yields:
        this rank's device.
    """
    device = torch.device(device)
    if not (distributed.is_available() and distributed.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1"):
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    from torch.distributed.rendezvous import rendezvous  # not in a torch without torch.distributed

    store, own, size = next(rendezvous("env://", timeout=PATIENCE))
    store.set_timeout(PATIENCE)
    backend, store = "nccl" if device.type == "cuda" else "gloo", _fresh(store, own, size)
    distributed.init_process_group(backend, store=store, rank=own, world_size=size, timeout=PATIENCE)
    yield device
    # After an error the group is left as it is: others may wait in it, and torchrun ends them.
    distributed.destroy_process_group()


def _fresh(store: distributed.Store, own: int, size: int) -> distributed.Store:
    """A part of torchrun's store that no earlier start of these ranks has written to.

    torchrun keeps one store over all restarts. Without this a rank may find there where one that was killed had
    listened, and both wait for a connection that nobody makes. The first rank chooses a name that is new, and tells it
    whoever asks until each of the others has confirmed it; questions of processes that are gone hold nobody up.

    Args:
        store: that all ranks share, and may have shared before.
        own, size: this rank, and how many there are.

    Raises:
        RuntimeError: another rank does not come.
    """
    if own:
        question = uuid.uuid4().hex
        store.set(f"question/{own}", question)
        name = store.get(f"answer/{question}").decode()
        store.set(f"{name}/{own}", "")
        return distributed.PrefixStore(name, store)
    name, others = uuid.uuid4().hex, set(range(1, size))
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while others:
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(others)} of {size} have not come: see what their logs say")
        for other in others:
            if store.check([f"question/{other}"]):
                store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
        others = {other for other in others if not store.check([f"{name}/{other}"])}
        time.sleep(0.01)
    return distributed.PrefixStore(name, store)


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


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says so: all stop together."""
    if world() == 1:
        return flag
    flags = torch.full((), float(flag), dtype=torch.float32, device=device)
    distributed.all_reduce(flags)
    return flags.item() > 0


def raise_together(error: Exception | None, device: torch.device) -> None:
    """Where a rank has an error, raise on all of them: none is left waiting for one that has stopped."""
    if any_rank(error is not None, device):
        raise error or RuntimeError("another rank of this run has failed; its own message says why")


def gather(value, device: torch.device) -> list:
    """Every rank's value, on rank 0; the tensors in it come on the CPU."""
    if world() == 1:
        return [value]
    values = [None] * world() if rank() == 0 else None
    value = tree_map_only(Tensor, Tensor.cpu, value)  # rank 0 may not see the GPU that they are on
    # Torch sends objects by the current GPU, which is the first one unless the script has set it.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        distributed.gather_object(value, values)
    return values


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()
