"""Estimators of the meta-gradient: how a window of a trajectory is gone through, and differentiated on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from l2l_fast import normalize, ops
from l2l_fast.meta.options import TrainerOptions
from l2l_fast.meta.unroll import Estimate, Rule, Trajectory, at, loss_weights, window_


class Estimator(Protocol):
    """Goes on along a trajectory and estimates the gradient of the meta-loss with respect to the flat weights.

    Attributes:
        capturable: whether the device's part can be captured in a CUDA graph: it then works on tensors that keep their
            places, and what it needs of the host is the same in every window of one trajectory and one length.
    """

    capturable: bool

    def prepare(self, trajectory: Trajectory, length: int) -> Callable[[], Estimate]:
        """Do the host's part of a window of ``length`` steps; what is returned does the device's, once.

        Args:
            trajectory: moved on in place, by the time that both parts are done.
            length: T, at least 1.
        """
        ...


@dataclass(frozen=True)
class TruncatedBackpropagation:
    """The first-order gradient by suffix sums; :mod:`l2l_fast.meta.unroll` has the derivation.

    Args:
        rule: the optimizer.
        objective: "sum", "relative" or "log".
        weights: w of the losses, at least T of them; ones if None.
        coordinates: how many, of B * N, are drawn to stand for all in the gradient; None for all.

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.meta.estimators import TruncatedBackpropagation
        >>> from l2l_fast.meta.unroll import Rule, Trajectory
        >>> network = l2l.CoordinatewiseLSTM("moments", hidden_size=4, num_layers=1)
        >>> trajectory = Trajectory(l2l.tasks.Instances(l2l.tasks.Quadratic(), [0, 1]), network.config)
        >>> rule = Rule(network.config, network.flat_weights().detach())
        >>> window = TruncatedBackpropagation(rule).prepare(trajectory, 5)
        >>> window().gradient.shape == rule.weights.shape, trajectory.steps_done
        (True, 5)
    """

    rule: Rule
    objective: str = "sum"
    weights: Tensor | None = None
    coordinates: int | None = None
    capturable = True

    def prepare(self, trajectory: Trajectory, length: int) -> Callable[[], Estimate]:
        return partial(
            window_, trajectory, self.rule, trajectory.next(length), length, objective=self.objective,
            weights=_first(self.weights, length), coordinates=self.coordinates,
        )  # fmt: skip


@dataclass(frozen=True)
class SecondDerivatives:
    """The gradient with the inner gradients' dependence on theta kept: the paper's slower option, all by autograd.

    Args:
        rule, objective, weights: as :class:`TruncatedBackpropagation` has them.
    """

    rule: Rule
    objective: str = "sum"
    weights: Tensor | None = None
    capturable = False

    def prepare(self, trajectory: Trajectory, length: int) -> Callable[[], Estimate]:
        return partial(self._window, trajectory, length)

    def _window(self, trajectory: Trajectory, length: int) -> Estimate:
        rule = self.rule
        phi = rule.weights.detach().requires_grad_()
        theta, grad, state = trajectory.theta, trajectory.grad, trajectory.state.view(trajectory.theta.numel(), -1)
        losses = []
        with torch.enable_grad():
            for t in range(length):
                step = trajectory.steps_done + t + 1
                updates, state = ops.lstm_unroll(grad.reshape(1, -1), state, phi, rule.config, step)
                updates = updates.view_as(theta)
                if rule.update_rms is not None:
                    updates = normalize.scale_rows(updates, trajectory.sizes, rule.update_rms)
                lr = rule.lr * trajectory.rate(step - 1)
                theta = (1 - lr * rule.weight_decay) * theta + lr * updates
                loss, grad = trajectory.evaluate(theta, create_graph=True)
                losses.append(loss)
            losses, weights = torch.stack(losses), _first(self.weights, length)
            meta_loss, _ = loss_weights(self.objective, losses, trajectory.first_losses, weights)
            (gradient,) = torch.autograd.grad(meta_loss, phi)
        with torch.no_grad():
            trajectory.theta.copy_(theta)
            trajectory.grad.copy_(grad)
            trajectory.losses.copy_(losses[-1])
            trajectory.state.view(trajectory.theta.numel(), -1).copy_(state)
            trajectory.step += length
        trajectory.steps_done += length
        return Estimate(meta_loss.detach(), gradient)


@dataclass(frozen=True)
class Imitation:
    """A hand-designed optimizer leads, and the network fits its moves (Chen et al. 2020).

    L = 1 / (2 n) * sum_t ||lr * u[t] - lr * weight_decay * theta[t] - move_teacher[t]||^2 over n = B * N coordinates

    Args:
        rule: the optimizer that learns.
        teacher: an optimizer of the trajectory's ``theta``.
    """

    rule: Rule
    teacher: torch.optim.Optimizer
    capturable = False

    def prepare(self, trajectory: Trajectory, length: int) -> Callable[[], Estimate]:
        return partial(self._window, trajectory, length)

    def _window(self, trajectory: Trajectory, length: int) -> Estimate:
        rule, size, theta = self.rule, trajectory.theta.numel(), trajectory.theta
        evaluate, batches = trajectory.evaluator(), trajectory.next(length)
        grads = theta.new_empty(length + 1, *theta.shape)
        grads[0] = trajectory.grad
        moves = theta.new_empty(length, *theta.shape)
        rates = (rule.lr * trajectory.rates[:length])[:, None, None]
        inputs = torch.empty_like(moves)
        for t in range(length):
            before = theta.clone()
            inputs[t] = trajectory.relative_(grads[t], rule, trajectory.step + t + 1)
            theta.grad = grads[t]
            self.teacher.step()
            moves[t] = theta - before + rates[t] * rule.weight_decay * before  # what lr * u should be
            trajectory.losses.copy_(evaluate(at(batches, t), grads[t + 1]))
        trajectory.grad.copy_(grads[length])
        with torch.no_grad():
            step = trajectory.step + 1
            first_state, flat = trajectory.state.view(size, -1), inputs.view(length, size)
            updates, last_state = ops.lstm_unroll(flat, first_state, rule.weights, rule.config, step)
            if rule.update_rms is not None:
                raw, sizes = updates.view_as(moves), trajectory.sizes
                updates = normalize.scale_rows(raw, sizes, rule.update_rms).view(length, size)
            rates = rates.view(length, 1)
            error = rates * updates - moves.view(length, size)
            d_updates = rates * error / size
            if rule.update_rms is not None:
                d_updates = normalize.scale_rows_backward(d_updates.view_as(moves), raw, sizes, rule.update_rms)
                d_updates = d_updates.view(length, size)
            *_, gradient = ops.lstm_unroll_backward(d_updates, None, flat, first_state, rule.weights, rule.config, step)
            first_state.copy_(last_state)
            trajectory.step += length
        return Estimate(error.square().sum() / (2 * size), gradient)


def estimator(options: TrainerOptions, rule: Rule) -> Estimator:
    """The one that options ask for, of trajectories that the network itself leads."""
    weights = options.loss_weights
    if weights is not None:
        weights = torch.tensor(weights, dtype=rule.weights.dtype, device=rule.weights.device)
    if options.second_derivatives:
        return SecondDerivatives(rule, options.objective, weights)
    return TruncatedBackpropagation(rule, options.objective, weights, options.coordinates)


def _first(weights: Tensor | None, length: int) -> Tensor | None:
    """Those of a window that the horizon cuts short."""
    return None if weights is None else weights[:length]
