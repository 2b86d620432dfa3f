"""What the ops take: the checks of ``csrc/arguments.h``, in front of the

Each raises a RuntimeError that names the argument, before anything is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_fast.config import (
    FEATURES,
    MAX_HIDDEN,
    MAX_LAYERS,
    OUTPUTS,
    STATE_DTYPES,
    Config,
    has_moments,
    num_weights,
    state_size,
)

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WEIGHTS = (torch.float32, torch.float64)
_NUMBERS = (torch.float32, torch.float64, torch.int32, torch.int64)
_MAX_DIMS = 64
_NAMES = {"features": tuple(FEATURES), "output": OUTPUTS}


def codes(config: Config) -> tuple:
    """The config as the ops take it: ``features`` and ``output`` as places in FEATURES and OUTPUTS.

    No op takes a string, because the stable ABI of torch 2.13 loses the memory of each that it hands to a kernel.
    """
    for name, known in _NAMES.items():
        if getattr(config, name) not in known:
            raise RuntimeError(f"{name} must be {' or '.join(known)}, got {getattr(config, name)!r}")
    features, output = (known.index(getattr(config, name)) for name, known in _NAMES.items())
    return (features, *config[1:4], output, *config[5:])


def _config(*fields) -> Config:
    config = Config(*fields)
    for name, known in _NAMES.items():
        code = getattr(config, name)
        if code not in range(len(known)):
            allowed = " or ".join(f"{place} ({text})" for place, text in enumerate(known))
            raise RuntimeError(f"{name} must be {allowed}, got {code!r}")
    return Config.of(*fields)


def _check(tensor: Tensor, name: str, weights: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.device != weights.device:
        raise RuntimeError(f"{name} must be on the device of the weights, {weights.device}, got {tensor.device}")
    if tensor.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise RuntimeError(f"{name} must be {', '.join(others)} or {last}, got {tensor.dtype}")


def _check_number(tensor: Tensor, name: str, weights: Tensor) -> None:
    _check(tensor, name, weights, _NUMBERS)
    if tensor.numel() != 1:
        raise RuntimeError(f"{name} must be a single number, got shape {list(tensor.shape)}")


def _check_series(tensor: Tensor, name: str, weights: Tensor, *shape: int) -> None:
    _check(tensor, name, weights, _FLOATING)
    if tensor.shape != shape:
        raise RuntimeError(f"{name} must be {list(shape)}, got shape {list(tensor.shape)}")
    if tensor.dtype != weights.dtype:
        raise RuntimeError(f"{name} must have the dtype of the weights, {weights.dtype}, got {tensor.dtype}")


def _check_state(tensor: Tensor, name: str, weights: Tensor, *shape: int) -> None:
    _check(tensor, name, weights, STATE_DTYPES)
    if tensor.shape != shape:
        raise RuntimeError(f"{name} must be {list(shape)}, got shape {list(tensor.shape)}")


def _check_own_memory(tensor: Tensor, name: str) -> None:
    if tensor.numel() and any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise RuntimeError(
            f"{name} of shape {list(tensor.shape)} is expanded: several coordinates share one place in memory"
        )


def _check_network(weights: Tensor, config: Config, several: bool = False) -> None:
    for name, most in (("hidden_size", MAX_HIDDEN), ("num_layers", MAX_LAYERS)):
        if not 1 <= getattr(config, name) <= most:
            raise RuntimeError(f"{name} must be from 1 to {most}, got {getattr(config, name)}")
    _check(weights, "weights", weights, _WEIGHTS)
    count = num_weights(config)
    if weights.shape[-1:] != (count,) or weights.dim() > 1 + several:
        rows = ", or a row of them for each of several" if several else ""
        raise RuntimeError(
            f"weights must be a vector of {count} for this network{rows}, got shape {list(weights.shape)}"
        )


def _check_tensors(params, grads, states, weights, steps, config: Config) -> None:
    _check_network(weights, config, several=True)
    if not len(params) == len(grads) == len(states) == len(steps):
        raise RuntimeError(
            f"there must be one gradient, state and step for each of the {len(params)} parameters, got "
            f"{len(grads)}, {len(states)} and {len(steps)}"
        )
    size = state_size(config)
    for param, grad, state, step in zip(params, grads, states, steps, strict=True):
        _check(param, "a parameter", weights, _FLOATING)
        _check(grad, "a gradient", weights, _FLOATING)
        _check(state, "a state", weights, STATE_DTYPES)
        shape = list(param.shape)
        if grad.shape != param.shape:
            raise RuntimeError(f"a gradient has shape {list(grad.shape)}, its parameter {shape}")
        if state.shape != (*shape, size):
            raise RuntimeError(
                f"a state has shape {list(state.shape)}, its parameter {shape}: it must add one dimension of {size}"
            )
        if len(shape) > _MAX_DIMS:
            raise RuntimeError(f"a parameter has {len(shape)} dimensions; at most {_MAX_DIMS} are supported")
        if weights.dim() == 2 and shape[:1] != [len(weights)]:
            count = len(weights)
            raise RuntimeError(
                f"a parameter has shape {shape}: its first dimension must be {count}, the number of networks that "
                "weights has"
            )
        _check_own_memory(param, "a parameter")
        _check_own_memory(state, "a state")
        _check_number(step, "a step", weights)


def check_step(params, grads, states, weights, lr, steps, *args) -> None:
    _check_tensors(params, grads, states, weights, steps, _config(*args[:-2]))
    _check_number(lr, "lr", weights)


def check_step_scaled(params, grads, states, weights, lr, steps, *args) -> None:
    *plain, _, squares, _ = args
    check_step(params, grads, states, weights, lr, steps, *plain)
    if squares:
        _check_squares(squares, params, weights, _config(*plain[:-2]))


def check_update_sizes(params, grads, states, weights, steps, *args) -> None:
    *fields, _, squares, _ = args
    config = _config(*fields)
    _check_tensors(params, grads, states, weights, steps, config)
    _check_squares(squares, params, weights, config)


def _check_squares(squares, params, weights: Tensor, config: Config) -> None:
    if len(squares) != len(params):
        raise RuntimeError(
            f"slow_squares must be empty or have one for each of the {len(params)} parameters, got {len(squares)}"
        )
    if weights.dim() == 2:
        raise RuntimeError("slow_squares must be empty for several networks at once")
    if not has_moments(config):
        raise RuntimeError("slow_squares must be empty for a network whose features are no moments")
    for square in squares:
        _check(square, "a slow_square", weights, _FLOATING)
        if square.numel() != 1 or square.dtype != weights.dtype:
            raise RuntimeError(
                f"a slow_square must be one number in the dtype of the weights, got shape {list(square.shape)}"
            )


def check_unroll(grads, state, weights, step, *args) -> None:
    config = _config(*args)
    _check_network(weights, config)
    if grads.dim() != 2:
        raise RuntimeError(f"grads must be [T, N], got shape {list(grads.shape)}")
    _check_number(step, "step", weights)
    _check_series(grads, "grads", weights, *grads.shape)
    _check_state(state, "state", weights, grads.shape[1], state_size(config))


def check_unroll_backward(d_updates, d_last, grads, state, weights, step, *args) -> None:
    check_unroll(grads, state, weights, step, *args[:-3])
    _check_series(d_updates, "d_updates", weights, *grads.shape)
    if d_last is not None:
        _check_state(d_last, "d_last", weights, *state.shape)
