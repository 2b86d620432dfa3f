"""Estimators of the meta-gradient: how a window of a trajectory is gone through, and differentiated on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from l2l_fast import normalize, ops
from l2l_fast.config import gradient_limit
from l2l_fast.meta import seeds
from l2l_fast.meta.options import TrainerOptions
from l2l_fast.meta.unroll import (
    Estimate,
    Record,
    Rule,
    Trajectory,
    advance_,
    at,
    backpropagated,
    loss_terms,
    loss_weights,
    window_,
)
from l2l_fast.tasks.base import Batch, send


class Estimator(Protocol):
    """Goes on along a trajectory and estimates the gradient of the meta-loss with respect to the flat weights.

    Attributes:
        capturable: whether the device's part can be captured in a CUDA graph: it then works on tensors that keep their
            places, and what it needs of the host is the same in every window of one trajectory and one length.
        copies: of every instance that its trajectories have (:class:`~l2l_fast.meta.unroll.Trajectory`).
    """

    capturable: bool
    copies: int

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
        >>> rule = Rule.of(network)
        >>> window = TruncatedBackpropagation(rule).prepare(trajectory, 5)
        >>> window().gradient.shape == rule.weights.shape, trajectory.steps_done
        (True, 5)
    """

    rule: Rule
    objective: str = "sum"
    weights: Tensor | None = None
    coordinates: int | None = None
    capturable = True
    copies = 1

    def prepare(self, trajectory: Trajectory, length: int) -> Callable[[], Estimate]:
        return partial(
            window_, trajectory, self.rule, trajectory.next(length), length, objective=self.objective,
            weights=_first(self.weights, length), coordinates=self.coordinates,
        )  # fmt: skip


@dataclass(frozen=True)
class SecondDerivatives:
    """The gradient with the inner gradients' dependence on theta kept: the paper's slower option, all by autograd.

    What ``orthogonalize`` adds depends on theta as well, by way of the momentum, and so do the sizes of updates with
    ``max_update_rms``: they are differentiated with the rest.

    Args:
        rule, objective, weights: as :class:`TruncatedBackpropagation` has them.
    """

    rule: Rule
    objective: str = "sum"
    weights: Tensor | None = None
    capturable = False
    copies = 1

    def prepare(self, trajectory: Trajectory, length: int) -> Callable[[], Estimate]:
        return partial(self._window, trajectory, length)

    def _window(self, trajectory: Trajectory, length: int) -> Estimate:
        rule = self.rule
        phi = rule.weights.detach().requires_grad_()
        theta, grad, state = trajectory.theta, trajectory.grad, trajectory.state.view(trajectory.theta.numel(), -1)
        losses, slow_square = [], trajectory.slow_square
        with torch.enable_grad():
            for t in range(length):
                step = trajectory.steps_done + t + 1
                updates, state = ops.lstm_unroll(grad.reshape(1, -1), state, phi, rule.config, step)
                updates, rms, rows = updates.view_as(theta), rule.update_rms, state.view(*theta.shape, -1)
                if rule.max_update_rms is not None:
                    rms, slow_square = normalize.size_rows(
                        grad, rows[..., 0], slow_square, trajectory.step + t + 1, trajectory.sizes, rule.config,
                        rule.update_rms, rule.max_update_rms,
                    )  # fmt: skip
                if rule.orthogonalize:
                    momentum = normalize.momentum(grad, rows, rule.config, updates.dtype)
                    updates = normalize.join_rows(updates, momentum, trajectory.shapes)
                if rms is not None:
                    updates = normalize.scale_rows(updates, trajectory.sizes, rms)
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
            trajectory.slow_square.copy_(slow_square)
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
    copies = 1

    def prepare(self, trajectory: Trajectory, length: int) -> Callable[[], Estimate]:
        return partial(self._window, trajectory, length)

    def _window(self, trajectory: Trajectory, length: int) -> Estimate:
        rule, size, theta = self.rule, trajectory.theta.numel(), trajectory.theta
        evaluate, batches = trajectory.evaluator(), trajectory.next(length)
        grads = theta.new_empty(length + 1, *theta.shape)
        grads[0] = trajectory.grad
        moves = theta.new_empty(length, *theta.shape)
        rates = (rule.lr * trajectory.rates[:length])[:, None, None]
        inputs, momentum, rms = torch.empty_like(moves), trajectory.state[..., 0].clone(), rule.update_rms
        limit, sizes = gradient_limit(rule.config, rule.weights.dtype, trajectory.state.dtype), []
        for t in range(length):
            before, number = theta.clone(), trajectory.step + t + 1
            inputs[t] = x = trajectory.relative_(grads[t], rule, number)
            if rule.max_update_rms is not None:  # the state's own momentum is known after the window alone
                momentum = torch.where(x.abs() < limit, momentum.lerp(x, 1 - rule.config.beta1), momentum)
                sizes.append(trajectory.update_sizes_(x, momentum, rule, number))
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
                raw = updates.view_as(moves)
                rms = torch.stack(sizes) if sizes else rms
                updates = normalize.scale_rows(raw, trajectory.sizes, rms).view(length, size)
            rates = rates.view(length, 1)
            error = rates * updates - moves.view(length, size)
            d_updates = rates * error / size
            if rule.update_rms is not None:
                d_updates = normalize.scale_rows_backward(d_updates.view_as(moves), raw, trajectory.sizes, rms)
                d_updates = d_updates.view(length, size)
            *_, gradient = ops.lstm_unroll_backward(d_updates, None, flat, first_state, rule.weights, rule.config, step)
            first_state.copy_(last_state)
            trajectory.step += length
        return Estimate(error.square().sum() / (2 * size), gradient)


