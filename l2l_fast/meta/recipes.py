"""Settings that are known to train well, by the kind of task; the command line starts from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from l2l_fast.tasks import MetaTraining, Quadratic, Task


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

# Networks have gradients of every scale: log_sign tells the LSTM which, the moments tell signal from noise. A linear
# head may take large first steps, and an unroll of half the horizon sees what they lead to. Four trajectories a
# meta-step: minibatch losses, and so meta-gradients, are noisy.
CLASSIFIER = Recipe(
    network={"features": "both", "hidden_size": 20, "num_layers": 1, "output_scale": 0.01},
    training={"unroll": 50, "parallel": 4, "meta_lr": 1e-2, "schedule": "cosine"},
    meta_steps=800,
)

# The optimizee is an optimizer's weights, whose gradients have any scale and the noise of a few inner instances.
META_TRAINING = Recipe(
    network={"features": "moments", "hidden_size": 16, "num_layers": 1},
    training={"instances": 16, "meta_lr": 1e-2, "schedule": "cosine", "average": 0.98},
    meta_steps=200,
)

# What the demo trains: sees raw gradients and their moments, so what it learns on quadratics carries over to networks.
DEMO = Recipe(
    network={"features": "both", "hidden_size": 20, "num_layers": 1},
    training={"instances": 128, "meta_lr": 1e-2, "schedule": "cosine"},
    meta_steps=2000,
)


def for_task(task: Task) -> Recipe:
    """The recipe for a kind of task."""
    if isinstance(task, MetaTraining):
        return META_TRAINING
    return QUADRATIC if isinstance(task, Quadratic) else CLASSIFIER
