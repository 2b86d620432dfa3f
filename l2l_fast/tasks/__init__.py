"""Families of optimization problems, by name or by class."""

from __future__ import annotations

from l2l_fast.tasks.base import Instances, Task
from l2l_fast.tasks.classifier import Classifier
from l2l_fast.tasks.meta_training import MetaTraining
from l2l_fast.tasks.module import ModuleTask
from l2l_fast.tasks.quadratic import Quadratic
from l2l_fast.tasks.registry import TABLE, get, names
from l2l_fast.tasks.small import SMALL
from l2l_fast.tasks.workloads import WORKLOADS

__all__ = [
    "SMALL", "WORKLOADS", "Classifier", "Instances", "MetaTraining", "ModuleTask", "Quadratic", "Task", "get", "names",
]  # fmt: skip

_VARIATIONS = {
    "mlp": {},  # the deck's: one hidden layer of 20 sigmoid units
    "mlp-2layer": {"hidden": (20, 20)},
    "mlp-40": {"hidden": (40,)},
    "mlp-relu": {"activation": "relu"},
    "conv": {"kind": "conv", "hidden": (8, 16), "activation": "relu"},
}
TABLE |= {"quadratic": (Quadratic, {})} | {
    f"{dataset}-{variation}": (Classifier, {"dataset": dataset} | options)
    for dataset in ("digits", "mnist")
    for variation, options in _VARIATIONS.items()
}
# The deck's proposal: an optimizer's own training, with an LSTM in Adam's place. Of the digits one instance is enough.
TABLE |= {
    "meta-quadratic": (MetaTraining, {"task": "quadratic"}),
    "meta-digits-mlp": (MetaTraining, {"task": "digits-mlp", "instances": 1}),
}
# What people train, small: modules with data of their own.
TABLE |= {name: (make, {}) for name, make in WORKLOADS.items()}
# What a rule for them is meta-trained on.
TABLE |= SMALL
