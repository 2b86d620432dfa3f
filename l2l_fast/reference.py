"""The mathematics of the optimizer in plain PyTorch: the ground truth every kernel is held to.

It is also the implementation that runs wherever no kernel is registered. Everything is written for columns: a block of
n coordinates is a matrix with one row per feature, so a layer is ``weight @ block`` and a gate's rows are contiguous.

One coordinate's state is a column of ``state_size(config)`` rows::

    m, v                 running moments of the gradient (features "moments" and "both" only)
    h_l0, c_l0           hidden and cell state of layer 0, hidden_size rows each
    h_l1, c_l1, ...      the same for every further layer
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from l2l_fast.config import Config, gradient_limit, has_moments, split_weights

# Coordinates are independent, so work goes tile by tile: a tile's activations stay in cache, and a whole
# truncation never holds more than one tile's activations at once.
TILE = 4096

# float32's smallest normal number: kernels hold no smaller v, whatever their dtype.
SMALLEST = 2.0**-126


def split_state(state: Tensor, config: Config) -> list[Tensor]:
    """Rows of a state block [S, n] as [m, v, h_l0, c_l0, ...] (without m, v where the features need none)."""
    hidden = config.hidden_size
    return list(state.split([1, 1] * has_moments(config) + [hidden, hidden] * config.num_layers))


# ---------------------------------------------------------------- one step of one block


def outside_autocast(function):
    """The function of tensors as it is where no autocast rounds what goes into its products."""

    @functools.wraps(function)
    def run(tensor, *args, **kwargs):
        device = tensor.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(tensor, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(tensor, *args, **kwargs)

    return run


def log_sign(grad: Tensor, p: float) -> list[Tensor]:
    """Gives log|d|/p and sign d of gradient coordinates d, or -1 and e^p d where ``|d| < e^-p``."""
    magnitude, threshold = grad.abs(), math.exp(-p)
    large = magnitude >= threshold
    log = magnitude.clamp(min=threshold).log() / p
    return [torch.where(large, log, -1.0), torch.where(large, grad.sign(), math.exp(p) * grad)]


def _log_sign_backward(d_log: Tensor, d_sign: Tensor, grad: Tensor, p: float) -> Tensor:
    large = grad.abs() >= math.exp(-p)
    return torch.where(large, d_log / (p * torch.where(large, grad, 1.0)), math.exp(p) * d_sign)


def _moments(grad: Tensor, m: Tensor, v: Tensor, step: Tensor, config: Config):
    """New moments and their bias-corrected ratios; ``step`` counts this step, so the first one is 1."""
    m = config.beta1 * m + (1 - config.beta1) * grad
    v = config.beta2 * v + (1 - config.beta2) * grad * grad
    root = (v / (1 - config.beta2**step)).sqrt()
    m_hat = m / (1 - config.beta1**step)
    return m, v, [m_hat / (root + config.eps), grad / (root + config.eps)], (m_hat, root)


def _moments_backward(d_ratios, d_m: Tensor, d_v: Tensor, grad: Tensor, step: Tensor, saved, config: Config):
    """Gradients with respect to (grad, m, v) before the step."""
    m_hat, root = saved
    denominator = root + config.eps
    d_m = d_m + d_ratios[0] / denominator / (1 - config.beta1**step)
    d_root = -(d_ratios[0] * m_hat + d_ratios[1] * grad) / (denominator * denominator)
    # v = 0 only where every gradient so far was 0: both ratios are 0 there, and so is their derivative in v.
    d_v_hat = torch.where(root > 0, 0.5 * d_root / torch.where(root > 0, root, 1.0), 0.0)
    d_v = d_v + d_v_hat / (1 - config.beta2**step)
    d_grad = d_ratios[1] / denominator + (1 - config.beta1) * d_m + 2 * (1 - config.beta2) * d_v * grad
    return d_grad, config.beta1 * d_m, config.beta2 * d_v


@outside_autocast
def cell(
    grad: Tensor,
    state: Tensor,
    step: Tensor,
    weights: dict[str, Tensor],
    config: Config,
    saved: dict | None = None,
    limit: float | None = None,
):
    """One step of the optimizer for a block of coordinates.

    (u, state') = m(grad, state; weights). A coordinate whose gradient is not finite gets u = 0 and keeps its state. One
    that has never had a nonzero gradient, which v = 0 shows, gets u = 0.

    Args:
        grad: [n].
        state: [S, n].
        step: 0-dim tensor, the number of this step counted from 1.
        weights: the dictionary of :func:`split_weights`.
        config: what the network computes.
        saved: where to leave the activations that :func:`cell_backward` needs.
        limit: the magnitude from which on a gradient is not finite; if not given, :func:`gradient_limit` of the
            arithmetic's dtype.

    Returns:
        updates [n] and the new state [S, n].
    """
    limit = gradient_limit(config, grad.dtype, grad.dtype) if limit is None else limit
    finite, step = grad.abs() < limit, step.to(grad.dtype)
    grad = torch.where(finite, grad, 0.0)
    rows = split_state(state, config)
    new_rows, inputs, moments, moves = [], [], None, finite
    if has_moments(config):
        m, v, inputs, moments = _moments(grad, rows[0][0], rows[1][0], step, config)
        new_rows += [m[None], v[None]]
        rows = rows[2:]
        moves = finite & ~(v < SMALLEST)
    if config.features in ("log_sign", "both"):
        inputs = inputs + log_sign(grad, config.preprocess_p)
    if config.features == "identity":
        inputs = [grad]
    x = torch.stack(inputs)
    features = x
    if config.projection:
        x = torch.nn.functional.elu(torch.addmm(weights["projection.bias"][:, None], weights["projection.weight"], x))
    projected = x
    layers = []
    for layer in range(config.num_layers):
        h, c = rows[2 * layer], rows[2 * layer + 1]
        bias = weights[f"bias_ih_l{layer}"] + weights[f"bias_hh_l{layer}"]
        gates = torch.addmm(bias[:, None], weights[f"weight_ih_l{layer}"], x)
        gates = gates.addmm(weights[f"weight_hh_l{layer}"], h)
        i, f, g, o = gates.chunk(4)  # torch.nn.LSTM's order
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_new = f * c + i * g
        tanh_c = c_new.tanh()
        layers.append((x, h, c, i, f, g, o, tanh_c))
        x = o * tanh_c
        new_rows += [x, c_new]
    y = torch.addmm(weights["head.bias"][:, None], weights["head.weight"], x)[0]
    if config.linear_path:
        y = y + (weights["linear.weight"] @ features)[0]
    if config.output == "tanh":
        y = y.tanh()
    if saved is not None:
        saved.update(finite=finite, moves=moves, grad=grad, features=features, projected=projected, layers=layers,
                     moments=moments, top=x, y=y, step=step)  # fmt: skip
    updates = torch.where(moves, config.output_scale * y, 0.0)
    return updates, torch.where(finite, torch.cat(new_rows), state)


def scale_to_rms(updates: Tensor, rms: float) -> Tensor:
    """The updates d of one whole tensor scaled to the root mean square ``rms``; 0 where all of d is 0.

    What a network with ``update_rms`` makes of d, which has 0 where :func:`cell` gives 0. :mod:`l2l_fast.normalize` is
    how it is computed.
    """
    mean = updates.square().mean() if updates.numel() else updates.new_zeros(())
    moves = mean > 0
    return torch.where(moves, updates * (rms / torch.where(moves, mean, 1.0).sqrt()), 0.0)


def relative_to_rms(grad: Tensor, v: Tensor, step: Tensor, config: Config, rms: float) -> tuple[Tensor, Tensor]:
    """The gradient x of one whole tensor, and the mean square v, of a network with ``input_rms``.

    x = rms * grad / sqrt(v / (1 - beta2^step)),   v <- beta2 v + (1 - beta2) mean grad^2; where a gradient is not
    finite, v is what it was, but for its bias. :mod:`l2l_fast.normalize` is how it is computed.
    """
    bias = 1 - config.beta2**step
    mean = grad.square().mean() if grad.numel() else grad.new_zeros(())
    finite = grad.norm() < gradient_limit(config, grad.dtype, grad.dtype)
    before = v / (1 - config.beta2 ** (step - 1)) if step > 1 else torch.zeros_like(mean)
    v = config.beta2 * v + (1 - config.beta2) * (mean if finite else before)
    return (grad * (rms / (v / bias).sqrt()) if v / bias >= SMALLEST else 0 * grad), v


def update_size(
    grad: Tensor, m: Tensor, v: Tensor, step: Tensor, config: Config, rms: float, max_rms: float, beta: float = 0.999
) -> tuple[Tensor, Tensor]:
    """The root mean square r of one whole tensor's update, and v, of a network with ``max_update_rms``.

    r = rms * sqrt((1 + beta1) / (1 - beta1)) * RMS(m / (1 - beta1^step)) / sqrt(v / (1 - beta^step)), at most max_rms

    v <- beta v + (1 - beta) mean grad^2, which counts as at most 100 times the v before, without its bias; where a
    gradient is not finite, v is what it was, but for its bias. m is the state's after the step. Where v is 0, r is, or
    ``rms`` if that is for want of finite gradients. :mod:`l2l_fast.normalize` is how it is computed.
    """
    mean, momentum = (x.square().mean() if x.numel() else x.new_zeros(()) for x in (grad, m))
    finite = grad.norm() < gradient_limit(config, grad.dtype, m.dtype)
    before = v / (1 - beta ** (step - 1)) if step > 1 else torch.zeros_like(mean)
    if before > 0:
        mean = torch.minimum(mean, 100 * before)
    v = beta * v + (1 - beta) * (mean if finite else before)
    unbiased = v / (1 - beta**step)
    if unbiased < SMALLEST:
        return torch.full_like(v, 0.0 if finite else rms), v
    noise = math.sqrt((1 - config.beta1) / (1 + config.beta1))  # RMS of a momentum of noise, in the noise's
    agreed = momentum.sqrt() / (1 - config.beta1**step) / unbiased.sqrt()
    return (rms * agreed / noise).clamp_max(max_rms), v


@outside_autocast
def cell_backward(
    d_update: Tensor,
    d_state: Tensor,
    saved: dict,
    weights: dict[str, Tensor],
    d_weights: dict[str, Tensor],
    config: Config,
):
    """Backward of :func:`cell`; adds the weights' gradients into ``d_weights``.

    Args:
        d_update: gradient of the updates, [n].
        d_state: gradient of the new state, [S, n].
        saved: what :func:`cell` left.

    Returns:
        gradients with respect to grad [n] and to the state before the step [S, n].
    """
    finite = saved["finite"]
    d_y = torch.where(saved["moves"], config.output_scale * d_update, 0.0)
    if config.output == "tanh":
        d_y = d_y * (1 - saved["y"] ** 2)
    d_rows = split_state(torch.where(finite, d_state, 0.0), config)
    moments_rows, d_rows = (d_rows[:2], d_rows[2:]) if has_moments(config) else ([], d_rows)

    d_weights["head.weight"].addmm_(d_y[None], saved["top"].T)
    d_weights["head.bias"].add_(d_y.sum())
    d_x = weights["head.weight"].T * d_y
    d_old: list[Tensor] = []
    for layer in reversed(range(config.num_layers)):
        x, h, c, i, f, g, o, tanh_c = saved["layers"][layer]
        d_h = d_x + d_rows[2 * layer]
        d_c = d_rows[2 * layer + 1] + d_h * o * (1 - tanh_c * tanh_c)
        d_gates = torch.cat([
            d_c * g * i * (1 - i),
            d_c * c * f * (1 - f),
            d_c * i * (1 - g * g),
            d_h * tanh_c * o * (1 - o),
        ])  # fmt: skip
        d_weights[f"weight_ih_l{layer}"].addmm_(d_gates, x.T)
        d_weights[f"weight_hh_l{layer}"].addmm_(d_gates, h.T)
        d_bias = d_gates.sum(1)
        d_weights[f"bias_ih_l{layer}"].add_(d_bias)
        d_weights[f"bias_hh_l{layer}"].add_(d_bias)
        d_x = weights[f"weight_ih_l{layer}"].T @ d_gates
        d_old = [weights[f"weight_hh_l{layer}"].T @ d_gates, d_c * f, *d_old]
    if config.projection:
        d_x = d_x * torch.where(saved["projected"] > 0, 1.0, saved["projected"] + 1)  # ELU'
        d_weights["projection.weight"].addmm_(d_x, saved["features"].T)
        d_weights["projection.bias"].add_(d_x.sum(1))
        d_x = weights["projection.weight"].T @ d_x

    if config.linear_path:
        d_weights["linear.weight"].addmm_(d_y[None], saved["features"].T)
        d_x = d_x + weights["linear.weight"].T * d_y

    d_features, grad = list(d_x), saved["grad"]
    d_grad = torch.zeros_like(grad)
    if has_moments(config):
        d_moment, d_m, d_v = _moments_backward(
            d_features[:2], moments_rows[0][0], moments_rows[1][0], grad, saved["step"], saved["moments"], config
        )
        d_grad, d_old = d_grad + d_moment, [d_m[None], d_v[None], *d_old]
    if config.features in ("log_sign", "both"):
        d_grad = d_grad + _log_sign_backward(d_features[-2], d_features[-1], grad, config.preprocess_p)
    if config.features == "identity":
        d_grad = d_features[0]
    return torch.where(finite, d_grad, 0.0), torch.where(finite, torch.cat(d_old), d_state)


# ---------------------------------------------------------------- the ops


def lstm_step_(params, grads, states, weights, lr, steps, *args) -> None:
    """In-place step of every tensor: theta <- theta - lr*weight_decay*theta + lr*u. See :mod:`l2l_fast.ops`."""
    if weights.dim() == 2:
        for k, flat in enumerate(weights):
            lstm_step_(*([one[k] for one in tensors] for tensors in (params, grads, states)), flat, lr, steps, *args)
        return
    config, (weight_decay, maximize) = Config.of(*args[:-2]), args[-2:]
    named = split_weights(weights, config)
    for param, grad, state, step in zip(params, grads, states, steps, strict=True):
        # Views where the strides allow it, copies elsewhere; copies are written back below.
        flat_param, flat_grad, flat_state = param.reshape(-1), grad.reshape(-1), state.reshape(-1, state.shape[-1])
        limit = gradient_limit(config, weights.dtype, state.dtype)
        for tile in _tiles(flat_param.numel()):
            d = flat_grad[tile].to(weights.dtype)
            columns = flat_state[tile].T.to(weights.dtype)
            update, new_state = cell(-d if maximize else d, columns, step, named, config, limit=limit)
            theta = flat_param[tile].to(torch.promote_types(param.dtype, weights.dtype))  # float64 stays float64
            moved = theta + lr * (update - weight_decay * theta)
            flat_param[tile] = torch.where(d.abs() < limit, moved, theta).to(param.dtype)
            flat_state[tile] = new_state.T.to(state.dtype)
        if flat_param.data_ptr() != param.data_ptr():
            param.copy_(flat_param.view(param.shape))
        if flat_state.data_ptr() != state.data_ptr():
            state.copy_(flat_state.view(state.shape))


def lstm_unroll(grads: Tensor, state: Tensor, weights: Tensor, step: Tensor, *args) -> tuple[Tensor, Tensor]:
    """Updates [T, N] and the last state [N, S] of T steps from ``state``, the first of them number ``step``.

    Differentiable by plain autograd, which is what the hand-written backward below is tested against.
    """
    config = Config.of(*args)
    named = split_weights(weights, config)
    updates, columns, limit = [], state.T.to(weights.dtype), gradient_limit(config, weights.dtype, state.dtype)
    for t, grad in enumerate(grads):
        update, columns = cell(grad, columns, step + t, named, config, limit=limit)
        updates.append(update)
    return torch.stack(updates) if updates else torch.zeros_like(grads), columns.T.to(state.dtype)


def lstm_unroll_forward(grads: Tensor, state: Tensor, weights: Tensor, step: Tensor, *args) -> tuple[Tensor, Tensor]:
    """:func:`lstm_unroll` tile by tile, without a graph: what the op runs."""
    updates, last = torch.empty_like(grads), new_state_like(state)
    for tile in _tiles(grads.shape[1]):
        updates[:, tile], last[tile] = lstm_unroll(grads[:, tile], state[tile], weights, step, *args)
    return updates, last


def lstm_unroll_backward(
    d_updates: Tensor,
    d_last: Tensor | None,
    grads: Tensor,
    state: Tensor,
    weights: Tensor,
    step: Tensor,
    *args,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (grads [T, N], state [N, S], weights [W]); those not needed are empty.

    Each tile's truncation is run forward again from its first state, then backward through time.
    """
    config, (need_grads, need_state, need_weights) = Config.of(*args[:-3]), args[-3:]
    named = split_weights(weights, config)
    d_weights = torch.zeros_like(weights)
    named_d_weights = split_weights(d_weights, config)
    d_grads = torch.empty_like(grads) if need_grads else grads.new_empty(0)
    d_state = new_state_like(state) if need_state else state.new_empty(0)
    horizon, limit = grads.shape[0], gradient_limit(config, weights.dtype, state.dtype)
    for tile in _tiles(grads.shape[1]):
        columns = state[tile].T.to(weights.dtype)
        saved: list[dict] = [{} for _ in range(horizon)]
        for t in range(horizon):
            _, columns = cell(grads[t, tile], columns, step + t, named, config, saved[t], limit)
        d_columns = torch.zeros_like(columns) if d_last is None else d_last[tile].T.to(weights.dtype)
        for t in reversed(range(horizon)):
            d_grad, d_columns = cell_backward(
                d_updates[t, tile], d_columns, saved.pop(), named, named_d_weights, config
            )
            if need_grads:
                d_grads[t, tile] = d_grad
        if need_state:
            d_state[tile] = d_columns.T.to(state.dtype)
    return d_grads, d_state, d_weights if need_weights else weights.new_empty(0)


def new_state_like(state: Tensor) -> Tensor:
    """Uninitialised state of the same shape, coordinates contiguous."""
    return torch.empty_like(state.T, memory_format=torch.contiguous_format).T


def _tiles(count: int):
    return (slice(start, min(start + TILE, count)) for start in range(0, count, TILE))
