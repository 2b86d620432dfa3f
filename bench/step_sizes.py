"""Tries forms of the size of a step: how far a tensor moves along the direction that the default network gives it.

    python bench/step_sizes.py                                  # as shipped: the momentum in its tensor's mean square
    python bench/step_sizes.py --form constant                  # 0.2
    python bench/step_sizes.py --form adam                      # RMS of Adam's own update, coordinate by coordinate
    python bench/step_sizes.py --beta1 0.98 --most 3 --power 0.7
    python bench/step_sizes.py --workload deep-mlp --rates 0.01 --steps 10000 --seeds 55

Judged on the four tasks of bench/general.py, or on workloads, with seeds that no report has. Prints
the logarithms (of workloads, the values) of mean, last and validation loss. Needs MNIST; a minute or two for each.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import l2l_fast as l2l
from cases import of_one_size
from general import add_options, judge
from l2l_fast import normalize
from l2l_fast.reproduce import workloads

FORMS = ("constant", "tensor", "network", "adam", "damped")


class Sized:
    """The default network's directions, a tensor's step being as long as a form says.

    All is done from outside, by scaling what an optimizer of constant size has moved, so a form is a few lines of
    plain PyTorch; that which is shipped is held to its reference by the tests.
    """

    def __init__(self, params, lr: float, network: l2l.CoordinatewiseLSTM, form: argparse.Namespace) -> None:
        self.params, self.form, self.step_number = list(params), form, 0
        self.unit = network.update_rms  # what a factor of 1 is
        self.inner = l2l.LSTMOptimizer(self.params, network, lr)
        self.param_groups = self.inner.param_groups
        self.momenta = [torch.zeros_like(param) for param in self.params]
        self.squares = [torch.zeros_like(param if form.form == "adam" else torch.zeros(())) for param in self.params]
        self.recent = [torch.zeros(()) for _ in self.params]

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.step_number += 1
        lr = self.param_groups[0]["lr"]
        factors = self._factors()
        before = [param.clone() for param in self.params]
        self.inner.step()
        for param, old, factor in zip(self.params, before, factors, strict=True):
            param.copy_(old + factor * (param - old) - lr * workloads.WEIGHT_DECAY * old)

    def _factors(self) -> list[Tensor]:
        form, t, unit = self.form, self.step_number, self.unit
        noise = math.sqrt((1 - form.beta1) / (1 + form.beta1))  # RMS of a momentum of noise, in the noise's
        means, squares, recents = [], [], []
        for param, m, v, recent in zip(self.params, self.momenta, self.squares, self.recent, strict=True):
            mean_square = param.grad.square() if form.form == "adam" else param.grad.square().mean()
            m.lerp_(param.grad, 1 - form.beta1)
            v.lerp_(mean_square, 1 - form.beta2)
            recent.lerp_(param.grad.square().mean(), 0.05)
            means.append(m / (1 - form.beta1**t))
            squares.append(v / (1 - form.beta2**t))
            recents.append(recent / (1 - 0.95**t))
        if form.form == "constant":
            return [torch.ones(())] * len(means)
        if form.form == "adam":
            pairs = zip(means, squares, strict=True)
            found = [(m / (v.sqrt() + 1e-8)).square().mean().sqrt() / unit for m, v in pairs]
        elif form.form == "damped":
            pairs = zip(recents, squares, strict=True)
            found = [(recent / v.clamp_min(1e-37)).sqrt().clamp_max(1.0) for recent, v in pairs]
        elif form.form == "network":
            power = sum(m.square().sum() for m in means)
            whole = sum(v * m.numel() for m, v in zip(means, squares, strict=True))
            found = [(power / whole.clamp_min(1e-37)).sqrt() / noise] * len(means)
        else:
            pairs = zip(means, squares, strict=True)
            found = [m.square().mean().sqrt() / v.sqrt().clamp_min(1e-30) / noise for m, v in pairs]
        return [form.factor * (one**form.power).clamp_max(form.most / unit) for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=FORMS, default="tensor")
    parser.add_argument("--beta1", type=float, default=0.95, help="of the momentum; 0.95 is the network's own")
    parser.add_argument("--beta2", type=float, default=normalize.SLOW_BETA, help="of the mean square")
    parser.add_argument("--most", type=float, default=1.0, help="largest RMS of a step, in lr")
    parser.add_argument("--power", type=float, default=1.0, help="of the ratio")
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=normalize.LEARNED_SHARE, help="learned part beside Muon's")
    add_options(parser)
    form = parser.parse_args()
    normalize.LEARNED_SHARE = form.share
    network = of_one_size()
    judge(lambda params, lr: Sized(params, lr, network, form), form)


if __name__ == "__main__":
    main()
