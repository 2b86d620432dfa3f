r"""Trajectories of an MLP whose weights an LSTM changes on the way, and gradients of what they lead to.

With phi[t] = phi_0 + delta[t], z[t] what the MLP sees of grad f(theta[t]), and delta[0] = 0:

    theta[t+1] = theta[t] + u(z[t]; phi[t])
    h[t+1] = (du(z[t]; phi[t]) / dphi)^T grad f(theta[t+1])
    delta[t+1] = delta[t] + LSTM_psi(h[1] .. h[t+1])

The meta-loss is L = sum_t w[t] f_t(theta[t]), t = 1 .. T. As in :mod:`l2l_fast.meta.unroll`, gradients count as
constants, and so do the hypergradients h, which the LSTM sees in the place of gradients. Then phi[t] reaches L through
the updates u[t], u[t+1], ... alone, and no graph is needed:

    dL/du[t] = sum_{s>t} w[s] grad f_s(theta[s]),   D[t] = (du[t]/dphi)^T dL/du[t],   dL/dphi[t] = sum_{s>=t} D[s]

dL/dphi_0 is that sum at the window's start, wherever on the trajectory it stands; the LSTM's update after step t has
the gradient dL/dphi[t+1], and ``lstm_unroll_backward`` makes dL/dpsi of these. What this leaves out, perturbations do
not: :class:`Perturbations` runs forward alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from l2l_fast import mlp, ops
from l2l_fast.adaptive import AdaptiveMLP
from l2l_fast.meta import seeds
from l2l_fast.meta.unroll import Estimate, at, loss_weights, suffix_sums
from l2l_fast.tasks import Instances
from l2l_fast.tasks.base import Batch, batched

_KEPT = ("theta", "grad", "m", "v", "delta", "losses", "first_losses", "noise", "scaling")


class OnlineTrajectory:
    """B instances of a task on their way, each moved by C copies of the network, whose weights may differ.

    Copy c of instance i is row c * B + i. All copies have the instance's start and batches.

    Args:
        instances: the B optimizees.
        network: whose options say what is computed; its weights are given to :func:`advance_`.
        scaling: optional [B, N] factors c: the optimizer sees theta / c and minimises f(c * theta).
        copies: C.
        dtype: of parameters and state.
    """

    def __init__(
        self, instances: Instances, network: AdaptiveMLP, scaling: Tensor | None = None, copies: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.instances, self.network, self.copies = instances, network, copies
        self.scaling = None if scaling is None else scaling.to(dtype).repeat(copies, 1)
        theta = instances.start().to(dtype).repeat(copies, 1)
        self.theta = theta if scaling is None else theta / self.scaling
        self.grad, self.m, self.v = (torch.zeros_like(self.theta) for _ in range(3))
        self.delta = theta.new_zeros(copies, len(instances.generators), network.mlp_weights)
        config = network.lstm.config
        self.states = [ops.new_state(delta, config, dtype) for delta in self.delta]  # in the layout of the kernels
        self.noise = theta.new_zeros(0)  # what :class:`Perturbations` has added up
        self.steps_done = 0
        self._batches = tree_map(lambda leaf: leaf[0], instances.draws(1))
        self.losses = self.evaluate(self._batches, self.grad)
        self.first_losses = self.losses.clone()

    def next(self, length: int) -> Batch:
        """The batches of the next steps, leaves [length, B, ...]."""
        self.steps_done += length
        return self.instances.draws(length)

    def evaluate(self, batch: Batch, out: Tensor) -> Tensor:
        """Losses [C * B] at theta, and gradients in ``out``, [C * B, N]."""
        point = self.theta if self.scaling is None else self.theta * self.scaling
        leaves = self.instances.leaves(point)
        if self.copies == 1:
            losses = self.instances.gradients(leaves, batch, out)
        else:
            task = self.instances.task
            rows = tree_map(lambda leaf: leaf.repeat(self.copies, *[1] * (leaf.ndim - 1)), batch)
            with torch.enable_grad():
                losses = batched(task, task.loss)(leaves, rows)
                grads = torch.autograd.grad(losses, list(leaves.values()), torch.ones_like(losses))
            torch.cat([grad.reshape(len(grad), -1) for grad in grads], dim=1, out=out)
        if self.scaling is not None:
            out.mul_(self.scaling)
        return losses.detach()

    def state_dict(self) -> dict:
        tensors = {name: getattr(self, name) for name in _KEPT}
        place = {"steps_done": self.steps_done, "instances": self.instances.state_dict()}
        return {**tensors, "states": torch.stack(self.states), **place}

    def load_state_dict(self, saved: dict) -> None:
        self.instances.load_state_dict(saved["instances"])
        self.steps_done = saved["steps_done"]
        for state, held in zip(self.states, saved["states"], strict=True):
            state.copy_(held)
        for name in _KEPT:
            tensor = saved[name]
            setattr(self, name, None if tensor is None else tensor.to(self.theta, copy=True))


@dataclass
class Record:
    """What :func:`advance_` leaves of a window for the gradient, a list of T each."""

    points: list[mlp.Point] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    phi: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)  # at theta[1] .. theta[T]
    hypergradients: list[Tensor] = field(default_factory=list)  # h[1] .. h[T]


@torch.no_grad()
def advance_(trajectory: OnlineTrajectory, weights: Tensor, batches: Batch, length: int,
             record: Record | None = None, adapt: bool = True) -> Tensor:  # fmt: skip
    """Steps of all copies, each followed by the loss, the gradient, and the LSTM's update of phi.

    Args:
        trajectory: moved on in place.
        weights: of the copies' networks, [C, W], phi_0 first.
        batches: of T steps, from ``trajectory.next(T)``.
        length: T.
        record: takes what the gradient needs.
        adapt: False leaves phi as it is.

    Returns:
        losses [T, C * B].
    """
    network, size, first = trajectory.network, trajectory.network.mlp_weights, trajectory.steps_done - length
    copies, instances, _ = trajectory.delta.shape
    starts = weights[:, None, :size].expand(copies, instances, size).flatten(0, 1)
    scale, config, losses = network.mlp.output_scale, network.lstm.config, []
    one = torch.ones((), dtype=weights.dtype, device=weights.device)
    for t in range(length):
        phi = starts + trajectory.delta.flatten(0, 1)
        point = mlp.observe_(trajectory.grad, trajectory.m, trajectory.v, first + t + 1)
        u, hidden = mlp.update(phi, point, scale)
        trajectory.theta += u
        grad = torch.empty_like(trajectory.grad)
        losses.append(trajectory.evaluate(at(batches, t), grad))
        if adapt:
            h = mlp.pull_back(phi, point, hidden, grad, scale)
            number = torch.full((), first + t + 1, dtype=torch.float32, device=weights.device)
            for delta, seen, state, row in zip(
                trajectory.delta, h.view_as(trajectory.delta), trajectory.states, weights, strict=True
            ):
                ops.lstm_step_([delta], [seen], [state], row[size:].contiguous(), one, [number], config)
        if record is not None:
            record.points.append(point)
            record.hidden.append(hidden)
            record.phi.append(phi)
            record.grads.append(grad)
            record.hypergradients.append(h)
        trajectory.grad = grad
    trajectory.losses = losses[-1]
    return torch.stack(losses)


@dataclass(frozen=True)
class OnlineBackpropagation:
    """The first-order gradient of a window; the head of this file derives it.

    Args:
        objective: "sum", "relative" or "log".

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.meta.online import OnlineBackpropagation, OnlineTrajectory
        >>> network = l2l.AdaptiveMLP()
        >>> trajectory = OnlineTrajectory(l2l.tasks.Instances(l2l.tasks.Quadratic(), [0, 1]), network)
        >>> estimate = OnlineBackpropagation().window(trajectory, network.flat_weights().detach(), 5)
        >>> estimate.gradient.shape == network.flat_weights().shape, trajectory.steps_done
        (True, 5)
    """

    objective: str = "sum"
    copies = 1

    @torch.no_grad()
    def window(self, trajectory: OnlineTrajectory, weights: Tensor, length: int) -> Estimate:
        """Goes on along a trajectory of one copy and differentiates.

        Args:
            trajectory: moved on in place.
            weights: [W], phi_0 first.
            length: T.
        """
        network, record, size = trajectory.network, Record(), trajectory.network.mlp_weights
        state, number = trajectory.states[0].clone(), trajectory.steps_done + 1
        losses = advance_(trajectory, weights[None], trajectory.next(length), length, record)
        meta_loss, d_losses = loss_weights(self.objective, losses, trajectory.first_losses)
        d_updates = suffix_sums(torch.stack(record.grads), d_losses)
        parts = [
            mlp.pull_back(phi, point, hidden, d_update, network.mlp.output_scale)
            for phi, point, hidden, d_update in zip(record.phi, record.points, record.hidden, d_updates, strict=True)
        ]
        d_phi = torch.stack(parts).flip(0).cumsum(0).flip(0)  # dL/dphi[t], t = 0 .. T-1, [T, B, P]
        d_deltas = torch.cat([d_phi[1:], torch.zeros_like(d_phi[:1])]).flatten(1)  # after the last nothing follows
        seen = torch.stack(record.hypergradients).flatten(1)
        *_, d_lstm = ops.lstm_unroll_backward(
            d_deltas,
            None,
            seen,
            state.view(seen.shape[1], -1),
            weights[size:].contiguous(),
            network.lstm.config,
            number,
        )
        return Estimate(meta_loss, torch.cat([d_phi[0].sum(0), d_lstm]))


@dataclass(frozen=True)
class Perturbations:
    r"""The gradient from forward runs alone, of weights perturbed to both sides.

    g = 1/(2 sigma^2 K) sum_k (L(phi + e_k) - L(phi - e_k)) a_k,   e_k ~ N(0, sigma^2)

    a_k is e_k (evolution strategies), or, ``persistent``, the sum of all e_k along the trajectory so far, whose state
    each perturbed copy keeps: then windows of any length leave no bias of truncation (Vicol et al. 2021). Nothing
    counts as a constant here.

    Args:
        objective: "sum", "relative" or "log".
        pairs: K.
        sigma: their standard deviation.
        persistent: whether to add the perturbations up.
        seed: of the perturbations, which follow from it, the first instance and the step.

    References:
        Vicol et al. 2021, https://arxiv.org/abs/2112.13835.
    """

    objective: str = "sum"
    pairs: int = 4
    sigma: float = 0.01
    persistent: bool = True
    seed: int = 0

    @property
    def copies(self) -> int:
        return 2 * self.pairs

    @torch.no_grad()
    def window(self, trajectory: OnlineTrajectory, weights: Tensor, length: int) -> Estimate:
        """Goes on along a trajectory of 2 K copies: those of phi + e first. The loss is the mean over them."""
        instance = trajectory.instances.generators[0].initial_seed()
        generator = seeds.generator(self.seed, instance, trajectory.steps_done)
        noise = torch.randn(self.pairs, len(weights), generator=generator, dtype=torch.float32, device="cpu")
        noise = self.sigma * noise.to(weights)
        if not self.persistent:  # all copies go on from one place, that of the first
            self._gather(trajectory)
        copies = torch.cat([weights + noise, weights - noise])
        losses = advance_(trajectory, copies, trajectory.next(length), length).view(length, 2, self.pairs, -1)
        first = trajectory.first_losses.view(2, self.pairs, -1)
        values = torch.stack([
            loss_weights(self.objective, losses[:, side, k], first[side, k])[0]
            for side in range(2) for k in range(self.pairs)
        ]).view(2, self.pairs)  # fmt: skip
        if self.persistent:
            trajectory.noise = noise = noise if trajectory.steps_done == length else trajectory.noise + noise
        gradient = ((values[0] - values[1])[:, None] * noise).mean(0) / (2 * self.sigma**2)
        return Estimate(values.mean(), gradient)

    @staticmethod
    def _gather(trajectory: OnlineTrajectory) -> None:
        for name in ("theta", "grad", "m", "v", "delta"):
            rows = getattr(trajectory, name)
            rows.copy_(rows[: len(rows) // trajectory.copies].clone().repeat(trajectory.copies, *[1] * (rows.ndim - 1)))
        for state in trajectory.states[1:]:
            state.copy_(trajectory.states[0])
