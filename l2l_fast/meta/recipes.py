"""Settings that are known to train well, by the kind of task; the command line starts from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from l2l_fast.meta.curricula import LogUniform
from l2l_fast.tasks import Quadratic, Task


@dataclass(frozen=True)
class Recipe:
    """Arguments of the network and of the meta-trainer, and how long to train."""

    network: dict
    training: dict = field(default_factory=dict)
    meta_steps: int = 1000


# The raw gradient serves functions that all have one scale; 128 of them in a batch cost little more than one.
QUADRATIC = Recipe(
    network={"features": "identity", "hidden_size": 20, "num_layers": 1},
    training={"instances": 128, "meta_lr": 1e-2, "schedule": "cosine"},
    meta_steps=1000,
)

# Networks have gradients of every scale: moments hide it, and random scaling keeps the LSTM from guessing it back.
# A small LSTM: the number of meta-updates holds quality back sooner than the network's size does.
CLASSIFIER = Recipe(
    network={"features": "moments", "hidden_size": 8, "num_layers": 1, "output": "tanh"},
    training={
        "parallel": 2,
        "horizon": LogUniform(50, 200, first=100),
        "objective": "relative",
        "scaling": 1.0,
        "schedule": "cosine",
        "validate_every": 250,
        "validation_instances": 4,
    },
    meta_steps=4000,
)

# What the demo trains: sees raw gradients and their moments, so what it learns on quadratics carries over to networks.
DEMO = Recipe(
    network={"features": "both", "hidden_size": 20, "num_layers": 1},
    training={"instances": 128, "meta_lr": 1e-2, "schedule": "cosine"},
    meta_steps=1500,
)


def for_task(task: Task) -> Recipe:
    """The recipe for a kind of task."""
    return QUADRATIC if isinstance(task, Quadratic) else CLASSIFIER
