"""What a data set is, and its split into the half that optimizers learn on and the half that they are judged on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HALVES = ("meta-train", "meta-test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples in memory.

    Args:
        name: what tables call it.
        inputs: [M, ...] float32 in [0, 1]; images are [M, height, width].
        targets: [M] int64, each in 0 ... classes - 1.
        classes: number of classes.

    Raises:
        ValueError: if the shapes or types are others than these.

    Example:
        >>> import torch
        >>> from l2l_fast.data import Dataset
        >>> len(Dataset("coins", torch.rand(6, 8, 8), torch.tensor([0, 1, 1, 0, 1, 0]), classes=2))
        6
    """

    name: str
    inputs: Tensor
    targets: Tensor
    classes: int

    def __post_init__(self) -> None:
        if self.inputs.dtype != torch.float32 or self.inputs.ndim < 2:
            raise ValueError(
                f"inputs of {self.name} must be float32 [M, ...], got {self.inputs.dtype} {list(self.inputs.shape)}"
            )
        if self.targets.dtype != torch.int64 or self.targets.shape != self.inputs.shape[:1]:
            raise ValueError(
                f"targets of {self.name} must be int64 [{len(self.inputs)}], "
                f"got {self.targets.dtype} {list(self.targets.shape)}"
            )
        if len(self.targets) and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < self.classes:
            raise ValueError(f"targets of {self.name} must lie in 0 ... {self.classes - 1}")

    def __len__(self) -> int:
        return len(self.targets)


def halves(dataset: Dataset) -> dict[str, Dataset]:
    """Two disjoint halves: ``meta-train`` has the first M // 2 rows, ``meta-test`` the others.

    They are views and cost no memory. ``digits()`` and ``mnist()`` give their rows in a fixed shuffled order, so that
    both halves are alike; shuffle data of your own that come sorted.

    Args:
        dataset: M >= 2 examples.

    Raises:
        ValueError: if there are fewer than two examples.

    Example:
        >>> from l2l_fast.data import digits, halves
        >>> {name: len(half) for name, half in halves(digits()).items()}
        {'meta-train': 898, 'meta-test': 899}
    """
    if len(dataset) < 2:
        raise ValueError(f"{dataset.name} has {len(dataset)} examples: too few to halve")
    middle = len(dataset) // 2
    rows = {"meta-train": slice(None, middle), "meta-test": slice(middle, None)}
    return {
        half: Dataset(dataset.name, dataset.inputs[rows[half]], dataset.targets[rows[half]], dataset.classes)
        for half in HALVES
    }


def fixed_order(count: int) -> Tensor:
    """The permutation of 0 ... count - 1 that is the same on every machine, for ever."""
    # NumPy promises that this old generator's stream never changes; neither its new ones nor torch's make that promise.
    return torch.from_numpy(np.random.RandomState(0).permutation(count))
