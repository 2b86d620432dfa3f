"""The cases that kernels of every backend are held to the float64 reference with."""

import itertools

import overflow
import torch

from l2l_fast import ops, reference
from l2l_fast.config import Config, has_moments, num_weights

PAPER = Config("log_sign", 20, 2, False, "linear", 0.1, 10.0, 0.95, 0.95, 1e-8)
RNNPROP = Config("moments", 20, 2, True, "tanh", 0.1, 10.0, 0.95, 0.95, 1e-8)
LINEAR = Config("both", 20, 2, False, "linear", 0.1, 10.0, 0.95, 0.95, 1e-8, linear_path=True)
IDENTITY = overflow.CONFIG._replace(features="identity", hidden_size=20)

LAYOUTS = {
    "transposed": lambda: torch.randn(9, 11).t(),
    "channels_last": lambda: torch.randn(3, 5, 4, 6).to(memory_format=torch.channels_last),
    "every_other": lambda: torch.randn(200)[::2],
    "column": lambda: torch.randn(40, 3)[:, 1],
    "window": lambda: torch.randn(12, 14)[2:9, 3:11],
    "scalar": lambda: torch.randn(()),
    "permuted": lambda: torch.randn(4, 5, 6, 3).permute(2, 0, 3, 1),
}


def config_id(config: Config) -> str:
    projection = "-projection" * config.projection
    linear = "-linear_path" * config.linear_path
    return f"{config.features}-{config.hidden_size}x{config.num_layers}{projection}{linear}-{config.output}"


CONFIGS = [
    Config(features, hidden, layers, projection, output, 0.1, 10.0, 0.95, 0.95, 1e-8, linear_path)
    for features, (hidden, layers, linear_path), projection, output in itertools.product(
        ["identity", "log_sign", "moments", "both"],
        [(1, 1, False), (1, 1, True), (7, 3, False), (7, 3, True), (20, 2, False), (20, 2, True), (64, 1, False)],
        [False, True],
        ["linear", "tanh"],
    )
]


def make_weights(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = config.hidden_size**-0.5
    return torch.empty(num_weights(config), dtype=dtype).uniform_(-size, size, generator=generator)


def make_grads(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gradients of every magnitude from 1e-8 to 1e2, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.pow(10.0, torch.empty(shape, dtype=torch.float64).uniform_(-8, 2, generator=generator))
    sign = torch.randint(-1, 2, shape, generator=generator)
    return (magnitude * sign).to(dtype)


def make_state(
    count: int, config: Config, seed: int = 2, dtype: torch.dtype = torch.float32, *, fresh: bool = True
) -> torch.Tensor:
    """A state [count, S] such as a run might have reached, laid out as new_state does.

    Where ``fresh``, every fifth coordinate had no gradient so far. Its first one, g, enters as g / |g|, so the terms
    of the derivatives in g and v cancel, by factors of up to 1e8 and by more in some directions than in others.
    """
    generator = torch.Generator().manual_seed(seed)
    state = ops.new_state(torch.empty(count), config, dtype)
    state.copy_(torch.empty(state.shape).uniform_(-0.9, 0.9, generator=generator))
    if has_moments(config):
        state[:, 1].abs_()
        if fresh:
            state[::5, :2] = 0
    return state


def step_both(params, grads, states, config, *, lr=0.7, number=3, weights=None, **options):
    """Runs the CPU kernel in place, and the reference on float64 copies; returns the copies (params, states)."""
    weights = make_weights(config) if weights is None else weights
    expected = [p.double().clone() for p in params], [s.double().clone() for s in states]
    steps = [torch.tensor(float(number)) for _ in params]
    reference.lstm_step_(
        expected[0], [g.double() for g in grads], expected[1], weights.double(), torch.tensor(lr, dtype=torch.float64),
        steps, *config, options.get("weight_decay", 0.0), options.get("maximize", False),
    )  # fmt: skip
    ops.lstm_step_(params, grads, states, weights, torch.tensor(lr), steps, config, **options)
    return expected


def close(actual, expected, rtol=2e-5, atol=2e-6):
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)
