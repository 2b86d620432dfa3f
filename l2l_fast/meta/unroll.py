r"""One truncation of the meta-training loop, and its gradient without a second graph.

Along a trajectory theta[t+1] = a theta[t] + lr u[t] with a = 1 - lr * weight_decay, and the meta-loss is
L = sum_t w[t] f_t(theta[t]), t = 1 .. T. Taking d grad_t / d phi = 0 (Andrychowicz et al. 2016, section 2.1), each
update reaches the later losses through that recurrence alone:

    dL/du[t] = lr * sum_{s=t+1..T} a^(s-t-1) * w[s] * grad f_s(theta[s])

The gradients on the right are those that the steps had to compute anyway to feed the LSTM. So a truncation runs forward
without autograd, keeps its T gradients and its first state, and one call of ``lstm_unroll_backward`` gives dL/dphi.

With ``update_rms`` the step takes r d / RMS(d) of each tensor in the place of u, d being what the network gives. A
truncation then keeps its T d as well, and dL/dd follows from dL/du by itself
(:func:`~l2l_fast.normalize.scale_rows_backward`); of B instances side by side each has its own tensors. What
``orthogonalize`` adds, what ``input_rms`` divides by, and r where ``max_update_rms`` makes it differ from step to step,
follow from gradients alone, so they count as constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from l2l_fast import normalize, ops
from l2l_fast.config import Config, num_weights
from l2l_fast.meta.sampling import sample_coordinates
from l2l_fast.networks import SURROUNDINGS, CoordinatewiseLSTM
from l2l_fast.tasks import Instances
from l2l_fast.tasks.base import Batch, send

OBJECTIVES = ("sum", "relative", "log")
EPSILON = 1e-6  # keeps the log and relative objectives finite at a loss of zero


@dataclass
class Rule:
    """The update rule during meta-training: what the network computes, its weights, and the recurrence around it."""

    config: Config
    weights: Tensor  # flat, [W]
    lr: float = 1.0
    weight_decay: float = 0.0
    update_rms: float | None = None
    input_rms: float | None = None
    orthogonalize: bool = False
    max_update_rms: float | None = None

    @classmethod
    def of(cls, network: CoordinatewiseLSTM, weights: Tensor | None = None, lr=1.0, weight_decay=0.0) -> Rule:
        """A network's, by its own weights unless others are given: [W], or [B, W] of as many networks as rows."""
        weights = network.flat_weights().detach() if weights is None else weights
        return cls(network.config, weights, lr, weight_decay, **{name: getattr(network, name) for name in SURROUNDINGS})


class Estimate(NamedTuple):
    """What a window gives: the 0-dim meta-loss, and its gradient with respect to the flat weights [W]."""

    meta_loss: Tensor
    gradient: Tensor


