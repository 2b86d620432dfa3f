"""The end of a meta-step: from the meta-gradient of its windows to new weights, without a wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from l2l_fast import reference
from l2l_fast.networks import CoordinatewiseLSTM


class MetaUpdate:
    """What a meta-step gathers, and the meta-optimizer that turns it into an update. All tensors keep their places.

    Args:
        network: what is trained.
        make_optimizer: makes the meta-optimizer from the network's parameters.
        clip: largest norm of the gradient, or None.
        windows: how many a meta-step averages over.
        clip_windows: largest norm of one window's gradient, or None.

    Attributes:
        weights: the network's, flat, as of the last :meth:`begin`, [W].
        gradient: the mean over the windows, [W].
        results: the windows' meta-losses and the norm of the gradient before clipping, [windows + 1].
        skips: whether the meta-optimizer itself, told by ``found_inf``, leaves the weights alone where a result is
            not finite, as torch's fused ones do. Otherwise the caller has to look before :meth:`step`.
        capturable: whether the update can be captured in a CUDA graph.
    """

    def __init__(
        self,
        network: CoordinatewiseLSTM,
        make_optimizer: Callable[[list], torch.optim.Optimizer],
        clip: float | None,
        windows: int,
        clip_windows: float | None = None,
    ) -> None:
        self.network, self.clip, self.windows, self.clip_windows = network, clip, windows, clip_windows
        self.parameters = [network.get_parameter(name) for name in reference.weight_shapes(network.config)]
        self.weights = network.flat_weights().detach()
        self.gradient = torch.zeros_like(self.weights)
        self.results = self.weights.new_zeros(windows + 1)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=self.weights.device)
        self.optimizer = optimizer = make_optimizer(self.parameters)
        self.skips = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.capturable = self.skips and all(group.get("capturable", False) for group in optimizer.param_groups)
        if self.skips:
            optimizer.found_inf = self.found_inf
        if self.capturable:
            for group in optimizer.param_groups:  # a number would be captured as it is today
                group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=self.weights.device)

    @torch.no_grad()
    def begin(self) -> None:
        """Of a meta-step: the weights as the network has them by now, and no gradient yet."""
        self.weights.copy_(self.network.flat_weights())
        self.gradient.zero_()

    @torch.no_grad()
    def add(self, d_weights: Tensor) -> None:
        """One window's gradient to the mean over them."""
        if self.clip_windows is not None:
            d_weights = d_weights * _share(d_weights.norm(), self.clip_windows)
        self.gradient += d_weights / self.windows

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    @torch.no_grad()
    def measure(self) -> None:
        """The gradient's norm, and the gradient clipped by it."""
        norm = self.gradient.norm()
        self.results[-1].copy_(norm)
        if self.clip is not None:
            self.gradient.mul_(_share(norm, self.clip))
        self.found_inf.copy_(self.results.isfinite().all().logical_not())

    def step(self) -> None:
        """Of the meta-optimizer, along the gradient measured."""
        pieces = reference.split_weights(self.gradient, self.network.config).values()
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece
        self.optimizer.step()

    def measure_and_step(self) -> None:
        """Both, for a meta-optimizer that ``skips``."""
        self.measure()
        self.step()

    def load_state_dict(self, state: dict) -> None:
        """The meta-optimizer's, from any device; what says how it runs here stays as it is."""
        before = [(group["lr"], group.get("capturable")) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, (lr, capturable) in zip(self.optimizer.param_groups, before, strict=True):
            saved = float(group["lr"])
            group["lr"] = lr.fill_(saved) if isinstance(lr, Tensor) else saved
            if capturable is not None:
                group["capturable"] = capturable


def _share(norm: Tensor, largest: float) -> Tensor:
    """What clipping to the ``largest`` norm leaves of a gradient of this norm; at most 1."""
    return (largest / norm).clamp(max=1.0)
