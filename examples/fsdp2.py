"""FSDP2 under torchrun: parameters and the optimizer's state sharded, saved and resumed on any number of ranks.

    torchrun --nproc-per-node 2 examples/fsdp2.py --folder runs/fsdp2 --steps 20
    torchrun --nproc-per-node 4 examples/fsdp2.py --folder runs/fsdp2 --steps 40    # goes on from step 20

On GPUs with nccl where there are any, otherwise on CPUs with gloo.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR

import l2l_fast as l2l


def batch(step, device):
    """This rank's rows of 48, a function of the step: a run that is resumed goes on with the rows it would have had."""
    x = torch.randn(48, 32, generator=torch.Generator().manual_seed(step))
    x = x.tensor_split(dist.get_world_size())[dist.get_rank()].to(device)
    return x, x.sum(1, keepdim=True).sin()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/fsdp2"))
    parser.add_argument("--steps", type=int, default=20, help="from the very beginning")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)).to(device)
    for layer in [*model[::2], model]:
        fully_shard(layer)
    optimizer = l2l.LSTMOptimizer(model.parameters(), lr=0.003, weight_decay=0.01)
    schedule = CosineAnnealingLR(optimizer, 1000)

    found = sorted(arguments.folder.glob("step-*/.metadata"))  # written last: all of such a checkpoint is there
    if found:
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load({**parts, "schedule": schedule}, checkpoint_id=found[-1].parent)
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    for step in range(schedule.last_epoch, arguments.steps):
        x, y = batch(step, device)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {step + 1} loss {mean.item():.9g}", flush=True)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save({**parts, "schedule": schedule}, checkpoint_id=arguments.folder / f"step-{schedule.last_epoch:06}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
