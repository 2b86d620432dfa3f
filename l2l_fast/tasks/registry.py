"""Tasks by name; :mod:`l2l_fast.tasks` fills the table."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from l2l_fast.tasks.base import Task

TABLE: dict[str, tuple[Callable[..., Task], dict]] = {}  # name -> class, and the options that the name stands for


def names() -> list[str]:
    """Names that ``get`` knows.

    Example:
        >>> import l2l_fast as l2l
        >>> l2l.tasks.names()[:3]
        ['quadratic', 'digits-mlp', 'digits-mlp-2layer']
    """
    return list(TABLE)


def get(name: str, /, **overrides) -> Task:
    """The task of a name; reads no data yet, but for the workloads, which are made of data.

    Networks start as ``torch.nn.Linear`` does (``init_scale="default"``), which is what a user's own network does; pass
    ``init_scale=0.01`` or 0.001 for the small Gaussian starts of the paper's implementations.

    Args:
        name: one of ``names()``.
        **overrides: options of its class, in place of the name's.

    Raises:
        ValueError: if there is no such name, listing those there are.
        TypeError: if its class has no such option.

    Example:
        >>> import l2l_fast as l2l
        >>> l2l.tasks.get("digits-mlp", init_scale=0.01).half
        'meta-train'
    """
    if not isinstance(name, str) or name not in TABLE:
        close = difflib.get_close_matches(str(name), TABLE, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"there is no task {name!r}.{hint} Known: {', '.join(TABLE)}")
    make, options = TABLE[name]
    return make(**({"name": name} | options | overrides))
