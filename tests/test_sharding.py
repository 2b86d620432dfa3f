"""Sharded parameters: state shards as its parameter does, and the steps are those of the whole."""

import subprocess
import sys

import pytest
import torch

_RANK = """
import os, sys, torch, torch.distributed as dist
import l2l_fast as l2l
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))  # five rows over two ranks: uneven

network = l2l.CoordinatewiseLSTM("moments", 4, 2)
network.load_flat_weights_(torch.linspace(-1, 1, len(network.flat_weights())))
whole, sharded = make(), make()
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
fully_shard(sharded, mesh=mesh)
pairs = [(model, l2l.LSTMOptimizer(model.parameters(), network)) for model in (whole, sharded)]

def train(steps, first=0):
    for t in range(first, first + steps):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))  # the same on every rank
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

train(3)
weight = sharded[0].weight
state = pairs[1][1].state[weight]["lstm"]
assert state.shape == (5, 6, 18) and state.placements == weight.placements
assert state.to_local().shape[0] == weight.to_local().shape[0] == (3 if rank == 0 else 2)

# A distributed state_dict goes into a fresh optimizer, which goes on as the old one would have.
saved = get_optimizer_state_dict(sharded, pairs[1][1])
pairs[1] = (sharded, l2l.LSTMOptimizer(sharded.parameters(), network))
set_optimizer_state_dict(sharded, pairs[1][1], saved)
train(3, first=3)
for ours, theirs in zip(whole.parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(theirs.full_tensor(), ours)
dist.barrier()
os._exit(0)  # all is checked; gloo's threads sometimes abort an interpreter that ends by itself
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_fully_sharded_steps_are_the_steps_of_the_whole(tmp_path):
    command = [sys.executable, "-c", _RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in (0, 1)]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
