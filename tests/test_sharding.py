"""Sharded parameters: state shards as its parameter does, and the steps are those of the whole.

Each case is code that two ranks run, and which asserts what it holds; one pair of processes runs all of them.
"""

import subprocess
import sys

import pytest
import torch

_BEGIN = """
import os, sys, torch, torch.distributed as dist
import l2l_fast as l2l
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
network = l2l.CoordinatewiseLSTM("moments", 4, 2)
network.load_flat_weights_(torch.linspace(-1, 1, len(network.flat_weights())))
"""

_FULLY_SHARDED = """
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))  # five rows over two ranks: uneven

whole, sharded = make(), make()
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
"""

# One RMS over the whole of each tensor, whichever way it is sharded; and whole matrices are orthogonalized.
_SCALED = """
import itertools
from torch.distributed.tensor import Replicate

sizes = {"update_rms": 0.6}, {"update_rms": 0.6, "max_update_rms": 2.0}
rules = [l2l.CoordinatewiseLSTM(**network.options | chosen) for chosen in sizes]
for rule in rules:
    rule.load_flat_weights_(network.flat_weights())
square = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
ways = [(mesh, [Shard(0)]), (mesh, [Shard(1)]), (mesh, [Replicate()]), (square, [Replicate(), Shard(0)]),
        (square, [Shard(1), Shard(0)])]
for dtype in (torch.float32, torch.bfloat16, torch.complex64):
    for orthogonalize, scaled in itertools.product((False, True), rules):
        shapes = [(5, 6), (3, 7), (6, 2, 3), (1, 4)]  # uneven, and a rank with nothing of it
        whole = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes for _ in ways]
        parts = [nn.Parameter(distribute_tensor(one.detach(), *way)) for one, way in zip(whole, ways * len(shapes))]
        mixed = [nn.Parameter(torch.ones(4, 3, dtype=dtype)) for _ in range(2)]  # one of a plain kind among them
        options = {"lr": 0.1, "weight_decay": 0.1, "orthogonalize": orthogonalize}
        groups = [*whole, mixed[0]], [*parts, mixed[1]]
        optimizers = [l2l.LSTMOptimizer(group, scaled, **options) for group in groups]
        for t in range(3):
            generator = torch.Generator().manual_seed(t)
            for one, part in zip(*groups):
                kind = dtype if dtype.is_complex else torch.float32
                grad = torch.randn(one.shape, generator=generator, dtype=kind).to(dtype)
                if one.ndim == 2:
                    grad[-1, -1] = float("nan")  # on one rank alone
                one.grad = grad
                sharded = hasattr(type(part), "to_local")
                part.grad = distribute_tensor(grad, part.device_mesh, part.placements) if sharded else grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert all(one.isfinite().all() and (one != 1).any() for one in whole)
        close = {"rtol": 8e-3, "atol": 8e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        for ours, theirs in zip(whole, parts, strict=True):
            torch.testing.assert_close(theirs.full_tensor(), ours.detach(), **close)
        torch.testing.assert_close(*mixed, **close)
"""

# What SequenceParallel gives a norm: parameters that every rank has whole, and gradients that each has a summand of.
_SUMMANDS = """
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

whole, parallel = nn.Sequential(nn.LayerNorm(4)), nn.Sequential(nn.LayerNorm(4))
parallelize_module(parallel, mesh, {"0": SequenceParallel()})
optimizers = [l2l.LSTMOptimizer(model.parameters(), network) for model in (whole, parallel)]
for t in range(3):
    inputs = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(t))
    whole(inputs).sin().sum().backward()
    parallel(distribute_tensor(inputs, mesh, [Shard(1)])).sin().sum().backward()
    assert parallel[0].weight.grad.placements != parallel[0].weight.placements
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
for ours, theirs in zip(whole.parameters(), parallel.parameters(), strict=True):
    torch.testing.assert_close(theirs.to_local(), ours)
"""