@dataclass(frozen=True)
class EvolutionStrategies:
    r"""The gradient of the meta-loss smoothed by perturbations of the weights, by differences of losses alone.

    g = 1 / (2 P sigma B) sum_{b, p} d[p, b] (L_b(phi + sigma e[p, b]) - L_b(phi - sigma e[p, b])),   e ~ N(0, I)

    ``persistent=False`` is antithetic ES: d = e, and every copy begins the window where the unperturbed network stands,
    so that what phi did before the window does not count, as in truncated backpropagation. ``persistent=True`` is PES:
    every copy goes its own way from the start of the trajectory to its end, d is the sum of its e in all windows since,
    and the sum of the windows' g is the gradient of the whole trajectory's meta-loss, without a bias of truncation; its
    variance grows with the number of windows instead.

    Nothing is differentiated, so g has what first-order backpropagation leaves out: how the gradients that the network
    is fed depend on phi. Every instance has perturbations of its own, which follow from its seed and the step. The
    meta-loss is the unperturbed network's, and NaN if a copy has diverged.

    Args:
        rule: the optimizer.
        objective, weights: as :class:`TruncatedBackpropagation` has them.
        perturbations: K = 2 P, perturbed copies of the network for each instance.
        sigma: standard deviation of the perturbations.
        persistent: PES in the place of ES.
        trains: [W], which weights are perturbed; all if None.

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.meta.estimators import EvolutionStrategies
        >>> from l2l_fast.meta.unroll import Rule, Trajectory
        >>> network = l2l.CoordinatewiseLSTM("moments", hidden_size=4, num_layers=1)
        >>> rule = Rule.of(network)
        >>> pes = EvolutionStrategies(rule, perturbations=4, persistent=True)
        >>> instances = l2l.tasks.Instances(l2l.tasks.Quadratic(), [0, 1])
        >>> trajectory = Trajectory(instances, network.config, copies=pes.copies)
        >>> pes.prepare(trajectory, 5)().gradient.shape == rule.weights.shape
        True

    References:
        Metz et al. 2019, https://arxiv.org/abs/1810.10180; PES: Vicol et al. 2021, https://arxiv.org/abs/2112.13835.
    """

    rule: Rule
    objective: str = "sum"
    weights: Tensor | None = None
    perturbations: int = 16
    sigma: float = 0.01
    persistent: bool = False
    trains: Tensor | None = None
    capturable = True

    @property
    def copies(self) -> int:
        return 1 + self.perturbations

    def prepare(self, trajectory: Trajectory, length: int) -> Callable[[], Estimate]:
        return partial(self._window, trajectory, self.next(trajectory, length), length)

    def next(self, trajectory: Trajectory, length: int) -> Batch:
        """The host's part: the window's perturbations, and its batches."""
        shape = trajectory.noise.shape[::2]
        drawn = [
            torch.randn(
                shape, generator=seeds.generator(seeds.PERTURBATION, instance.initial_seed(), trajectory.steps_done),
                dtype=torch.float32, device="cpu",
            )
            for instance in trajectory.instances.generators
        ]  # fmt: skip
        trajectory.noise.copy_(send(torch.stack(drawn, 1), trajectory.noise.device))
        if self.trains is not None:
            trajectory.noise.mul_(self.trains)
        return trajectory.next(length)

    @torch.no_grad()
    def advance_(
        self, trajectory: Trajectory, batches: Batch, length: int, record: Record | None = None
    ) -> tuple[Tensor, Estimate]:
        """The device's part: all copies go on together. Gives the losses [T, B] of the unperturbed network as well."""
        noise, phi = trajectory.noise, self.rule.weights
        if self.persistent:
            directions = trajectory.accumulated.add_(noise)
        else:
            directions = noise
            trajectory.spread_()
        moves = self.sigma * noise
        each = torch.cat([phi.expand(1, *noise.shape[1:]), phi + moves, phi - moves]).flatten(0, 1)
        grads = trajectory.grad.expand(length, -1, -1)  # each step's in the place of the one before
        losses = advance_(trajectory, replace(self.rule, weights=each), batches, grads, record)
        terms, _ = loss_terms(self.objective, losses, trajectory.first_losses, _first(self.weights, length))
        meta_losses = trajectory.by_copy(terms.sum(0) * len(trajectory.theta))
        own, up, down = meta_losses.split([1, len(noise), len(noise)])
        gradient = self.gradient(up - down, directions).mean(0)
        # Not finite where a copy's is not: such a trajectory is of no more use, though it may be finite itself.
        meta_loss = own.mean() + 0 * meta_losses.sum()
        return losses[:, : trajectory.count], Estimate(meta_loss, gradient)

    def gradient(self, differences: Tensor, directions: Tensor) -> Tensor:
        """Each instance's, [B, W], of differences L(phi + sigma e) - L(phi - sigma e) [P, B] and d [P, B, W]."""
        return torch.einsum("pb,pbw->bw", differences, directions) / (2 * self.sigma * len(directions))

    def _window(self, trajectory: Trajectory, batches: Batch, length: int) -> Estimate:
        return self.advance_(trajectory, batches, length)[1]


