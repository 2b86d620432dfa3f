"""What people use today, in our own words: the same learned optimizer in plain PyTorch, and torch.optim's own.

Each has the weights of the network it is given and makes the same updates (tests/bench/test_rivals.py). Where public
code differs, the faster habit is taken: no boolean masks, gradients by ``autograd.grad``, one graph for all instances.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from l2l_fast import CoordinatewiseLSTM, reference
from l2l_fast.config import split_weights, state_size
from l2l_fast.tasks import Instances


def log_sign(grad: Tensor, p: float) -> Tensor:
    """Features [n, 2] of gradients [n]."""
    size, threshold = grad.abs(), math.exp(-p)
    large = size >= threshold
    log = torch.where(large, size.clamp(min=threshold).log() / p, -1.0)
    return torch.stack([log, torch.where(large, grad.sign(), grad * math.exp(p))], dim=1)


# ---------------------------------------------------------------- one move: (grad [n], state) -> (update [n], state)


class Cells(nn.Module):
    """Two ``nn.LSTMCell`` and a linear head: what public implementations of the paper are made of."""

    def __init__(self, network: CoordinatewiseLSTM) -> None:
        super().__init__()
        flat, self.config = network.flat_weights().detach(), network.config
        weights, self.device = split_weights(flat, self.config), flat.device
        self.cells = nn.ModuleList()
        for layer in range(self.config.num_layers):
            inputs = weights[f"weight_ih_l{layer}"].shape[1]
            self.cells.append(nn.LSTMCell(inputs, self.config.hidden_size))
            self.cells[-1].load_state_dict(
                {name: weights[f"{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            )
        self.head = nn.Linear(self.config.hidden_size, 1)
        self.head.load_state_dict({"weight": weights["head.weight"], "bias": weights["head.bias"]})
        self.to(self.device)

    def new_state(self, size: int) -> list:
        shape = (size, self.config.hidden_size)
        return [(torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device)) for _ in self.cells]

    def forward(self, grad: Tensor, state: list) -> tuple[Tensor, list]:
        x, new_state = log_sign(grad, self.config.preprocess_p), []
        for cell, held in zip(self.cells, state, strict=True):
            new_state.append(cell(x, held))
            x = new_state[-1][0]
        return self.config.output_scale * self.head(x).squeeze(1), new_state


class Sequence(nn.Module):
    """``nn.LSTM`` on sequences of length one, coordinates in the batch."""

    def __init__(self, network: CoordinatewiseLSTM) -> None:
        super().__init__()
        self.config = config = network.config
        self.lstm, self.head = nn.LSTM(2, config.hidden_size, config.num_layers), nn.Linear(config.hidden_size, 1)
        flat = network.flat_weights().detach()
        weights, self.device = split_weights(flat, config), flat.device
        self.lstm.load_state_dict({name: weights[name] for name in self.lstm.state_dict()})
        self.head.load_state_dict({"weight": weights["head.weight"], "bias": weights["head.bias"]})
        self.to(self.device)

    def new_state(self, size: int) -> tuple[Tensor, Tensor]:
        shape = (self.config.num_layers, size, self.config.hidden_size)
        return torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device)

    def forward(self, grad: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, state = self.lstm(log_sign(grad, self.config.preprocess_p)[None], state)
        return self.config.output_scale * self.head(x[0]).squeeze(1), state


class Compiled(nn.Module):
    """``torch.compile`` of the reference cell, state [S, n]."""

    def __init__(self, network: CoordinatewiseLSTM, **options) -> None:
        super().__init__()
        self.config = network.config
        self.flat = nn.Parameter(network.flat_weights().detach().clone())
        torch._dynamo.reset()  # code is generated for one number of threads: nothing of another row's is used again
        self.move = torch.compile(
            partial(_reference_move, self.config), dynamic=False, options={"fx_graph_cache": False, **options}
        )
        self.first_step = torch.ones((), device=self.flat.device)

    def new_state(self, size: int) -> Tensor:
        return torch.zeros(state_size(self.config), size, device=self.flat.device)

    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.move(grad, state, self.first_step, self.flat)


def _reference_move(config, grad: Tensor, state: Tensor, step: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    return reference.cell(grad, state, step, split_weights(flat, config), config)


# ---------------------------------------------------------------- steps


class TensorByTensor:
    """An optimizer that goes through its tensors in Python, as public implementations do."""

    def __init__(self, move: nn.Module, params: list[Tensor]) -> None:
        self.move, self.params = move, params
        self.state = [move.new_state(param.numel()) for param in params]

    @torch.no_grad()
    def step(self) -> None:
        for index, param in enumerate(self.params):
            update, self.state[index] = self.move(param.grad.reshape(-1), self.state[index])
            param.add_(update.view(param.shape))


class AllInOne:
    """An optimizer that joins its tensors first, so that one compiled graph serves them all."""

    def __init__(self, move: nn.Module, params: list[Tensor]) -> None:
        self.move, self.params = move, params
        self.sizes = [param.numel() for param in params]
        self.state = move.new_state(sum(self.sizes))

    @torch.no_grad()
    def step(self) -> None:
        grads = [param.grad.reshape(-1) for param in self.params]
        update, self.state = self.move(grads[0] if len(grads) == 1 else torch.cat(grads), self.state)
        pieces = update.split(self.sizes)
        torch._foreach_add_(
            self.params, [piece.view(param.shape) for piece, param in zip(pieces, self.params, strict=True)]
        )


LEARNED = {
    "nn.LSTMCell": lambda network, params: TensorByTensor(Cells(network), params),
    "nn.LSTM": lambda network, params: TensorByTensor(Sequence(network), params),
    "torch.compile": lambda network, params: AllInOne(Compiled(network), params),
}
# On a GPU alone. The graphs of "max-autotune" itself would overwrite the state that goes from step to step.
TUNED = {
    "torch.compile max-autotune": lambda network, params: AllInOne(
        Compiled(network, max_autotune=True, coordinate_descent_tuning=True), params
    ),
}
_STYLES = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}
HAND_DESIGNED = tuple(
    f"{name} {style}"
    for name in ("Adam", "RMSprop", "SGD")
    for style in _STYLES
    if (name, style) != ("RMSprop", "fused")  # torch has none
)


def hand_designed(way: str, params, **more) -> torch.optim.Optimizer:
    """torch.optim's, by a name such as "Adam fused"."""
    name, style = way.split()
    options = {**_STYLES[style], **more}
    if name == "RMSprop":
        del options["fused"]
    return getattr(torch.optim, name)(params, lr=1e-4, **options)


