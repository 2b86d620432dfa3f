"""Tries forms of a matrix's direction: what the default network's part and Muon's could be joined to.

    python bench/directions.py                         # as shipped: half the network's, and Muon's
    python bench/directions.py --form rows             # each row of Muon's part at one root mean square
    python bench/directions.py --form normuon --form learned-rows
    python bench/directions.py --share 0               # nothing learned: Muon with these sizes
    python bench/directions.py --share-by-size 1       # the learned share is r, the size of the step, at most 1
    python bench/directions.py --workload autoencoder --rates 0.01 0.03 --seeds 77

Judged on the four tasks of bench/general.py, or on workloads, with seeds that no report has. Prints the logarithms (of
workloads, the values) of mean, last and validation loss. Needs MNIST; two minutes for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import l2l_fast as l2l
from general import add_options, judge
from l2l_fast import normalize
from l2l_fast.reproduce import workloads

FORMS = {
    "normuon": "rows of Muon's part in their own running root mean square",
    "rows": "the same without memory",
    "columns": "columns at one root mean square",
    "adamuon": "coordinates of Muon's part in their own running root mean square",
    "learned-rows": "rows of the learned part in their own running root mean square",
    "clipped": "the learned part's coordinates at most three times their root mean square",
    "signs": "the learned part's signs alone",
    "agreeing": "the learned part only where Muon's has its sign",
    "descending": "the learned part only where it goes against the gradient",
    "cautious": "no coordinate against its gradient, the others the longer",
    "cautious-decay": "weight decay only where the step goes the same way",
}
BETA = 0.95  # of what runs


class Joined:
    """In place of the library's own sum, over stacks of matrices [K, out, in]; holds what forms remember."""

    def __init__(self, forms: set[str], share_by_size: float | None) -> None:
        self.forms, self.share_by_size = forms, share_by_size
        self.sizes: Tensor | None = None
        self.grads: list[Tensor] = []
        self.running: dict[tuple, tuple[Tensor, int]] = {}

    def __call__(self, updates: normalize.Updates, momenta: Tensor, wholes) -> None:
        for (places, found), (_, given) in zip(updates.stacks(updates.flat), updates.stacks(momenta), strict=True):
            if found.numel():
                muon = self._muons_part(normalize.orthogonalize_each(given.flatten(2)), tuple(places))
                found.copy_((self._learned_part(found.flatten(2), muon, places) - muon).view(found.shape))

    def _muons_part(self, o: Tensor, key: tuple) -> Tensor:
        if "normuon" in self.forms:
            o = o / self._root(o.square().mean(2, keepdim=True), (*key, "row"))
        if "adamuon" in self.forms:
            o = o / self._root(o.square(), (*key, "coordinate"))
        if "rows" in self.forms:
            o = normalize.unit(o, (2,))
        if "columns" in self.forms:
            o = normalize.unit(o, (1,))
        return normalize.unit(o, (1, 2))

    def _learned_part(self, d: Tensor, muon: Tensor, places: list[int]) -> Tensor:
        share = torch.full((len(d), 1, 1), normalize.LEARNED_SHARE)
        if self.share_by_size is not None:
            share = (self.share_by_size * self.sizes[torch.tensor(places)]).clamp_max(1.0).view(-1, 1, 1)
        d = normalize.unit(d, (1, 2))
        if "learned-rows" in self.forms:
            d = normalize.unit(d / self._root(d.square().mean(2, keepdim=True), (*places, "learned")), (1, 2))
        if "clipped" in self.forms:
            d = d.clamp(-3.0, 3.0)
        if "signs" in self.forms:
            d = d.sign()
        if "agreeing" in self.forms:
            d = normalize.unit(d * (d * muon < 0), (1, 2))
        if "descending" in self.forms:
            grads = torch.stack([self.grads[place] for place in places]).view(d.shape)
            d = normalize.unit(d * (d * grads < 0), (1, 2))
        return share * d

    def _root(self, squares: Tensor, key: tuple) -> Tensor:
        mean, steps = self.running.get(key, (torch.zeros_like(squares), 0))
        self.running[key] = mean.lerp(squares, 1 - BETA), steps + 1
        return (self.running[key][0] / (1 - BETA ** (steps + 1))).clamp_min(1e-30).sqrt()


class Cautious:
    """An optimizer whose steps are changed from outside, coordinate by coordinate."""

    def __init__(self, params, lr: float, network: l2l.CoordinatewiseLSTM, forms: set[str]) -> None:
        self.params, self.forms = list(params), forms
        self.inner = l2l.LSTMOptimizer(self.params, network, lr)
        self.param_groups = self.inner.param_groups

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        before = [param.clone() for param in self.params]
        self.inner.step()
        for param, old in zip(self.params, before, strict=True):
            moved, decay = param - old, self.param_groups[0]["lr"] * workloads.WEIGHT_DECAY * old
            if "cautious" in self.forms:
                moves = (moved * param.grad < 0).to(moved.dtype)
                moved = moved * moves / moves.mean().clamp_min(0.01)
            if "cautious-decay" in self.forms:
                decay = decay * (moved * old < 0)
            param.copy_(old + moved - decay)


def maker(arguments: argparse.Namespace) -> Callable:
    """Parameters and a rate -> optimizer."""
    network, forms = l2l.CoordinatewiseLSTM.from_pretrained("l2l-base"), set(arguments.form)
    move, flat_momenta = normalize.move_, normalize.flat_momenta

    def make(params, lr):
        joined = Joined(forms, arguments.share_by_size)

        def move_(params, updates, lr, rms, *rest):
            joined.sizes = rms
            move(params, updates, lr, rms, *rest)

        def flat_momenta_(updates, grads, *rest):
            joined.grads = grads
            return flat_momenta(updates, grads, *rest)

        normalize.flat_momenta = flat_momenta_
        normalize.LEARNED_SHARE = arguments.share
        normalize._subtract_orthogonal_units_, normalize.move_ = joined, move_
        if forms & {"cautious", "cautious-decay"}:
            return Cautious(params, lr, network, forms)
        return l2l.LSTMOptimizer(params, network, lr, weight_decay=workloads.WEIGHT_DECAY)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:16}{what}" for name, what in FORMS.items()),
    )  # fmt: skip
    parser.add_argument("--form", action="append", default=[], choices=FORMS, help="may be given several times")
    parser.add_argument("--share", type=float, default=normalize.LEARNED_SHARE, help="learned part beside Muon's")
    parser.add_argument("--share-by-size", type=float, help="the learned share is this times r, at most 1")
    add_options(parser)
    arguments = parser.parse_args()
    judge(maker(arguments), arguments)


if __name__ == "__main__":
    main()