_OTHERWISE_SHARDED = """
theta, grad = torch.ones(4, 6), torch.linspace(-1, 1, 24).view(4, 6)
sharded = nn.Parameter(distribute_tensor(theta, mesh, [Shard(0)]))
sharded.grad = distribute_tensor(grad, mesh, [Shard(1)])
whole = nn.Parameter(theta.clone())
whole.grad = grad
for param in (whole, sharded):
    l2l.LSTMOptimizer([param], network).step()
torch.testing.assert_close(sharded.full_tensor(), whole)
"""

_NOT_FINITE_ON_ONE_RANK = """
sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
sharded.grad = distribute_tensor(torch.tensor([1.0, float("nan"), 1.0, 1.0]), mesh, [Shard(0)])
try:
    l2l.LSTMOptimizer([sharded], network, error_if_nonfinite=True).step()
    raise AssertionError("no error")
except RuntimeError as error:
    assert "not finite" in str(error)
assert sharded.full_tensor().eq(1).all()
"""

_COMPILED = """
import functools

# torch 2.14 cannot trace the gradients that fully_shard makes: there the step runs as it is.
one_graph = torch.__version__ < (2, 14)

def train_compiled(sharded, network=network, **options):
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model = make()
    if sharded:
        fully_shard(model, mesh=mesh)
    optimizer = l2l.LSTMOptimizer(model.parameters(), network, weight_decay=0.1, **options)
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=one_graph)
    step = compiled(optimizer.step) if sharded else optimizer.step
    for t in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        step()
        optimizer.param_groups[0]["lr"] *= 0.9
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == (2 if sharded else 0) or not one_graph
    return model.parameters()

for options in ({}, {"network": scaled, "lr": 0.1}):
    for ours, theirs in zip(train_compiled(False, **options), train_compiled(True, **options), strict=True):
        torch.testing.assert_close(theirs.full_tensor(), ours)
"""

_ZERO_REDUNDANCY = """
from torch.distributed.optim import ZeroRedundancyOptimizer

def train_both(pairs, first):
    for t in range(first, first + 3):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=torch.Generator().manual_seed(t))).square().mean().backward()
            optimizer.step()

whole, shared = make(), make()
apart = ZeroRedundancyOptimizer(shared.parameters(), l2l.LSTMOptimizer, network=network)
plain = l2l.LSTMOptimizer(whole.parameters(), network)
train_both([(whole, plain), (shared, apart)], 0)
for to in (0, 1):
    apart.consolidate_state_dict(to)
saved = [apart.state_dict()] if rank == 1 else [None]
dist.broadcast_object_list(saved, 1)
apart = ZeroRedundancyOptimizer(shared.parameters(), l2l.LSTMOptimizer, network=network)
apart.load_state_dict(saved[0])
train_both([(whole, plain), (shared, apart)], 3)
for ours, theirs in zip(whole.parameters(), shared.parameters(), strict=True):
    torch.testing.assert_close(theirs, ours)
"""

_FSDP1_IS_REFUSED = """
import warnings
from torch.distributed.fsdp import FullyShardedDataParallel

warnings.simplefilter("ignore")
for use_orig_params in (False, True):
    old = FullyShardedDataParallel(make(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    for params in (old.parameters(), [{"params": old.parameters()}], old.named_parameters()):
        try:
            l2l.LSTMOptimizer(params, network)
            raise AssertionError("no error")
        except TypeError as error:
            assert "is sharded by FSDP1" in str(error) and "fully_shard" in str(error)
"""

_END = """
dist.barrier()
os._exit(0)  # all is checked; gloo's threads sometimes abort an interpreter that ends by itself
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks_make_the_steps_of_the_whole(tmp_path):
    cases = [_FULLY_SHARDED, _SCALED, _SUMMANDS, _OTHERWISE_SHARDED, _NOT_FINITE_ON_ONE_RANK]
    cases += [_COMPILED, _ZERO_REDUNDANCY, _FSDP1_IS_REFUSED]
    command = [sys.executable, "-c", "".join([_BEGIN, *cases, _END])]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in (0, 1)]
    try:
        errors = [rank.communicate(timeout=600)[1].decode() for rank in ranks]
    finally:  # one that failed leaves the other waiting for it
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
