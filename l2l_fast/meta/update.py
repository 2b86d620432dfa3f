"""The end of a meta-step: from the meta-gradient of its windows to new weights, without a wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from l2l_fast.checks import require
from l2l_fast.config import split_weights, weight_shapes
from l2l_fast.meta.mixtures import Mixture
from l2l_fast.networks import CoordinatewiseLSTM

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class MetaUpdate:
    """What a meta-step gathers, and the meta-optimizer that turns it into an update. All tensors keep their places.

    The gradient is not autograd's, so what autograd would mind is minded here: frozen parameters have a gradient of 0,
    are no part of the norm, and are not given to the meta-optimizer.

    Args:
        network: what is trained.
        make_optimizer: makes the meta-optimizer from the network's parameters, those that are not frozen.
        clip: largest norm of the gradient, or None.
        windows: how many a meta-step averages over.
        clip_windows: largest norm of one window's gradient, or None.
        make_mixture: of an estimator that gives two gradients, [2, W]: what makes one of them, from the weights; it may
            give None, for one gradient alone.

    Attributes:
        weights: the network's, flat, as of the last :meth:`begin`, [W].
        gathered: the mean over the windows, [W], or [2, W] with a mixture.
        gradient: the one that the meta-optimizer has, [W].
        mixture: what was made, or None.
        trains: [W], which weights are not frozen; None if none is.
        results: the windows' meta-losses and the norm of the gradient before clipping, [windows + 1].
        skips: whether the meta-optimizer itself, told by ``found_inf``, leaves the weights alone where a result is
            not finite, as torch's fused ones do. Otherwise the caller has to look before :meth:`step`.
        capturable: whether the update can be captured in a CUDA graph.
        frozen: names of the parameters that do not require a gradient.

    Raises:
        ValueError: a weight of the network cannot be trained here, or none is to be; the message names it.
    """

    def __init__(
        self,
        network: CoordinatewiseLSTM,
        make_optimizer: Callable[[list], torch.optim.Optimizer],
        clip: float | None,
        windows: int,
        clip_windows: float | None = None,
        make_mixture: Callable[[Tensor], Mixture | None] = lambda weights: None,
    ) -> None:
        self.network, self.clip, self.windows, self.clip_windows = network, clip, windows, clip_windows
        self._all = _parameters(network)
        self.frozen = [name for name, parameter in self._all.items() if not parameter.requires_grad]
        self.parameters = [parameter for name, parameter in self._all.items() if name not in self.frozen]
        require(bool(self.parameters), "network", "one whose parameters all are frozen", "one with something to train")
        self.weights = network.flat_weights().detach()
        self.trains = None
        if self.frozen:
            flags = [torch.full_like(one.detach(), one.requires_grad, dtype=torch.bool) for one in self._all.values()]
            self.trains = torch.cat([flag.view(-1) for flag in flags])
        self.gathered = self.gradient = torch.zeros_like(self.weights)
        self.mixture = make_mixture(self.weights)
        if self.mixture is not None:
            self.gathered = self.weights.new_zeros(2, len(self.weights))
        self.results = self.weights.new_zeros(windows + 1)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=self.weights.device)
        self.optimizer = optimizer = make_optimizer(self.parameters)
        made = hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")
        require(made, "meta_optimizer", optimizer, "a function that makes a torch.optim.Optimizer")
        self.skips = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.capturable = self.skips and all(group.get("capturable", False) for group in optimizer.param_groups)
        if self.skips:
            optimizer.found_inf = self.found_inf
        if self.capturable:
            for group in optimizer.param_groups:  # a number would be captured as it is today
                group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=self.weights.device)

    def check(self) -> None:
        """Refuse a network that is not any more what it was when this was made.

        Raises:
            ValueError: the message names the parameter.
        """
        for name, parameter in _parameters(self.network).items():
            was = self._all[name]
            changed = (
                "was replaced" if parameter is not was
                else "was frozen or thawed" if parameter.requires_grad == (name in self.frozen)
                else f"is {parameter.dtype} on {parameter.device} by now"
                if (parameter.dtype, parameter.device) != (self.weights.dtype, self.weights.device)
                else None
            )  # fmt: skip
            if changed:
                raise ValueError(
                    f"the network's {name} {changed} after its MetaTrainer was made: make a new MetaTrainer of it"
                )

    @torch.no_grad()
    def begin(self) -> None:
        """Of a meta-step: the weights as the network has them by now, and no gradient yet."""
        self.weights.copy_(self.network.flat_weights())
        self.gathered.zero_()

    @torch.no_grad()
    def add(self, d_weights: Tensor) -> None:
        """One window's gradient, or two of it, to the mean over them. For a mixture, one counts as both."""
        if self.trains is not None:
            d_weights = torch.where(self.trains, d_weights, 0.0)
        if self.clip_windows is not None:
            norms = torch.linalg.vector_norm(d_weights, dim=-1, keepdim=True)
            d_weights = d_weights * _share(norms, self.clip_windows)
        self.gathered += d_weights / self.windows

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    @torch.no_grad()
    def measure(self) -> None:
        """The gradient, its norm, and the gradient clipped by it."""
        if self.mixture is not None:
            self.gradient.copy_(self.mixture(self.gathered))
        norm = self.gradient.norm()
        self.results[-1].copy_(norm)
        if self.clip is not None:
            self.gradient.mul_(_share(norm, self.clip))
        self.found_inf.copy_(self.results.isfinite().all().logical_not())

    def step(self) -> None:
        """Of the meta-optimizer, along the gradient measured."""
        for name, piece in split_weights(self.gradient, self.network.config).items():
            if name not in self.frozen:
                self._all[name].grad = piece
        self.optimizer.step()

    def measure_and_step(self) -> None:
        """Both, for a meta-optimizer that ``skips``."""
        self.measure()
        self.step()

    def load_state_dict(self, state: dict) -> None:
        """The meta-optimizer's, from any device; what says how it runs here stays as it is."""
        before = [(group.get("lr"), group.get("capturable")) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, (lr, capturable) in zip(self.optimizer.param_groups, before, strict=True):
            if lr is not None:
                saved = float(group["lr"])
                group["lr"] = lr.fill_(saved) if isinstance(lr, Tensor) else saved
            if capturable is not None:
                group["capturable"] = capturable


def _parameters(network: CoordinatewiseLSTM) -> dict[str, torch.nn.Parameter]:
    """By name, in the order of the flat weights."""
    found = {}
    for name in weight_shapes(network.config):
        try:
            found[name] = network.get_parameter(name)
        except AttributeError:
            raise ValueError(
                f"the network's {name} is computed, not a parameter: remove its parametrization before MetaTrainer"
            ) from None
        if found[name].is_inference():
            raise ValueError(f"the network's {name} cannot be trained: make the network outside torch.inference_mode()")
        if any(getattr(found[name], hooks, None) for hooks in _HOOKS):
            raise ValueError(
                f"the network's {name} has a gradient hook, which a meta-gradient does not pass, as it is not "
                "autograd's: remove the hook; requires_grad_(False) freezes a parameter"
            )
    return found


def _share(norm: Tensor, largest: float) -> Tensor:
    """What clipping to the ``largest`` norm leaves of a gradient of this norm; at most 1."""
    return (largest / norm).clamp(max=1.0)