# ---------------------------------------------------------------- meta-gradients


def meta_gradient(move: nn.Module, grads: Tensor) -> Tensor:
    """Autograd through the unroll, gradients detached, for the losses f_t(theta) = <grads[t], theta>, t = 1 .. T.

    Args:
        move: :class:`Cells` or :class:`Compiled`.
        grads: [T + 1, N]; the first T feed the network, the last T are the losses' gradients.
    """
    size = grads.shape[1]
    theta, state, total = torch.zeros(size, device=grads.device), move.new_state(size), 0.0
    for t in range(len(grads) - 1):
        update, state = move(grads[t], state)
        theta = theta + update
        total = total + torch.dot(grads[t + 1], theta)
    found = torch.autograd.grad(total, list(move.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in found])


class MetaUpdate:
    """Meta-training with a graph through every window: what a plain PyTorch implementation does.

    Args:
        network: starting weights.
        task: the optimizee.
        instances: side by side.
        unroll, horizon: steps a window and a trajectory.
    """

    def __init__(self, network, task, instances: int, unroll: int = 20, horizon: int = 100) -> None:
        self.cells, self.task, self.count, self.unroll, self.horizon = Cells(network), task, instances, unroll, horizon
        self.optimizer = torch.optim.Adam(self.cells.parameters(), lr=3e-3)
        self.started = 0
        self._start()

    def _start(self) -> None:
        seeds = range(self.started, self.started + self.count)
        self.instances = Instances(self.task, seeds, self.cells.device)
        self.started, self.steps_done = self.started + self.count, 0
        self.theta = self.instances.start()
        self.state = self.cells.new_state(self.theta.numel())
        self.grad = self.instances.evaluate(self.theta, self.instances.draw())[1]

    def gradient_(self) -> None:
        """One window; leaves the meta-gradient in the cells' parameters."""
        theta, state, grad, total = self.theta, self.state, self.grad, 0.0
        for _ in range(self.unroll):
            update, state = self.cells(grad.reshape(-1), state)
            theta = theta + update.view_as(theta)
            loss = self.instances.losses(self.instances.unflatten(theta), self.instances.draw()).sum()
            (grad,) = torch.autograd.grad(loss, theta, retain_graph=True)
            total = total + loss / self.count
        self.optimizer.zero_grad()
        total.backward()
        self.theta, self.grad = theta.detach(), grad.detach()
        self.state = [(h.detach(), c.detach()) for h, c in state]
        self.steps_done += self.unroll

    def step(self) -> None:
        self.gradient_()
        nn.utils.clip_grad_norm_(self.cells.parameters(), 1.0)
        self.optimizer.step()
        if self.steps_done >= self.horizon:
            self._start()
