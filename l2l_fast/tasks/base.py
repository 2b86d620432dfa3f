"""What a task is: three pure functions, and the one place that runs many instances of it at once.

A task describes a family of optimization problems. ``init`` draws a start, ``sample`` draws what the loss is computed
on, ``loss`` maps both to a scalar. All randomness comes from the generator handed in, so an instance is its seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from l2l_fast.modes import plain
from l2l_fast.tasks.captured import Evaluation

Params = dict[str, Tensor]
Batch = Any  # a tensor, or a nested tuple, list or dictionary of tensors


@runtime_checkable
class Task(Protocol):
    """A family of optimizees.

    A task may have one attribute more, ``vmap``: False where ``torch.vmap`` cannot batch its loss, such as for
    recurrent layers or a branch on values. Instances are then evaluated one after another. And one method more,
    ``with_half(name)``: the same task on "meta-train" or "meta-test", the half of its data that optimizers learn on or
    the one that they are judged on.

    Attributes:
        name: what tables and file names call it.
        resample: True where every step sees a new batch (minibatches); False where one batch, drawn at the start, is
            the function itself (quadratics).
    """

    name: str
    resample: bool

    def init(self, generator: torch.Generator) -> Params:
        """Start of one trajectory: float32 tensors by name, all drawn from ``generator``, of the CPU."""
        ...

    def sample(self, generator: torch.Generator) -> Batch:
        """What one step's loss is computed on, on the CPU. Many are drawn ahead: of a data set, only the rows."""
        ...

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """0-dim loss; pure, and made of operations that ``torch.vmap`` can batch unless the task has ``vmap = False``.

        ``batch`` is where the params are.
        """
        ...


def half(task: Task, name: str) -> Task:
    """The task on a half of its data, "meta-train" or "meta-test"; itself where it has no halves."""
    return task.with_half(name) if hasattr(task, "with_half") else task