class Trajectory:
    """B instances of a task on their way, with the learned optimizer's state and the gradient at the current point.

    Its tensors keep their places in memory: a window changes them in place, and so does :meth:`place`. What is captured
    of one window (:mod:`l2l_fast.meta.graphs`) so serves every later one, of this trajectory and of those that follow.

    With ``copies`` every instance goes its way C times over on the same batches, each time with weights of its own, and
    the tensors have C * B rows: the trajectory's own B first, which the unperturbed network leads, then P = (C - 1) / 2
    copies with a perturbation added and P with it subtracted.

    Args:
        instances: the B optimizees.
        config: what the network computes.
        dtype: of parameters and state; float32, or float64 to check.
        scaling: optional [B, N] factors c: the optimizer sees theta / c and minimises f(c * theta) (Lv et al. 2017).
        window: the most steps that one window will have; a longer one makes the batches' place anew.
        schedule: of the step, counted from 0, what the rule's ``lr`` is multiplied by there; None: 1.
        copies: C, odd.

    Attributes:
        noise: the window's perturbations in units of their standard deviation, [P, B, W].
        accumulated: the sum of those since the start, [P, B, W].
    """

    def __init__(
        self, instances: Instances, config: Config, dtype=torch.float32, scaling: Tensor | None = None, window: int = 1,
        schedule: Callable[[int], float] | None = None, copies: int = 1,
    ) -> None:  # fmt: skip
        start = instances.start()
        self.count, self.copies = len(start), copies  # B, C
        self.theta = start.new_empty(copies * len(start), start.shape[1], dtype=dtype)
        self.shapes = list(instances.shapes.values())  # of an instance's tensors
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.square = self.theta.new_zeros(len(self.theta), len(self.sizes))  # with input_rms
        self.slow_square = torch.zeros_like(self.square)  # with max_update_rms
        self.rates = self.theta.new_ones(window)  # the schedule's in the window
        self.scaling = None if scaling is None else scaling.new_empty(self.theta.shape)
        self.state = ops.new_state(self.theta, config, dtype, several=copies > 1)
        self.noise = self.theta.new_zeros(copies // 2, self.count, num_weights(config) if copies > 1 else 0)
        self.accumulated = torch.zeros_like(self.noise)
        self.step = torch.zeros(
            (), dtype=torch.float32, device=self.theta.device
        )  # steps_done, where the kernels read it
        self.shift = torch.zeros((), dtype=torch.float64, device=self.theta.device)  # the window's random number
        self.grad = torch.empty_like(self.theta)
        self._window, self._batches = window, None
        self.place(instances, scaling, schedule)
        self.losses = self.evaluator()(at(self._batches, 0), self.grad)
        self.first_losses = self.losses.clone()

    def place(
        self, instances: Instances, scaling: Tensor | None = None, schedule: Callable[[int], float] | None = None
    ) -> None:
        """Put another start here, of as many instances with the same shapes; :meth:`evaluate_start_` comes next."""
        self.instances, self.steps_done, self.schedule = instances, 0, schedule
        self.by_copy(self.theta).copy_(instances.start())
        self.theta.grad = None  # a teacher's
        if scaling is not None:
            self.by_copy(self.scaling).copy_(scaling)
            self.theta.div_(self.scaling)
        self.accumulated.zero_()
        self.state.zero_()
        self.square.zero_()
        self.slow_square.zero_()
        self.step.zero_()
        self._hold(instances.draws(1), 1)

    @torch.no_grad()
    def evaluate_start_(self) -> None:
        """Losses and gradients at the start."""
        self.losses.copy_(self.evaluator()(at(self._batches, 0), self.grad))
        self.first_losses.copy_(self.losses)

    def next(self, length: int) -> Batch:
        """All that the host does of a window: draw the batches of its steps, leaves [length, B, ...], and count them.

        They stand where the last window's stood.
        """
        # Of a generator of its own, which follows from the instance and the step, so that batches do not depend on it.
        self.shift.fill_(np.random.default_rng((self.instances.generators[0].initial_seed(), self.steps_done)).random())
        if length > len(self.rates):
            self.rates = self.rates.new_ones(length)
        if self.schedule is not None:
            rates = [self.rate(self.steps_done + t) for t in range(length)]
            self.rates[:length].copy_(
                send(torch.tensor(rates, dtype=self.rates.dtype, device="cpu"), self.rates.device)
            )
        self.steps_done += length
        if not self.instances.task.resample:  # they are what they were
            return tree_map(lambda leaf: leaf[0].expand(length, *leaf.shape[1:]), self._batches)
        return self._hold(self.instances.draws(length), length)

    def by_copy(self, rows: Tensor) -> Tensor:
        """Rows [C * B, ...] as [C, B, ...]."""
        return rows.view(self.copies, self.count, *rows.shape[1:])

    def spread_(self) -> None:
        """Put every copy where the trajectory itself is."""
        for rows in (self.theta, self.grad, self.state, self.square, self.slow_square):
            rows = rows.unflatten(0, (self.copies, self.count))
            rows[1:] = rows[0]

    def rate(self, step: int) -> float:
        """What the rule's ``lr`` is multiplied by in a step, counted from 0."""
        return 1.0 if self.schedule is None else self.schedule(step)

    def relative_(self, grad: Tensor, rule: Rule, step: Tensor) -> Tensor:
        """What the network sees of a gradient [B, N] in its step number ``step``; moves its tensors' squares on."""
        if rule.input_rms is None:
            return grad
        return normalize.relative_rows(grad, self.square, step, self.sizes, rule.config, rule.input_rms)

    def update_sizes_(self, x: Tensor, momenta: Tensor, rule: Rule, step: Tensor) -> float | Tensor:
        """r of every tensor in a step, one number or [B, K]; moves their slow squares on.

        x, momenta: what the network has seen, and m after the step, [B, N].
        """
        if rule.max_update_rms is None:
            return rule.update_rms
        sizes, moved = normalize.size_rows(
            x, momenta, self.slow_square, step, self.sizes, rule.config, rule.update_rms, rule.max_update_rms
        )
        self.slow_square.copy_(moved)
        return sizes

    def _hold(self, drawn: Batch, length: int) -> Batch:
        """Copy batches, leaves [length, B, ...], to their place."""
        if self._batches is None or length > self._window:
            self._window = max(length, self._window) if self.instances.task.resample else 1
            self._batches = tree_map(lambda leaf: leaf.new_empty(self._window, *leaf.shape[1:]), drawn)
        return tree_map(lambda place, leaf: place[:length].copy_(leaf), self._batches, drawn)

    def evaluator(self) -> Callable[[Batch, Tensor], Tensor]:
        """Makes ``evaluate(batch, out)``: losses [B] at wherever theta is by then, gradients [B, N] in ``out``."""
        point = self.theta if self.scaling is None else torch.empty_like(self.theta)
        leaves = self.instances.leaves(point)

        def evaluate(batch: Batch, out: Tensor) -> Tensor:
            if self.scaling is not None:
                torch.mul(self.theta, self.scaling, out=point)
            losses = self.instances.gradients(leaves, batch, out)
            if self.scaling is not None:
                out.mul_(self.scaling)
            return losses

        return evaluate

    def evaluate(self, theta: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Losses [B] and gradients [B, N] at another point, on the next batch."""
        scale = 1.0 if self.scaling is None else self.scaling
        losses, grads = self.instances.evaluate(theta * scale, self.instances.draw(), create_graph=create_graph)
        return losses, grads * scale

    def state_dict(self) -> dict:
        names = ("scaling", "theta", "state", "square", "slow_square", "steps_done", "losses", "grad", "first_losses")
        names += ("accumulated",) if self.copies > 1 else ()
        return {**{name: getattr(self, name) for name in names}, "instances": self.instances.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        saved = dict(saved)
        self.slow_square.zero_()  # which earlier versions' have none of
        self.instances.load_state_dict(saved.pop("instances"))
        self.steps_done = saved.pop("steps_done")
        self.step.fill_(self.steps_done)
        for name, tensor in saved.items():
            if tensor is not None:
                getattr(self, name).copy_(tensor)


def loss_weights(
    objective: str, losses: Tensor, first_losses: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Meta-loss of a truncation and its derivative in every loss.

    ``sum``: L = sum_t w[t] f_t;  ``relative``: sum_t w[t] f_t / f_0;  ``log``: sum_t w[t] log(f_t + 1e-6);
    each averaged over the B instances.

    Args:
        objective: one of the three.
        losses: f_t at t = 1 .. T, [T, B].
        first_losses: f_0 at the start of the trajectory, [B].
        weights: w, [T]; ones if not given.

    Returns:
        the 0-dim meta-loss and dL/df, [T, B].
    """
    terms, derivatives = loss_terms(objective, losses, first_losses, weights)
    return terms.sum(), derivatives


def loss_terms(
    objective: str, losses: Tensor, first_losses: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What every loss adds to the meta-loss of :func:`loss_weights`, and the derivatives, [T, B] each."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(map(repr, OBJECTIVES))}, got {objective!r}")
    weights = torch.ones_like(losses) if weights is None else weights.to(losses)[:, None].expand_as(losses)
    weights = weights / losses.shape[1]
    if objective == "log":
        return weights * (losses + EPSILON).log(), weights / (losses + EPSILON)
    if objective == "relative":
        weights = weights / (first_losses + EPSILON)
    return weights * losses, weights


def suffix_sums(
    grads: Tensor, d_losses: Tensor, lr: float | Sequence[float] | Tensor = 1.0, weight_decay: float = 0.0
) -> Tensor:
    """dL/du[t] for t = 0 .. T-1, from the gradients at theta[1] .. theta[T].

    Args:
        grads: grad f_s(theta[s]), s = 1 .. T, [T, B, N].
        d_losses: dL/df_s, [T, B].
        lr, weight_decay: of the recurrence theta[t+1] = (1 - lr[t] * weight_decay) theta[t] + lr[t] u[t]; one number,
            or T of them.

    Returns:
        [T, B, N].
    """
    lr = torch.as_tensor(lr, dtype=grads.dtype, device=grads.device).expand(len(grads))
    sums = grads * d_losses[:, :, None]
    rows = sums.unbind()
    for earlier, later, shrinks in zip(
        rows[-2::-1], rows[:0:-1], (1 - lr * weight_decay).flip(0).unbind()[:-1], strict=True
    ):
        earlier.addcmul_(later, shrinks)
    return sums.mul_(lr[:, None, None])


class Record:
    """What :func:`advance_` leaves of a window for the gradient, of the trajectory's own B rows.

    Args:
        trajectory: where the window begins.
        rule: the optimizer.
        length: T.

    Attributes:
        first_state, first_step: the state [B * N, S] before the first step, and its number.
        grads: at theta[0] .. theta[T], [T + 1, B, N].
        inputs: with ``input_rms``, what the network saw of the gradients, [T, B, N]; else None.
        raw: with ``update_rms``, d, what it gave; else None.
        joined: with ``orthogonalize``, d after the momentum was added, before it is scaled; else None.
        rms: with ``max_update_rms``, the sizes r that its tensors got, [T, B, K]; else None.
    """

    def __init__(self, trajectory: Trajectory, rule: Rule, length: int) -> None:
        own = slice(trajectory.count)
        theta, state = trajectory.theta[own], trajectory.state[own]
        first_state = ops.new_state(theta, rule.config, state.dtype).copy_(state)
        self.first_state, self.first_step = first_state.view(theta.numel(), -1), trajectory.step + 1
        self.grads = theta.new_empty(length + 1, *theta.shape)
        self.grads[0] = trajectory.grad[own]

        def kept(flag: bool) -> Tensor | None:
            return torch.empty_like(self.grads[1:]) if flag else None

        self.inputs, self.raw = kept(rule.input_rms is not None), kept(rule.update_rms is not None)
        self.joined = kept(rule.orthogonalize)
        sized = rule.max_update_rms is not None
        self.rms = theta.new_empty(length, len(theta), len(trajectory.sizes)) if sized else None

    def keep(self, name: str, t: int, rows) -> None:
        """Of all rows, in step t, the trajectory's own, if there is a place for them."""
        place = getattr(self, name)
        if place is not None:
            place[t] = rows[: place.shape[1]]


@torch.no_grad()
def advance_(trajectory: Trajectory, rule: Rule, batches: Batch, grads: Tensor, record: Record | None = None) -> Tensor:
    """Steps of the learned optimizer, each followed by the loss and the gradient where it leads.

    Nothing here waits for the device, nor does it depend on anything that the host knows but the length.

    Args:
        trajectory: moved on in place.
        rule: the optimizer.
        batches: of T steps, from ``trajectory.next(T)``.
        grads: [T, C * B, N], takes the gradients at theta[1] .. theta[T]; all may have one place.
        record: takes what the gradient needs; of a trajectory without copies, ``grads`` are its own.

    Returns:
        losses [T, C * B].
    """
    evaluate, grad, losses, theta = trajectory.evaluator(), trajectory.grad, [], trajectory.theta
    rates = (rule.lr * trajectory.rates).to(rule.weights.dtype)
    one = torch.ones_like(rates[0])
    for t, lr in enumerate(rates[: len(grads)]):
        trajectory.step += 1
        x = trajectory.relative_(grad, rule, trajectory.step)
        if rule.update_rms is None:
            _step_(trajectory, theta, x, rule, lr, rule.weight_decay)
        else:
            d = torch.full_like(theta, -0.0)
            _step_(trajectory, d, x, rule, one, 0.0)
            joined = _joined(trajectory, d, x, rule) if rule.orthogonalize else d
            rms = trajectory.update_sizes_(x, trajectory.state[..., 0], rule, trajectory.step)
            moves = lr * normalize.scale_rows(joined, trajectory.sizes, rms)
            if rule.weight_decay:
                moves -= torch.where(normalize.is_held(d), 0.0, lr * rule.weight_decay * theta)
            theta += moves
            if record is not None:
                record.keep("raw", t, d)
                record.keep("joined", t, joined)
                record.keep("rms", t, rms)
        if record is not None:
            record.keep("inputs", t, x)
        grad = grads[t]
        losses.append(evaluate(at(batches, t), grad))
        if record is not None and trajectory.copies > 1:
            record.keep("grads", t + 1, grad)
    trajectory.grad.copy_(grad)
    trajectory.losses.copy_(losses[-1])
    return torch.stack(losses)


def _joined(trajectory: Trajectory, d: Tensor, x: Tensor, rule: Rule) -> Tensor:
    momentum = normalize.momentum(x, trajectory.state, rule.config, d.dtype)
    return normalize.join_rows(d, torch.where(normalize.is_held(d), 0.0, momentum), trajectory.shapes)


def _step_(trajectory: Trajectory, theta: Tensor, grad: Tensor, rule: Rule, lr: Tensor, weight_decay: float) -> None:
    """One step of the network, or of each row's own, of ``theta`` and the trajectory's state."""
    ops.lstm_step_(
        [theta], [grad], [trajectory.state], rule.weights, lr, [trajectory.step], rule.config,
        weight_decay=weight_decay,
    )  # fmt: skip


@torch.no_grad()
def window_(
    trajectory: Trajectory,
    rule: Rule,
    batches: Batch,
    length: int,
    *,
    objective: str = "sum",
    weights: Tensor | None = None,
    coordinates: int | None = None,
) -> Estimate:
    """Advance a trajectory by ``length`` steps and differentiate the losses after each of them.

    It is the device's part of the work alone, as :func:`advance_` is.

    Args:
        trajectory: moved on in place.
        rule: the optimizer.
        batches: of T steps, from ``trajectory.next(T)``.
        length: T.
        objective, weights: see :func:`loss_weights`.
        coordinates: how many, of B * N, are drawn to stand for all in the gradient; None for all of them. See
            :func:`~l2l_fast.meta.sampling.sample_coordinates`.
    """
    record = Record(trajectory, rule, length)
    losses = advance_(trajectory, rule, batches, record.grads[1:], record)
    return backpropagated(trajectory, rule, record, losses, objective, weights, coordinates)


@torch.no_grad()
def backpropagated(
    trajectory: Trajectory,
    rule: Rule,
    record: Record,
    losses: Tensor,
    objective: str,
    weights: Tensor | None,
    coordinates: int | None,
) -> Estimate:
    """The gradient of a window that has been gone through, of the trajectory's own rows.

    Args:
        trajectory: after the window.
        rule: the optimizer, with the weights [W] that have led these rows.
        record: what the window has left.
        losses: f_t at t = 1 .. T, [T, B].
        objective, weights, coordinates: as :func:`window_` has them.
    """
    length, size, grads = len(losses), record.grads[0].numel(), record.grads
    first_losses = trajectory.first_losses[: trajectory.count]
    meta_loss, d_losses = loss_weights(objective, losses, first_losses, weights)
    d_updates = suffix_sums(grads[1:], d_losses, rule.lr * trajectory.rates[:length], rule.weight_decay)
    if rule.update_rms is not None:
        joined = record.joined if rule.orthogonalize else record.raw
        rms = rule.update_rms if record.rms is None else record.rms
        d_updates = normalize.scale_rows_backward(d_updates, joined, trajectory.sizes, rms)
    if rule.orthogonalize:
        d_updates = normalize.join_rows_backward(d_updates, record.raw, trajectory.shapes)
    inputs = grads[:length] if record.inputs is None else record.inputs
    d_updates, inputs = d_updates.view(length, size), inputs.view(length, size)
    states = record.first_state
    if coordinates is not None and coordinates < size:
        chosen, factors = sample_coordinates(d_updates, coordinates, trajectory.shift)
        d_updates, inputs = d_updates[:, chosen] * factors, inputs[:, chosen]
        states = states.T[:, chosen].T  # along the rows, which are contiguous
    *_, d_weights = ops.lstm_unroll_backward(
        d_updates, None, inputs, states, rule.weights, rule.config, record.first_step
    )
    return Estimate(meta_loss, d_weights)


def at(batches: Batch, t: int) -> Batch:
    """The batches of one step."""
    return tree_map(lambda leaf: leaf[t], batches)
