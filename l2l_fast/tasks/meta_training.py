"""Meta-training as a task: the optimizee is itself an optimizer, a small network of the gradient."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils._pytree import tree_map

from l2l_fast.checks import is_number, require, whole
from l2l_fast.mlp import BETA, FEATURES, features
from l2l_fast.tasks.base import Batch, Instances, Params, Task, batched, unflatten
from l2l_fast.tasks.base import half as to_half
from l2l_fast.tasks.registry import get


class MetaTraining:
    r"""Training the weights phi of a coordinatewise MLP optimizer by the losses that it leads another task to.

    L(phi) = 1/(T B) sum_{t=1..T} sum_{i=1..B} f_i(theta_i[t]),   theta_i[t+1] = theta_i[t] + s MLP_phi(z_i[t])

    z are "both" features of :class:`~l2l_fast.CoordinatewiseLSTM`: moments and log_sign of the gradient of f_i at
    theta_i[t]. The MLP has one hidden layer of tanh units. An LSTM that learns on this task is the third network of
    three: it updates phi, and phi updates theta.

    As in :class:`~l2l_fast.MetaTrainer` the dependence of an inner gradient on phi is left out unless it is asked for,
    so that dL/dphi needs no second derivative of f.

    Args:
        task: what phi learns to optimize, a task or its name.
        hidden: units of the MLP.
        unroll: T, steps of phi from a fresh start.
        instances: B, of ``task``, side by side; every step of the outer optimizer draws others.
        output_scale: s.
        second_derivatives: keep the gradients' dependence on theta, and so on phi; ``task`` must be twice
            differentiable.
        name: what tables call it; None calls it "meta-" and the name of ``task``.

    Raises:
        ValueError: an option out of its range, or a task that is none; the message names it.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> task, generator = l2l.tasks.MetaTraining("quadratic", unroll=5), torch.Generator().manual_seed(0)
        >>> task.loss(task.init(generator), task.sample(generator)).shape
        torch.Size([])
        >>> sum(param.numel() for param in task.init(generator).values())
        49

    References:
        Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474; an MLP as the rule: Metz et al. 2019,
        https://arxiv.org/abs/1810.10180.
    """

    resample = True  # other inner instances at every step

    def __init__(
        self,
        task: Task | str = "quadratic",
        hidden: int = 8,
        *,
        unroll: int = 20,
        instances: int = 8,
        output_scale: float = 0.1,
        second_derivatives: bool = False,
        name: str | None = None,
    ) -> None:
        if isinstance(task, str):
            task = get(task)
        require(isinstance(task, Task), "task", task, "a task or the name of one")
        require(is_number(output_scale) and output_scale > 0, "output_scale", output_scale, "a positive number")
        self.task, self.hidden = task, whole("hidden", hidden, 1)
        self.unroll, self.instances = whole("unroll", unroll, 1), whole("instances", instances, 1)
        self.output_scale, self.second_derivatives = output_scale, second_derivatives
        self.name = name or f"meta-{task.name}"

    @property
    def vmap(self) -> bool:
        """Whether ``torch.vmap`` can batch the inner task's loss, and so this one's."""
        return getattr(self.task, "vmap", True)

    def with_half(self, half: str) -> MetaTraining:
        """The same, phi learning on ``half`` of the inner task's data if that has halves."""
        other = copy.copy(self)
        other.task = to_half(self.task, half)
        return other

    def init(self, generator: torch.Generator) -> Params:
        """A freshly drawn MLP, as ``torch.nn.Linear`` starts, but for a zero head bias: no drift at the start.

        Args:
            generator: of the CPU; all randomness comes from it.

        Returns:
            float32 ``hidden.weight`` [H, 4], ``hidden.bias`` [H, 1], ``head.weight`` [1, H] and ``head.bias`` [1, 1].
        """

        def uniform(rows: int, columns: int, inputs: int) -> Tensor:
            empty = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
            return empty.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)

        return {
            "hidden.weight": uniform(self.hidden, FEATURES, FEATURES),
            "hidden.bias": uniform(self.hidden, 1, FEATURES),
            "head.weight": uniform(1, self.hidden, self.hidden),
            "head.bias": torch.zeros(1, 1, dtype=torch.float32, device="cpu"),
        }

    def sample(self, generator: torch.Generator) -> tuple[Params, Batch]:
        """B fresh starts [B, ...] by name and their batches, leaves [T + 1, B, ...], or [1, B, ...] of fixed functions.

        Float32 as the inner task gives them, from a generator of the CPU.
        """
        seeds = torch.randint(2**62, (self.instances,), generator=generator, dtype=torch.int64, device="cpu")
        inner = Instances(self.task, seeds.tolist())
        batches = inner.draws(self.unroll + 1 if self.task.resample else 1)
        return inner.unflatten(inner.start()), batches

    def loss(self, params: Params, batch: tuple[Params, Batch]) -> Tensor:
        """Mean loss of the inner task after each of T steps of the MLP.

        Args:
            params: those of :meth:`init`.
            batch: what :meth:`sample` gives, floating-point leaves of the dtype of ``params``, on their device.

        Returns:
            0-dim, of that dtype; where ``second_derivatives`` is False its derivative is the first-order one.
        """
        starts, batches = batch
        shapes = {name: start.shape[1:] for name, start in starts.items()}
        theta = torch.cat([start.flatten(1) for start in starts.values()], dim=1)
        m = v = torch.zeros_like(theta)
        total, decay = 0.0, 1.0
        for t in range(self.unroll + 1):
            now = tree_map(lambda leaf, t=t: leaf[t if self.task.resample else 0], batches)
            loss, grad = self._evaluate(theta, shapes, now)
            if t > 0:  # the start's loss owes nothing to phi
                total = total + loss
            if t < self.unroll:
                m, v, decay = m.lerp(grad, 1 - BETA), v.lerp(grad * grad, 1 - BETA), decay * BETA
                theta = theta + self._update(params, grad, m / (1 - decay), v / (1 - decay))
        return total / (self.unroll * self.instances)

    def _evaluate(self, theta: Tensor, shapes: dict[str, torch.Size], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the B losses at theta [B, N], and the gradient [B, N]."""

        def losses(theta: Tensor) -> Tensor:
            return batched(self.task, self.task.loss)(unflatten(theta, shapes), batch).sum()

        if self.second_derivatives:
            grad, loss = grad_and_value(losses)(theta)
            return loss, grad
        # The gradient is all that a loss passes back to theta, so there need be no graph through the task.
        point = theta.detach()
        grad, loss = grad_and_value(losses)(point)
        return loss + (grad * (theta - point)).sum(), grad

    def _update(self, params: Params, grad: Tensor, m: Tensor, v: Tensor) -> Tensor:
        """The update s MLP(z) of every coordinate; the moments are bias-corrected."""
        z = torch.stack(features(grad, m, v)).flatten(1)
        h = (params["hidden.weight"] @ z + params["hidden.bias"]).tanh()
        return self.output_scale * (params["head.weight"] @ h + params["head.bias"]).view_as(grad)