@dataclass(frozen=True)
class WithBackpropagation:
    """Two gradients of one window: that of :class:`EvolutionStrategies`, and that of :class:`TruncatedBackpropagation`.

    The copies and the unperturbed network, along which backpropagation runs, go on together. What is made of the two
    gradients [2, W], in this order, :mod:`l2l_fast.meta.mixtures` says.

    Args:
        perturbed: the first; its rule, objective and weights are the other's too.
        coordinates: as :class:`TruncatedBackpropagation` has it.
    """

    perturbed: EvolutionStrategies
    coordinates: int | None = None
    capturable = True

    @property
    def copies(self) -> int:
        return self.perturbed.copies

    def prepare(self, trajectory: Trajectory, length: int) -> Callable[[], Estimate]:
        return partial(self._window, trajectory, self.perturbed.next(trajectory, length), length)

    def _window(self, trajectory: Trajectory, batches: Batch, length: int) -> Estimate:
        one = self.perturbed
        record = Record(trajectory, one.rule, length)
        losses, estimate = one.advance_(trajectory, batches, length, record)
        weights = _first(one.weights, length)
        other = backpropagated(trajectory, one.rule, record, losses, one.objective, weights, self.coordinates)
        return Estimate(estimate.meta_loss, torch.stack([estimate.gradient, other.gradient]))


def estimator(options: TrainerOptions, rule: Rule, trains: Tensor | None = None) -> Estimator:
    """The one that options ask for, of trajectories that the network itself leads; ``trains`` [W] says what trains."""
    weights = options.loss_weights
    if weights is not None:
        weights = torch.tensor(weights, dtype=rule.weights.dtype, device=rule.weights.device)
    if options.second_derivatives:
        return SecondDerivatives(rule, options.objective, weights)
    if options.estimator == "backpropagation":
        return TruncatedBackpropagation(rule, options.objective, weights, options.coordinates)
    perturbed = EvolutionStrategies(
        rule, options.objective, weights, options.perturbations, options.sigma, options.estimator.startswith("pes"),
        trains,
    )  # fmt: skip
    return WithBackpropagation(perturbed, options.coordinates) if options.mixes else perturbed


def _first(weights: Tensor | None, length: int) -> Tensor | None:
    """Those of a window that the horizon cuts short."""
    return None if weights is None else weights[:length]
