"""One gradient of two estimates, [2, W] to [W]: after the mean over windows and ranks, so that all ranks agree."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from l2l_fast.meta.options import TrainerOptions

DECAY = 0.98  # of the moments, over some 50 meta-steps


class Mixture(Protocol):
    """Makes one gradient of two, on tensors that keep their places, without a wait for the device."""

    def __call__(self, gradients: Tensor) -> Tensor:
        """[2, W] to [W]."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Share:
    """g = share * g_0 + (1 - share) * g_1

    Args:
        share: of the first, in [0, 1].

    Example:
        >>> import torch
        >>> from l2l_fast.meta.mixtures import Share
        >>> Share(0.25)(torch.tensor([[4.0], [0.0]]))
        tensor([1.])
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, gradients: Tensor) -> Tensor:
        return self.share * gradients[0] + (1 - self.share) * gradients[1]

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class InverseVariance:
    """g = (v_1 g_0 + v_0 g_1) / (v_0 + v_1), each weight of the network by itself

    v are variances over the meta-steps before this one, by running moments. They are independent of the gradients that
    they weigh, so two estimates without bias give one without bias. Both count the same while no variance is known.

    Args:
        like: gradients [2, W], for their shape, dtype and device.

    References:
        Metz et al. 2019, https://arxiv.org/abs/1810.10180
    """

    def __init__(self, like: Tensor) -> None:
        self.mean, self.variance = torch.zeros_like(like), torch.zeros_like(like)
        self.rest = torch.ones((), dtype=like.dtype, device=like.device)  # DECAY ** number of meta-steps

    def __call__(self, gradients: Tensor) -> Tensor:
        total = self.variance.sum(0)
        share = torch.where(total > 0, self.variance[1] / torch.where(total > 0, total, 1.0), 0.5)
        mixed = share * gradients[0] + (1 - share) * gradients[1]
        finite = gradients.isfinite().all()  # such a meta-step is skipped
        self.rest.mul_(torch.where(finite, DECAY, 1.0))
        # By differences from the mean, since those of squares would be rounding errors at first.
        part, moved = (1 - DECAY) / (1 - self.rest), gradients - self.mean
        variance = (1 - part) * (self.variance + part * moved.square())
        self.mean.copy_(torch.where(finite, self.mean + part * moved, self.mean))
        self.variance.copy_(torch.where(finite, variance, self.variance))
        return mixed

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "variance": self.variance, "rest": self.rest}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def mixture(options: TrainerOptions, weights: Tensor) -> Mixture | None:
    """The one that options ask for, of a network's flat weights [W]; None where there is one gradient alone."""
    if not options.mixes:
        return None
    if options.perturbed_share == "variance":
        return InverseVariance(torch.stack([weights, weights]))
    return Share(options.perturbed_share)
