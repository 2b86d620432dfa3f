"""Runs many optimizers side by side on the same instances of a task, from the same starts and on the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_fast.modes import plain
from l2l_fast.tasks.base import Instances, Task, batched

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)

# Coordinates whose gradients are formed in one batched evaluation, on the CPU and on an accelerator. Small tasks are
# bound by the cost of a call, so their lanes go together; large ones by the cache, and stacking would copy batches.
STACKED_COORDINATES = (2**18, 2**27)


@dataclass(frozen=True)
class Lane:
    """One optimizer in a stacked run.

    Args:
        make: parameters -> ``torch.optim.Optimizer``.
        elementwise: True where the rule treats each coordinate by itself, so that one optimizer on a single [B, N]
            tensor is exact for all B instances. False makes one optimizer an instance, on parameters of the task's
            own shapes.
        identity: everything that decides what the rule does, by name, so that a
            :class:`~l2l_fast.evaluate.store.Store` can keep its losses; None keeps them nowhere.
    """

    make: MakeOptimizer
    elementwise: bool = True
    identity: Mapping[str, object] | None = None


def trajectories(
    task: Task,
    lanes: Sequence[Lane],
    *,
    horizon: int,
    seeds: Iterable[int],
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Losses of K lanes on B instances, paired: every lane has the starts and the batches of every other.

    losses[k, i, t] = f_t(theta_t), theta_t the parameters of instance i after t updates by lane k, f_t the loss on the
    batch drawn for step t; t = 0 .. horizon, so there are horizon + 1 losses and horizon updates.

    Args:
        task: the task.
        lanes: the optimizers.
        horizon: number of updates.
        seeds: B seeds, one an instance.
        device: where to run.
        on_step: called with the number of updates done.

    Returns:
        losses [K, B, horizon + 1] on the CPU; not finite where a trajectory diverged.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> from l2l_fast.evaluate.trajectories import Lane, trajectories
        >>> lanes = [Lane(lambda params, lr=lr: torch.optim.SGD(params, lr)) for lr in (0.001, 0.01)]
        >>> trajectories(l2l.tasks.Quadratic(), lanes, horizon=5, seeds=[1, 2, 3]).shape
        torch.Size([2, 3, 6])
    """
    with plain(device) as as_before:
        instances = Instances(task, seeds, device)
        start = instances.start()
        theta = start.expand(len(lanes), *start.shape).clone()  # [K, B, N]; the leaves below are views of it
        grads = torch.zeros_like(theta)
        optimizers = [
            optimizer
            for lane, rows, row_grads in zip(lanes, theta, grads, strict=True)
            for optimizer in _optimizers(lane, instances, rows, row_grads)
        ]
        # Lanes outside, instances inside; a batch has no lane dimension, so all lanes share it.
        stacked_loss = batched(task, batched(task, task.loss), in_dims=(0, None))
        together = _together(start)
        losses = theta.new_empty(horizon + 1, *theta.shape[:2])
        for step in range(horizon + 1):
            batch = instances.draw()
            for some in (slice(k, k + together) for k in range(0, len(lanes), together)):
                losses[step, some] = _gradients(stacked_loss, theta[some], batch, instances, out=grads[some])
            if step == horizon:
                break
            for optimizer in optimizers:
                optimizer.step()
            if on_step:
                with as_before():
                    on_step(step + 1)
        return losses.permute(1, 2, 0).cpu()


def _together(start: Tensor) -> int:
    return max(1, STACKED_COORDINATES[start.device.type != "cpu"] // start.numel())


def lanes_together(task: Task, seeds: Sequence[int], device: torch.device | str) -> int:
    """How many lanes :func:`trajectories` evaluates in one batch; any such number of them are run alone as together."""
    with plain(device):
        return _together(Instances(task, seeds, device).start())


def smoothed(curves: Tensor, horizon: int) -> Tensor:
    """Trailing mean along the last dimension, over max(1, horizon // 20) steps.

    Minibatch losses are noisy, so "the loss at step t" means this wherever a single step is judged: the **final loss**
    is the smoothed mean curve at the horizon, and a loss is **reached** when the smoothed mean curve first gets down to
    it. The first value stands for those before it.
    """
    window = max(1, horizon // 20)
    curves = torch.cat([curves[..., :1].expand(*curves.shape[:-1], window - 1), curves], dim=-1).double()
    return curves.unfold(-1, window, 1).mean(-1)


def mean_loss(losses: Tensor) -> float:
    """Mean over seeds and over t = 1 .. T of losses [B, T + 1]; inf if any is not finite."""
    return finite_or_inf(losses[:, 1:].double().mean())


def final_loss(losses: Tensor, horizon: int) -> float:
    """Smoothed loss at the horizon, averaged over seeds, of losses [B, T + 1]; inf if it is not finite."""
    return finite_or_inf(smoothed(losses, horizon)[:, -1].mean())


def finite_or_inf(value: Tensor) -> float:
    """A 0-dim tensor as a number; inf where it is not finite, NaN included."""
    return value.item() if value.isfinite() else float("inf")


def _gradients(stacked_loss, theta: Tensor, batch, instances: Instances, out: Tensor) -> Tensor:
    """Losses [K, B] at theta [K, B, N]; their gradients go to ``out``."""
    flat = instances.unflatten(theta.flatten(0, 1))
    params = {name: value.unflatten(0, theta.shape[:2]).detach().requires_grad_() for name, value in flat.items()}
    with torch.enable_grad():
        losses = stacked_loss(params, batch)
        pieces = torch.autograd.grad(losses.sum(), list(params.values()))
    torch.cat([piece.flatten(2) for piece in pieces], dim=2, out=out)
    return losses.detach()


def _optimizers(lane: Lane, instances: Instances, rows: Tensor, grads: Tensor) -> list[torch.optim.Optimizer]:
    """Optimizers on views of ``rows`` [B, N], each view's gradient being the same view of ``grads``."""
    if lane.elementwise:
        return [lane.make([_leaf(rows, grads)])]
    sizes = [math.prod(shape) for shape in instances.shapes.values()]
    shapes = list(instances.shapes.values())
    return [
        lane.make([
            _leaf(piece.view(shape), piece_grad.view(shape))
            for piece, piece_grad, shape in zip(row.split(sizes), grad.split(sizes), shapes, strict=True)
        ])
        for row, grad in zip(rows, grads, strict=True)
    ]  # fmt: skip


def _leaf(value: Tensor, grad: Tensor) -> Tensor:
    leaf = value.detach().requires_grad_()
    leaf.grad = grad
    return leaf