class Resident:
    """Constants of a task, such as its data, copied once to each device where they are used.

    Args:
        tensors: a tensor, or a nested tuple, list or dictionary of tensors.
    """

    def __init__(self, tensors: Batch) -> None:
        self._tensors, self._copies = tensors, {}

    def on(self, device: torch.device) -> Batch:
        """The tensors on ``device``, in the structure they were given in."""
        if device not in self._copies:
            with plain():  # kept for whoever comes next, who may want gradients
                self._copies[device] = tree_map(lambda tensor: tensor.to(device), self._tensors)
        return self._copies[device]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` from the CPU on ``device``; nobody waits for the copy, which pageable memory would make them do."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def look_up(table: Tensor, rows: Tensor) -> Tensor:
    """``table[rows]``, for rows [n] of a table [M, ...]."""
    if table.ndim == 1:
        return table[rows]
    # ``torch.vmap`` batches an embedding many times faster than an index_select.
    return F.embedding(rows, table.flatten(1)).view(*rows.shape, *table.shape[1:])


def batched(task: Task, function: Callable, in_dims: int | tuple[int | None, ...] = 0) -> Callable:
    """``torch.vmap(function, in_dims)`` of a task's function; where ``vmap`` is False, a loop that does the same.

    Args:
        task: whose function it is.
        function: its ``loss``, such, or what is already batched, of tensors in nested structures.
        in_dims: of each argument the dimension that its leaves are batched along, or None.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> from l2l_fast.tasks.base import batched
        >>> batched(l2l.tasks.Quadratic(), lambda x, y: x + y, (0, None))(torch.arange(3), torch.tensor(1))
        tensor([1, 2, 3])
    """
    if getattr(task, "vmap", True):
        return torch.vmap(function, in_dims)

    def loop(*arguments):
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)
        rows = zip(*(_unbound(argument, dim) for argument, dim in zip(arguments, dims, strict=True)), strict=False)
        results = [function(*row) for row in rows]
        return tree_map(lambda *leaves: torch.stack(leaves), *results)

    return loop


def _unbound(tree, dim: int | None):
    """A nested structure of tensors, once for each index of a dimension of theirs; without one, for ever the same."""
    if dim is None:
        return itertools.repeat(tree)
    leaves, structure = tree_flatten(tree)
    return [tree_unflatten(list(row), structure) for row in zip(*(leaf.unbind(dim) for leaf in leaves), strict=True)]


def unflatten(theta: Tensor, shapes: dict[str, torch.Size]) -> Params:
    """Views of flat parameters [B, N] as a dictionary of [B, *shape], for shapes by name."""
    pieces = theta.split([math.prod(shape) for shape in shapes.values()], dim=1)
    return {
        name: piece.view(theta.shape[0], *shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


class Instances:
    """B instances of a task, side by side: one row of coordinates and one generator each.

    Args:
        task: the task.
        seeds: B integers; instance i depends on ``seeds[i]`` alone, so it is the same in any company.
        device: where to run.

    Example:
        >>> import l2l_fast as l2l
        >>> instances = l2l.tasks.Instances(l2l.tasks.Quadratic(), seeds=[1, 2, 3])
        >>> theta = instances.start()
        >>> losses, grads = instances.evaluate(theta, instances.draw())
        >>> theta.shape, losses.shape, grads.shape
        (torch.Size([3, 10]), torch.Size([3]), torch.Size([3, 10]))
    """

    def __init__(self, task: Task, seeds, device: torch.device | str = "cpu") -> None:
        self.task, self.device = task, torch.device(device)
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        starts = [task.init(generator) for generator in self.generators]
        for name, param in starts[0].items():
            if not (param.dtype.is_floating_point and param.device.type == "cpu"):
                raise ValueError(
                    f"the task {task.name} must start from floating-point tensors on the CPU, got {param.dtype} on "
                    f"{param.device} for {name}: name dtype and device in its init, whatever torch's defaults are"
                )
        self.shapes = {name: param.shape for name, param in starts[0].items()}
        self._start = torch.stack([torch.cat([param.reshape(-1) for param in start.values()]) for start in starts])
        self._fixed = None if task.resample else self._draw(1)
        self._evaluation = Evaluation(task)

    def start(self) -> Tensor:
        """Flat starting parameters [B, N], float32, N being the coordinates of one instance."""
        return send(self._start, self.device)

    def draw(self) -> Batch:
        """The next step's stacked batch, leaves [B, ...]."""
        return tree_map(lambda leaf: leaf[0], self.draws(1))

    def draws(self, steps: int) -> Batch:
        """The next steps' batches at once: one copy to the device for all of them.

        Args:
            steps: how many.

        Returns:
            what ``task.sample`` gives, with leaves [steps, B, ...].
        """
        if self._fixed is None:
            return self._draw(steps)
        return tree_map(lambda leaf: leaf.expand(steps, *leaf.shape[1:]), self._fixed)

    def unflatten(self, theta: Tensor) -> Params:
        """Views of flat parameters [B, N] as a dictionary of [B, *shape]."""
        return unflatten(theta, self.shapes)

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Loss of every instance, for stacked parameters.

        losses[i] = f(params[i]; batch[i])

        Args:
            params: by name, [B, *shape], on this device; or [C * B, *shape], C copies of all instances in turn.
            batch: one step's, leaves [B, ...], as :meth:`draw` gives it; every copy has the same.

        Returns:
            [B], or [C * B]; differentiable in ``params``.

        Raises:
            RuntimeError: if B > 1 and the task's loss is not made for ``torch.vmap``, and the task does not say so.
        """
        task, count = self.task, len(self.generators)
        copies = len(next(iter(params.values()))) // count
        if copies > 1 and count > 1:
            params = {name: param.view(copies, count, *param.shape[1:]) for name, param in params.items()}
            return batched(task, batched(task, task.loss), (0, None))(params, batch).flatten()
        if copies > 1:
            return batched(task, task.loss, (0, None))(params, tree_map(lambda leaf: leaf.squeeze(0), batch))
        if count > 1:
            return batched(task, task.loss)(params, batch)
        # One instance by itself: the batching rules would take as long as a small network.
        params = {name: param.squeeze(0) for name, param in params.items()}
        return self.task.loss(params, tree_map(lambda leaf: leaf.squeeze(0), batch)).unsqueeze(0)

    def leaves(self, theta: Tensor) -> Params:
        """Where to differentiate: ``theta`` [B, N] unflattened, and still so after it is changed in place."""
        return {name: param.detach().requires_grad_() for name, param in self.unflatten(theta).items()}

    def gradients(self, leaves: Params, batch: Batch, out: Tensor) -> Tensor:
        """Losses at ``leaves``, and their gradients in a place of the caller's.

        out[i] = df(leaves[i]; batch[i]) / dleaves[i], flat

        Args:
            leaves: where to differentiate, from :meth:`leaves`.
            batch: one step's, leaves [B, ...].
            out: takes the gradients, [B, N], of the parameters' dtype.

        Returns:
            losses [B], without a graph.

        Raises:
            RuntimeError: if a loss does not depend on one of the parameters.
        """
        with torch.no_grad():
            losses, grads = self._evaluation(self._by_autograd, list(leaves.values()), batch)
            torch.cat([grad.reshape(len(grad), -1) for grad in grads], dim=1, out=out)
        return losses

    def _by_autograd(self, leaves: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        with torch.enable_grad():
            losses = self.losses(dict(zip(self.shapes, leaves, strict=True)), batch)
            grads = torch.autograd.grad(losses, list(leaves), torch.ones_like(losses))
        return losses.detach(), grads

    def evaluate(self, theta: Tensor, batch: Batch, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Losses and their gradients at a point.

        (f(theta[i]; batch[i]), df(theta[i]; batch[i]) / dtheta[i])

        Args:
            theta: flat parameters [B, N], floating-point.
            batch: one step's, leaves [B, ...].
            create_graph: keep both differentiable in ``theta``, for second derivatives.

        Returns:
            losses [B] and gradients [B, N], of the dtype of ``theta``.

        Raises:
            RuntimeError: if a loss does not depend on one of the parameters.
        """
        if not create_graph:
            grads = torch.empty_like(theta)
            return self.gradients(self.leaves(theta), batch, grads), grads
        with torch.enable_grad():
            params = self.unflatten(theta)
            losses = self.losses(params, batch)
            grads = torch.autograd.grad(losses.sum(), list(params.values()), create_graph=True)
        return losses, torch.cat([grad.reshape(len(grad), -1) for grad in grads], dim=1)

    def state_dict(self) -> dict:
        """Where the B generators are: what is drawn next follows from it."""
        return {"generators": [generator.get_state() for generator in self.generators]}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a :meth:`state_dict` of as many instances."""
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved.cpu())  # a checkpoint may have been loaded to another device

    def _draw(self, steps: int) -> Batch:
        batches = [self.task.sample(generator) for _ in range(steps) for generator in self.generators]
        leaves, structure = zip(*map(tree_flatten, batches), strict=True)

        def stacked(column: tuple[Tensor, ...]) -> Tensor:
            rows = torch.stack(column).view(steps, len(self.generators), *column[0].shape)
            return send(rows, self.device)

        return tree_unflatten([stacked(column) for column in zip(*leaves, strict=True)], structure[0])
