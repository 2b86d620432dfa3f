"""``l2l-fast demo``: the whole story in a few minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from l2l_fast import evaluate
from l2l_fast.cli.options import Device, Json, Out, Seed, note, out_folder, progress_bars, report
from l2l_fast.data import Dataset, digits, halves
from l2l_fast.meta import recipes, train
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.optim import LSTMOptimizer

DIGITS_STEPS, DIGITS_SEEDS = 200, 5


def demo(
    meta_steps: Annotated[int, typer.Option(help="Meta-updates.", min=1)] = recipes.DEMO["meta_steps"],
    max_seconds: Annotated[float, typer.Option(help="Longest meta-training.", min=0)] = 120.0,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Meta-train an optimizer on random quadratics, beat tuned Adam with it, then train a network with it.

    Takes a few minutes on two cores. Writes the network, comparison.json, comparison.png and digits.png into --out.

    \b
    Examples:
        l2l-fast demo
        l2l-fast demo --meta-steps 200 --out runs/short-demo
    """
    out = out_folder(out, "demo")
    note("1 of 3: an LSTM learns to minimise random quadratics")
    trained = train(recipes.DEMO, meta_steps=meta_steps, max_seconds=max_seconds, seed=seed, device=device)
    if not trained.finished:
        made = trained.trainer.meta_step
        note(f"stopped after {max_seconds:.0f} s and {made} of {meta_steps} meta-updates: --max-seconds for more")
    network = trained.network
    network.save_pretrained(out / "network")

    note("2 of 3: on quadratics it has never seen, beside baselines tuned for the same 100 steps")
    with progress_bars() as progress:
        comparison = evaluate.compare("quadratic", network, seeds=100, seed=seed, device=device, progress=progress)
    comparison.to_json(out / "comparison.json")
    comparison.plot(out / "comparison.png")

    note("3 of 3: the same optimizer trains a network on handwritten digits")
    digits_result = _train_digits(network, seed, device, out)
    note(f"network, comparison.json, comparison.png and digits.png are in {out}")
    result = json.loads((out / "comparison.json").read_text(encoding="utf-8")) | {"digits": digits_result}
    lines = [
        comparison.table(),
        "",
        f"digits network after {DIGITS_STEPS} steps, {DIGITS_SEEDS} seeds; accuracy on images not trained on:",
    ]
    lines += [
        f"  {name:<24} loss {entry['loss']:.3f} (last 10 steps), accuracy {entry['accuracy']:.1%}"
        for name, entry in digits_result.items()
    ]
    report(result, "\n".join(lines), as_json)


def _train_digits(network: CoordinatewiseLSTM, seed: int, device: str, out: Path) -> dict:
    """The deck's network on 8x8 digits, in the loop that a user would write."""
    parts = halves(digits())
    train, test = parts["meta-train"], parts["meta-test"]
    rules = {
        "learned LSTM": lambda params: LSTMOptimizer(params, network),
        "Adam (lr 0.001, default)": lambda params: torch.optim.Adam(params),
        "Adam (lr 0.03)": lambda params: torch.optim.Adam(params, lr=0.03),
    }
    curves, results = {}, {}
    for name, make in rules.items():
        runs = [_train_once(make, train, test, seed + run, device) for run in range(DIGITS_SEEDS)]
        losses, accuracies = (torch.stack(found) for found in zip(*runs, strict=True))
        curves[name] = losses
        results[name] = {"loss": losses[:, -10:].mean().item(), "accuracy": accuracies.mean().item()}
    evaluate.plot_curves(
        curves, out / "digits.png", "digits, 20 sigmoid units: trained on quadratics, never on networks",
        emphasised=["learned LSTM"],
    )  # fmt: skip
    return results


def _train_once(make, train: Dataset, test: Dataset, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [steps] and the accuracy on images not trained on; every rule sees the same start and minibatches."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10)).to(device)
    optimizer, losses = make(model.parameters()), []
    for _ in range(DIGITS_STEPS):
        rows = torch.randint(len(train), (128,), dtype=torch.int64, device="cpu")
        loss = nn.functional.cross_entropy(model(train.inputs[rows].to(device)), train.targets[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    with torch.no_grad():
        right = model(test.inputs.to(device)).argmax(1).cpu() == test.targets
    return torch.stack(losses), right.float().mean()
