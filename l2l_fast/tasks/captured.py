"""Losses and gradients of a task's instances as a list of operators, captured once: no autograd or vmap on the way.

Of small networks the operators take less time than what leads to them. So what has been evaluated often is traced, and
from then on its operators alone are called, on other points and batches of the same shapes. They are the same ones in
the same order, so the results are the same to the last bit. That is looked at along every trajectory before the first
use, on another point and batch than those it was traced on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

AFTER = 200  # evaluations: tracing takes as long as some hundred of them

Evaluate = Callable[[Sequence[Tensor], object], tuple[Tensor, Sequence[Tensor]]]


@dataclass
class Known:
    """What is known of one task: what was captured, by shapes, and how often those without have been evaluated."""

    captured: dict[tuple, Callable | None] = field(default_factory=dict)
    counts: dict[tuple, int] = field(default_factory=dict)


_known: WeakKeyDictionary = WeakKeyDictionary()


class Evaluation:
    """Losses and gradients of one trajectory's instances.

    Args:
        task: what it belongs to; what is captured serves all that evaluate the same task in the same shapes.

    Example:
        >>> import torch
        >>> from l2l_fast.tasks.captured import Evaluation
        >>> class Bowl: ...
        >>> def eager(points, batch):
        ...     with torch.enable_grad():
        ...         loss = (points[0] - batch).square().sum(-1)
        ...     return loss.detach(), torch.autograd.grad(loss.sum(), points)
        >>> Evaluation(Bowl())(eager, [torch.ones(2, 3, requires_grad=True)], torch.zeros(3))
        (tensor([3., 3.]), (tensor([[2., 2., 2.],
                [2., 2., 2.]]),))
    """

    def __init__(self, task: object) -> None:
        self._trusted: dict[tuple, Callable] = {}  # by shapes, what has been looked at along this trajectory
        try:
            self._known: Known | None = _known.setdefault(task, Known())
        except TypeError:  # a task that cannot be a key
            self._known = None

    def __call__(self, eager: Evaluate, points: Sequence[Tensor], batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Losses and gradients.

        Args:
            eager: (points, batch) -> (losses, gradients at the points), by autograd.
            points: parameters of all instances, in turn, each a leaf that requires its gradient.
            batch: tensors in nested structures.
        """
        leaves, structure = tree_flatten(batch)
        tensors = [*points, *leaves]
        if self._known is None or not _capturable(tensors):
            return eager(points, batch)
        shapes = (structure, len(points), *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors))
        if shapes in self._trusted:
            losses, *grads = self._trusted[shapes](*tensors)
            return losses, grads
        losses, grads = eager(points, batch)
        captured, counts = self._known.captured, self._known.counts
        counts[shapes] = counts.get(shapes, 0) + 1
        if shapes not in captured:
            if counts[shapes] > AFTER:
                captured[shapes] = _capture(eager, len(points), structure, tensors)
        elif captured[shapes] is not None and _finite(losses, *grads):
            if _same(captured[shapes], tensors, (losses, *grads)):
                self._trusted[shapes] = captured[shapes]
            else:  # the task is another than it was, or never was a function of its arguments alone
                captured[shapes] = None
        return losses, grads


def _capture(eager: Evaluate, count: int, structure, tensors: Sequence[Tensor]) -> Callable | None:
    """The operators of ``eager``; None where it cannot be traced."""

    def function(*tensors: Tensor) -> list[Tensor]:
        points = [tensor.detach().requires_grad_() for tensor in tensors[:count]]
        losses, grads = eager(points, tree_unflatten(list(tensors[count:]), structure))
        return [losses, *grads]

    try:
        traced = make_fx(function)(*(tensor.detach() for tensor in tensors))
    except Exception:  # whatever a task does, such as a branch on values
        return None
    for node in list(traced.graph.nodes):
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.data_dependent_output in node.target.tags:
            return None  # what was done with values of one point would be done at every other
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _capturable(tensors: Sequence[Tensor]) -> bool:
    """On the CPU: a GPU's work is captured as a whole (:mod:`l2l_fast.meta.graphs`)."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _same(captured: Callable, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    try:
        with torch.no_grad():
            found = captured(*tensors)
    except Exception:  # some of torch's operators can be traced and not be called, such as nn.LSTM's
        return False
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
