"""Trains what the row ``proposal`` of ``l2l-fast reproduce`` judges online: an MLP, an LSTM that changes it, a control.

    python examples/proposal_online.py networks mlp  --out runs/proposal      # an MLP by itself: where the others start
    python examples/proposal_online.py networks pair --out runs/proposal      # that MLP and the LSTM, together
    python examples/proposal_online.py networks alone --out runs/proposal     # the control: that MLP alone, for as long
    python examples/proposal_online.py networks pair --gradient pes ...       # the pair by forward runs alone
    python examples/proposal_online.py quadratic mlp ...                      # the same for quadratics

A run that is stopped goes on with the same command. MNIST in place of the digits: ``--dataset mnist``.
"""

import argparse
from pathlib import Path

import torch

import l2l_fast as l2l
from l2l_fast.meta import LogUniform

FIRST, SECOND = 500, {"backpropagation": 1500, "pes": 300}  # meta-steps of the MLP alone, and of what follows


def tasks_of(kind: str, dataset: str) -> list:
    """Networks of several activations, widths, depths, batch and start scales; neither ReLU nor convolutions."""
    if kind == "quadratic":
        return [l2l.tasks.get("quadratic")]
    get, one, two = l2l.tasks.get, f"{dataset}-mlp", f"{dataset}-mlp-2layer"
    return [
        get(one), get(one, activation="gelu"), get(two), get(one, activation="tanh", init_scale=(0.01, 0.3)),
        get(one, hidden=(32,), init_scale=(0.003, 0.3)), get(one, hidden=(40,), activation="elu"),
        get(two, activation="silu"), get(one, hidden=(32, 16), activation="gelu"),
        get(one, batch_size=64, activation="elu"),
    ]  # fmt: skip


def train(kind: str, stage: str, dataset: str, gradient: str, seed: int, out: Path) -> None:
    torch.manual_seed(seed)
    network = l2l.AdaptiveMLP()
    if stage != "mlp":
        network.mlp.load_state_dict(l2l.CoordinatewiseMLP.from_pretrained(out / f"mlp-{kind}-start").state_dict())
    network.lstm.requires_grad_(stage == "pair")
    options = {"instances": 64, "parallel": 1} if kind == "quadratic" else {"instances": 2, "parallel": 2}
    name = kind if gradient == "backpropagation" else f"{kind}-{gradient}"
    trainer = l2l.AdaptiveTrainer(
        network, tasks_of(kind, dataset), horizon=LogUniform(50, 200), objective="relative", schedule="cosine",
        average=0.98, unroll=20 if stage == "mlp" else 50, meta_lr=0.01 if stage == "mlp" else 0.003, seed=seed,
        validate_every=100 if stage == "mlp" else 10**6, validation_instances=32 if kind == "quadratic" else 4,
        scaling=0.0 if kind == "quadratic" else 1.0,
        checkpoint=out / f"{name}-{stage}-checkpoint", checkpoint_every=50, gradient=gradient, **options,
    )  # fmt: skip
    # What follows the MLP alone is validated at its end and not before: what it ends with is taken, good or bad.
    history = trainer.fit(FIRST if stage == "mlp" else SECOND[gradient])
    print(f"{name} {stage}: validations (mean of f_t / f_0) {history.validations}")
    if stage == "pair":
        network.save_pretrained(out / f"online-{name}")
    else:
        network.mlp.save_pretrained(out / (f"mlp-{kind}-start" if stage == "mlp" else f"mlp-{kind}"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("networks", "quadratic"))
    parser.add_argument("stage", choices=("mlp", "pair", "alone"))
    parser.add_argument("--dataset", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--gradient", choices=tuple(SECOND), default="backpropagation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/proposal"))
    given = parser.parse_args()
    train(given.kind, given.stage, given.dataset, given.gradient, given.seed, given.out)
