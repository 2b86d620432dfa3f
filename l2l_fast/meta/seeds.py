"""Where everything random of a run of meta-training comes from: seeds that say what they are for."""

from __future__ import annotations

import numpy as np
import torch

# The first word of every seed sequence, so that no two purposes share random numbers.
INSTANCE, SCALING, TRAJECTORY, VALIDATION, RATE, PERTURBATION = range(6)


def seed(*words: int) -> int:
    """A generator seed from what it is for; unlike a sum, no two different sequences of words share one."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*words: int) -> torch.Generator:
    """Torch's, on the CPU."""
    return torch.Generator().manual_seed(seed(*words))
