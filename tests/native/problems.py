"""Networks, weights, gradients and states for the parity tests."""

import torch

from l2l_fast import ops, reference
from l2l_fast.reference import Config

PAPER = Config("log_sign", 20, 2, False, "linear", 0.1, 10.0, 0.95, 0.95, 1e-8)
RNNPROP = Config("moments", 20, 2, True, "tanh", 0.1, 10.0, 0.95, 0.95, 1e-8)
LINEAR = Config("both", 20, 2, False, "linear", 0.1, 10.0, 0.95, 0.95, 1e-8, linear_path=True)


def make_weights(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = config.hidden_size**-0.5
    return torch.empty(reference.num_weights(config), dtype=dtype).uniform_(-size, size, generator=generator)


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
    if reference.has_moments(config):
        state[:, 1].abs_()
        if fresh:
            state[::5, :2] = 0
    return state
