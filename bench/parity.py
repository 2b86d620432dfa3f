"""No number without parity: the ops that will be timed, held to the float64 reference."""

from __future__ import annotations

import torch

import cases
from l2l_fast import arguments, ops, reference

STEPS = 3
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def size() -> int:
    """Some whole tiles and a ragged end, of the reference's on a CPU, of the kernel's for many coordinates on a GPU."""
    return 4111 if cases.device.type == "cpu" else 70_111


def check() -> list[str]:
    """What differs and by how much; nothing where all is within its tolerance."""
    found = []
    for name in cases.NETWORKS:
        network = cases.network(name)
        for state_dtype, tolerance in TOLERANCE.items():
            found += _compare(f"step, {name} network, {state_dtype} state", *_steps(network, state_dtype), tolerance)
        found += _compare(f"meta-gradient, {name} network", *_backward(network), 1e-4)
    return found


def step_error(network) -> float:
    """Of the parameters after a few steps, as a share of the largest."""
    found, expected = _steps(network, torch.float32)
    return _error(found, expected)


def _steps(network, state_dtype):
    """Parameters after a few steps, by the op and by the reference."""
    (param,) = cases.params([(size(),)])
    weights, config, found = network.flat_weights().detach(), network.config, []
    codes = arguments.codes(config)
    for kernel, dtype, held in (
        (torch.ops.l2l_fast.lstm_step_, torch.float32, state_dtype),
        (reference.lstm_step_, torch.float64, torch.float64),
    ):
        theta, state = torch.zeros_like(param, dtype=dtype), ops.new_state(param, config, held)
        for step in range(1, STEPS + 1):
            lr, count = torch.ones((), dtype=dtype, device=param.device), torch.tensor(float(step), device=param.device)
            kernel([theta], [param.grad.to(dtype)], [state], weights.to(dtype), lr, [count], *codes, 0.0, False)
        found.append(theta)
    return found


def _backward(network):
    """Gradient of the weights of a few steps, by the op and by the reference."""
    (param,) = cases.params([(STEPS, size())])
    weights, config, found = network.flat_weights().detach(), network.config, []
    codes = arguments.codes(config)
    for kernel, dtype in (
        (torch.ops.l2l_fast.lstm_unroll_backward, torch.float32),
        (reference.lstm_unroll_backward, torch.float64),
    ):
        state = ops.new_state(param[0], config, dtype)
        flags = (False, False, True)
        step = torch.ones((), device=param.device)
        *_, d_weights = kernel(
            param.to(dtype), None, param.grad.to(dtype), state, weights.to(dtype), step, *codes, *flags
        )
        found.append(d_weights)
    return found


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def _compare(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> list[str]:
    error = _error(found, expected)
    return [] if error <= tolerance else [f"{what}: relative error {error:.1e}, allowed {tolerance:.0e}"]
