"""Families of optimization problems, by name or by class."""

from __future__ import annotations

import difflib

from l2l_fast.tasks.base import Instances, Task
from l2l_fast.tasks.classifier import Classifier
from l2l_fast.tasks.meta_training import MetaTraining
from l2l_fast.tasks.module import ModuleTask
from l2l_fast.tasks.quadratic import Quadratic

__all__ = ["Classifier", "Instances", "MetaTraining", "ModuleTask", "Quadratic", "Task", "get", "names"]

_VARIATIONS = {
    "mlp": {},  # the deck's: one hidden layer of 20 sigmoid units
    "mlp-2layer": {"hidden": (20, 20)},
    "mlp-40": {"hidden": (40,)},
    "mlp-relu": {"activation": "relu"},
    "conv": {"kind": "conv", "hidden": (8, 16), "activation": "relu"},
}
_TABLE = {"quadratic": (Quadratic, {})} | {
    f"{dataset}-{variation}": (Classifier, {"dataset": dataset} | options)
    for dataset in ("digits", "mnist")
    for variation, options in _VARIATIONS.items()
}
# The deck's proposal: an optimizer's own training, with an LSTM in Adam's place. Of the digits one instance is enough.
_TABLE |= {
    "meta-quadratic": (MetaTraining, {"task": "quadratic"}),
    "meta-digits-mlp": (MetaTraining, {"task": "digits-mlp", "instances": 1}),
}


def names() -> list[str]:
    """Names that ``get`` knows.

    Example:
        >>> import l2l_fast as l2l
        >>> l2l.tasks.names()[:3]
        ['quadratic', 'digits-mlp', 'digits-mlp-2layer']
    """
    return list(_TABLE)


def get(name: str, /, **overrides) -> Task:
    """The task of a name; reads no data yet.

    Networks start as ``torch.nn.Linear`` does (``init_scale="default"``), which is what a user's own network does; pass
    ``init_scale=0.01`` or 0.001 for the small Gaussian starts of the paper's implementations.

    Args:
        name: one of ``names()``.
        **overrides: options of its class, :class:`Quadratic`, :class:`Classifier` or :class:`MetaTraining`, in place of
            the name's.

    Raises:
        ValueError: if there is no such name, listing those there are.
        TypeError: if its class has no such option.

    Example:
        >>> import l2l_fast as l2l
        >>> l2l.tasks.get("digits-mlp", init_scale=0.01).half
        'meta-train'
    """
    if not isinstance(name, str) or name not in _TABLE:
        close = difflib.get_close_matches(str(name), _TABLE, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"there is no task {name!r}.{hint} Known: {', '.join(_TABLE)}")
    make, options = _TABLE[name]
    return make(**({"name": name} | options | overrides))
