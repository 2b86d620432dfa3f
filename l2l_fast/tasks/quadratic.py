"""The paper's quadratics: f(x) = ||W x - y||^2 with random W and y."""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_fast.checks import is_number, require, whole


class Quadratic:
    r"""Random least-squares functions.

    f(x) = ||W x - y||_2^2,   W ~ N(0, 1)^{d x d},  y ~ N(0, 1)^d,  x_0 ~ N(0, start_scale^2)^d

    Args:
        dimension: d, 10 in the paper.
        start_scale: standard deviation of the start; 0 starts at the origin.
        name: what tables call it.

    Raises:
        ValueError: if ``dimension`` is no int of at least 1, or ``start_scale`` no number of at least 0.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> task, generator = l2l.tasks.Quadratic(dimension=4), torch.Generator().manual_seed(0)
        >>> task.loss(task.init(generator), task.sample(generator)).shape
        torch.Size([])

    References:
        Andrychowicz et al. 2016, section 3.1, https://arxiv.org/abs/1606.04474
    """

    resample = False  # W and y are the function, drawn once per trajectory

    def __init__(self, dimension: int = 10, *, start_scale: float = 1.0, name: str = "quadratic") -> None:
        good = is_number(start_scale) and start_scale >= 0
        require(good, "start_scale", start_scale, "a number of at least 0")
        self.dimension, self.start_scale, self.name = whole("dimension", dimension, 1), start_scale, name

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Start of one trajectory, x_0 ~ N(0, start_scale^2).

        Args:
            generator: of the CPU; all randomness comes from it.

        Returns:
            ``x`` [d], float32.
        """
        return {"x": self.start_scale * _normal(generator, self.dimension)}

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """W [d, d] and y [d], the function; float32, from a generator of the CPU."""
        matrix = _normal(generator, self.dimension, self.dimension)
        return matrix, _normal(generator, self.dimension)

    def loss(self, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """||W x - y||^2.

        Args:
            params: ``x`` [d].
            batch: W [d, d] and y [d], of the dtype and on the device of ``x``.

        Returns:
            0-dim, of that dtype.
        """
        matrix, target = batch
        return (matrix @ params["x"] - target).square().sum()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
