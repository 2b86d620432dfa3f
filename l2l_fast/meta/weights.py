"""The weights that a run of meta-training knows: under training, averaged, and best."""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_fast.networks import CoordinatewiseLSTM


class RunWeights:
    """Three vectors of a network's flat weights, [W] each. Within ``fit`` the network holds those under training,
    between two calls the best.

    Attributes:
        current: under training, as the last ``fit`` left them; within one they are the network's own.
        averaged: their running average, which is what validation sees.
        best: the average of the lowest score.
    """

    def __init__(self, network: CoordinatewiseLSTM) -> None:
        self.network = network
        self.current, self.averaged, self.best = self.read(), self.read(), self.read()

    def read(self) -> Tensor:
        """A copy of what the network holds."""
        return self.network.flat_weights().detach()

    def take_up(self) -> Tensor | None:
        """Put those under training into the network, unless it holds others than the best by now: those are given."""
        found = self.read()
        if not torch.equal(found, self.best):
            return found
        self.network.load_flat_weights_(self.current)
        return None

    def lay_down(self) -> None:
        """The opposite: keep those under training, and leave the best in the network."""
        self.current = self.read()
        self.network.load_flat_weights_(self.best)

    def begin_from(self, weights: Tensor) -> None:
        """Train these from now on: the average starts from them, and they are the best so far."""
        self.network.load_flat_weights_(weights)
        self.averaged.copy_(weights)
        self.best = weights

    def average(self, rate: float, step: int) -> None:
        """Let the network's enter the average, of the decay ``rate``, after ``step`` steps in all."""
        decay = min(rate, step / (step + 9))  # at first over few weights, so that it forgets where the network started
        self.averaged.lerp_(self.read(), 1 - decay)

    def keep_best(self) -> None:
        """The average has the lowest score so far."""
        self.best = self.averaged.clone()

    def restore(self, current: Tensor, averaged: Tensor, best: Tensor) -> None:
        """Go on with saved ones."""
        self.network.load_flat_weights_(current)
        self.averaged, self.best = averaged, best
