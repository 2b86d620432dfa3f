"""Meta-train an optimizer for your own nn.Module, and compare it with tuned baselines on rows it did not learn on.

Run it with python examples/meta_train_your_own.py; the constants say how long it takes.
"""

import torch
from torch import nn

import l2l_fast as l2l

META_STEPS = 500  # half a minute of one core: the mean loss is level with tuned AdamW's then, the last loss is not
HORIZON = 100  # steps of a training, in meta-training and in the comparison
SEEDS = 10
OUT = "runs/own"


def make_module():
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def main():
    inputs = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    targets = inputs.sum(1, keepdim=True).sin()
    task = l2l.tasks.ModuleTask(
        make_module, (inputs[:1600], targets[:1600]), nn.functional.mse_loss, test_data=(inputs[1600:], targets[1600:])
    )
    network = l2l.CoordinatewiseLSTM.from_pretrained("l2l-base-v1")  # or a new one: l2l.CoordinatewiseLSTM("moments")
    options = {"unroll": 50, "meta_lr": 0.003, "schedule": "cosine", "warmup": 20}
    l2l.MetaTrainer(network, task, horizon=HORIZON, checkpoint=f"{OUT}/checkpoint", **options).fit(META_STEPS)
    network.save_pretrained(f"{OUT}/network")
    print(l2l.compare(task, network, horizon=HORIZON, seeds=SEEDS).table())
    print(f'use it: l2l.LSTMOptimizer(model.parameters(), "./{OUT}/network")')


if __name__ == "__main__":
    main()
