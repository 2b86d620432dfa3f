"""Your own training loop on MNIST, and what no loss on training batches shows: accuracy on images never seen.

    python examples/mnist_accuracy.py [--steps 1000] [--seeds 5] [--activation sigmoid|relu] [--data FOLDER]

One hidden layer of 20 units, minibatches of 128, every optimizer from the same starts and with the same minibatches.
l2l-base-v1 as it comes; Adam and Nesterov at several rates, the best of which has to be searched for.
"""

import argparse

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import l2l_fast as l2l

OPTIMIZERS = {"l2l-base-v1": lambda params: l2l.LSTMOptimizer(params, "l2l-base-v1")}
for lr in (0.003, 0.01, 0.03, 0.1):
    OPTIMIZERS[f"Adam, lr {lr:g}"] = lambda params, lr=lr: torch.optim.Adam(params, lr, fused=True)
for lr in (0.1, 0.3, 1.0):
    OPTIMIZERS[f"Nesterov, lr {lr:g}"] = lambda params, lr=lr: torch.optim.SGD(params, lr, momentum=0.9, nesterov=True)


def train(make, images, labels, activation, steps, seed):
    """The mean of the last 50 losses, and the model."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), activation(), nn.Linear(20, 10))
    optimizer, losses = make(model.parameters()), []
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-50:]).mean(), model


@torch.no_grad()
def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).float().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--activation", choices=["sigmoid", "relu"], default="sigmoid")
    parser.add_argument("--data", help="folder of MNIST's files; default: $L2L_FAST_DATA, the cache, a download")
    arguments = parser.parse_args()
    seen, unseen = (l2l.data.mnist(arguments.data, split=split) for split in ("train", "test"))
    activation = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}[arguments.activation]
    bars = Console(stderr=True)
    print(f"{arguments.activation}, {arguments.steps} steps, {arguments.seeds} seeds\n")
    print(f"{'optimizer':<18} {'last 50 losses':>14} {'accuracy on 10,000 unseen':>26} {'± std':>7}")
    for name, make in OPTIMIZERS.items():
        losses, right = [], []
        for seed in track(range(arguments.seeds), name, console=bars, transient=True):
            loss, model = train(make, seen.inputs, seen.targets, activation, arguments.steps, seed)
            losses.append(loss)
            right.append(accuracy(model, unseen.inputs, unseen.targets))
        right = 100 * torch.stack(right)
        print(f"{name:<18} {torch.stack(losses).mean():>14.4f} {right.mean():>25.2f}% {right.std():>7.2f}")


if __name__ == "__main__":
    main()
