"""Distributed training saved at two ranks, and gone on with at two, one and three.

Every rank also trains a whole copy of the model on all rows: what the distributed runs are held to. At two ranks a run
that goes on has the unbroken run's losses to the last bit; other numbers of ranks sum in another order.
"""

import subprocess
import sys

import pytest
import torch

_CODE = """
import functools, os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import l2l_fast as l2l
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

folder, phase, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
ROWS, HALF, STEPS = 12, 3, 6

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

def groups_of(model, **options):
    return [{"params": [p for p in model.parameters() if p.ndim > 1], **options},
            {"params": [p for p in model.parameters() if p.ndim < 2]}]

OPTIMIZERS = {
    "l2l-base": lambda model: l2l.LSTMOptimizer(model.parameters(), lr=0.02, weight_decay=0.1),
    "orthogonalized": lambda model: l2l.LSTMOptimizer(groups_of(model, orthogonalize=True), lr=0.02, weight_decay=0.1),
    "l2l-base-v1": lambda model: l2l.LSTMOptimizer(model.parameters(), "l2l-base-v1", weight_decay=0.1),
}

def rows_of(step, part, parts):
    inputs = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))
    return inputs[part * ROWS // parts : (part + 1) * ROWS // parts]

def train(model, optimizer, first, steps, part=rank, parts=world, step=None):
    losses = []
    for t in range(first, first + steps):
        optimizer.zero_grad()
        loss = (model(rows_of(t, part, parts)) - 1).square().mean()
        loss.backward()
        (step or optimizer.step)()
        losses.append(loss.detach().clone())
    return losses

def whole_run(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 0, STEPS, 0, 1)
    return list(model.parameters())

def agree(model, expected):
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        ours = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)

def same_bits(ours, theirs):
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs)), (ours, theirs)

def start_sharded(make):
    model = make_model()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, make(model)

def save(model, optimizer, name):
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(parts, checkpoint_id=f"{folder}/{name}")

def load(model, optimizer, name):
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(parts, checkpoint_id=f"{folder}/{name}")
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    counts = {float(optimizer.state[param]["step"]) for param in model.parameters()}
    assert counts == {float(HALF)}, counts

for name, make in OPTIMIZERS.items():
    expected = whole_run(make)
    if phase == "save":
        model, optimizer = start_sharded(make)
        train(model, optimizer, 0, HALF)
        save(model, optimizer, name)
        losses = train(model, optimizer, HALF, HALF)
        agree(model, expected)
    model, optimizer = start_sharded(make)
    load(model, optimizer, name)
    resumed = train(model, optimizer, HALF, HALF)
    agree(model, expected)
    for param in model.parameters():
        assert optimizer.state[param]["lstm"].placements == param.placements
    if phase == "save":
        same_bits(resumed, losses)

if phase == "save":
    # A compiled step goes on from an eager run's checkpoint.
    model, optimizer = start_sharded(OPTIMIZERS["l2l-base"])
    load(model, optimizer, "l2l-base")
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=torch.__version__ < (2, 14))
    train(model, optimizer, HALF, HALF, step=step)
    agree(model, whole_run(OPTIMIZERS["l2l-base"]))

    def start_ddp(make):
        model = nn.parallel.DistributedDataParallel(make_model())
        return model, make(model)

    def start_zero(make):
        model = nn.parallel.DistributedDataParallel(make_model())
        return model, ZeroRedundancyOptimizer(model.parameters(), l2l.LSTMOptimizer, lr=0.02, weight_decay=0.1)

    for kind, start in {"DDP": start_ddp, "ZeRO": start_zero}.items():
        make = OPTIMIZERS["l2l-base"]
        model, optimizer = start(make)
        train(model, optimizer, 0, HALF)
        if kind == "ZeRO":
            optimizer.consolidate_state_dict(0)
        path = f"{folder}/{kind}.pt"
        if rank == 0:
            torch.save([model.state_dict(), optimizer.state_dict()], path)
        losses = train(model, optimizer, HALF, HALF)
        agree(model, whole_run(make))
        again, other = start(make)
        saved = torch.load(path, weights_only=True)
        again.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        same_bits(train(again, other, HALF, HALF), losses)
        same_bits(list(again.parameters()), list(model.parameters()))

dist.barrier()
os._exit(0)  # all is checked; gloo's threads sometimes abort an interpreter that ends by itself
"""


def _run(folder, phase, world):
    command = [sys.executable, "-W", "ignore", "-c", _CODE, str(folder), phase]
    ranks = [subprocess.Popen([*command, str(rank), str(world)], stderr=subprocess.PIPE) for rank in range(world)]
    try:
        errors = [rank.communicate(timeout=600)[1].decode() for rank in ranks]
    finally:  # one that failed leaves the others waiting for it
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_saved_at_two_ranks_goes_on_at_two_one_and_three(tmp_path):
    """FSDP2 by way of torch.distributed.checkpoint, eagerly and compiled; DDP and ZeroRedundancyOptimizer at two."""
    _run(tmp_path, "save", 2)
    for world in (1, 3):
        _run(tmp_path, "load", world)
