"""A few coordinates that stand for all of them in a meta-gradient.

The meta-gradient is a sum over coordinates, and most of what the optimizee of one window adds to it comes from few of
them. So backpropagation through time need not run for all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_coordinates(d_updates: Tensor, number: int, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates for an unbiased estimate of the meta-gradient, and by how much each of them counts.

    sum_i g_i = E[ sum_k g_i(k) / (n p_i(k)) ],   p_i = ||dL/du[:, i]|| / sum_j ||dL/du[:, j]||

    Systematic sampling: n points on the cumulated p, one n-th apart, moved on together by ``shift``. Coordinates with a
    p above 1/n are always among them, some more than once; those with p = 0 never.

    Args:
        d_updates: dL/du, [T, N].
        number: n.
        shift: 0-dim, uniform in [0, 1); float64.

    Returns:
        indices [n] and factors [n] of the dtype of ``d_updates``.

    Example:
        >>> import torch
        >>> from l2l_fast.meta.sampling import sample_coordinates
        >>> sample_coordinates(torch.tensor([[1.0, 0.0, 3.0]]), 4, torch.tensor(0.5, dtype=torch.float64))
        (tensor([0, 2, 2, 2]), tensor([1.0000, 0.3333, 0.3333, 0.3333]))
    """
    norms = torch.linalg.vector_norm(d_updates, dim=0).double()
    ends = norms.cumsum(0)
    spacing = ends[-1] / number
    points = (torch.arange(number, dtype=torch.float64, device=ends.device) + shift) * spacing
    chosen = torch.searchsorted(ends, points, right=True).clamp_(max=len(ends) - 1)
    # Where nothing has a gradient, anything is chosen, and counts nothing.
    factors = spacing / norms[chosen].clamp_min(torch.finfo(torch.float64).tiny)
    return chosen, factors.to(d_updates.dtype)
