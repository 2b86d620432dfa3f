"""The 8x8 handwritten digits that scikit-learn carries inside itself: real data without a download."""

from __future__ import annotations

import functools

import torch

from l2l_fast.data.dataset import Dataset, fixed_order
from l2l_fast.modes import plain


@functools.cache
@plain()
def digits() -> Dataset:
    """1,797 images of 8x8 pixels in ten classes, in a fixed shuffled order; every call returns the same tensors.

    Raises:
        ImportError: if scikit-learn, which has the data, is not installed.

    Example:
        >>> from l2l_fast.data import digits
        >>> digits().inputs.shape
        torch.Size([1797, 8, 8])

    References:
        Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits data set is part of scikit-learn: pip install l2l_fast[data]") from error
    loaded = load_digits()
    order = fixed_order(len(loaded.target))
    inputs = torch.from_numpy(loaded.images).float().div_(16)[order]  # pixels are 0 ... 16
    return Dataset("digits", inputs, torch.from_numpy(loaded.target).long()[order], classes=10)
