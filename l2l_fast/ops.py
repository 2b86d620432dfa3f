"""The library's operators: one schema each, beside its shape rule, its gradient and its typed wrapper.

The dispatcher chooses the backend: the compiled CPU or CUDA kernel where one is loaded, otherwise the readable
:mod:`l2l_fast.reference`, which is registered for every device. Every backend refuses the same arguments
(:mod:`l2l_fast.arguments`), with a RuntimeError and before anything is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from l2l_fast import arguments, normalize, reference
from l2l_fast.config import Config, state_size

_CONFIG = (
    "int features, int hidden_size, int num_layers, bool projection, int output, "
    "float output_scale, float preprocess_p, float beta1, float beta2, float eps, bool linear_path"
)
# Of the schemas; csrc/module.cpp has it too. Kernels of another version would read their arguments as others.
VERSION = 7
_LIBRARY = torch.library.Library("l2l_fast", "DEF")
REFERENCE: dict[str, Callable] = {}  # by op: what runs where there is no kernel


def _define(schema: str, check, implementation, fake) -> None:
    def checked(*args):
        check(*args)
        return implementation(*args)

    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"l2l_fast::{name}", fake, lib=_LIBRARY)
    REFERENCE[name] = checked


def replace_kernels() -> None:
    """Put the reference in the place of kernels that are loaded already and must not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is overridden
        for name, checked in REFERENCE.items():
            for key in ("CPU", "CUDA"):
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"l2l_fast::{name}", key):
                    _LIBRARY.impl(name, checked, key, allow_override=True)


# ---------------------------------------------------------------- lstm_step_

# The second has no kernels: the reference by request. An operator as well, or torch.compile would trace its tiles.
for _name in ("lstm_step_", "lstm_step_reference_"):
    _define(
        f"{_name}(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor weights, Tensor lr, Tensor[] steps, "
        f"{_CONFIG}, float weight_decay, bool maximize) -> ()",
        arguments.check_step,
        reference.lstm_step_,
        lambda *args: None,
    )


def _step_scaled(params, grads, states, weights, lr, steps, *args) -> None:
    *config, weight_decay, maximize, rms, slow_squares, max_rms = args
    if weights.dim() == 2:  # each network's part of a tensor is a tensor
        for k, flat in enumerate(weights):
            _step_scaled(*([one[k] for one in tensors] for tensors in (params, grads, states)), flat, lr, steps, *args)
        return
    op = torch.ops.l2l_fast.lstm_step_
    updates = normalize.raw_updates(op, params, grads, states, weights, lr, steps, *config, weight_decay, maximize)
    if slow_squares:
        rms = normalize.update_sizes_(grads, states, slow_squares, steps, Config.of(*config), rms, max_rms)
    normalize.move_(params, updates, lr, rms, weight_decay)


# Of networks with update_rms, tensors that are whole: what normalize does around lstm_step_, or a kernel in two passes.
# slow_squares: with max_update_rms, v of each tensor; otherwise none.
_define(
    f"lstm_step_scaled_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor weights, Tensor lr, "
    f"Tensor[] steps, {_CONFIG}, float weight_decay, bool maximize, float update_rms, Tensor(c!)[] slow_squares, "
    f"float max_update_rms) -> ()",
    arguments.check_step_scaled,
    _step_scaled,
    lambda *args: None,
)


def _update_sizes(params, grads, states, weights, steps, *args) -> Tensor:
    *config, rms, slow_squares, max_rms = args
    if not params:
        return weights.new_empty(0)
    return normalize.update_sizes_(grads, states, slow_squares, steps, Config.of(*config), rms, max_rms)


# r of each tensor, after its lstm_step_: normalize.update_sizes_, or a kernel. Of params only the shapes matter.
_define(
    f"lstm_update_sizes_(Tensor[] params, Tensor[] grads, Tensor[] states, Tensor weights, Tensor[] steps, {_CONFIG}, "
    f"float update_rms, Tensor(a!)[] slow_squares, float max_update_rms) -> Tensor",
    arguments.check_update_sizes,
    _update_sizes,
    lambda params, grads, states, weights, *args: weights.new_empty(len(params)),
)


def lstm_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    weights: Tensor,
    lr: Tensor,
    steps: Sequence[Tensor],
    config: Config,
    *,
    weight_decay: float = 0.0,
    maximize: bool = False,
    fused: bool | None = None,
) -> None:
    r"""Move every parameter by one step of the learned optimizer, in place, and advance its state.

    theta <- theta - lr * weight_decay * theta + lr * u,   (u, state) <- m(grad, state; weights)

    A coordinate whose gradient is not finite (:func:`~l2l_fast.config.gradient_limit`) keeps its value and its state.
    No autograd: the optimizer's own path.

    Args:
        params: tensors of any shape, strides and floating dtype; changed in place.
        grads: one per parameter, of its shape, any strides and floating dtype.
        states: one per parameter, ``(*param.shape, S)`` with ``S = state_size(config)``, float32, bfloat16 or float64;
            changed in place. Fastest as :func:`new_state` lays it out, for K networks with ``several=True``.
        weights: flat weight vector [W], float32 or float64; the arithmetic is done in its dtype. Or [K, W], of K
            networks of one ``config``: the first dimension of every parameter is then K, and network k moves
            ``param[k]``.
        lr: 0-dim tensor, multiplier of the update; float32, float64, int32 or int64.
        steps: one per parameter, 0-dim: the number of this step, counted from 1 (bias correction of the moments); of
            the dtypes of ``lr``.
        config: what the network computes.
        weight_decay: decoupled weight decay, per unit of lr.
        maximize: ascend instead of descend.
        fused: False runs the reference, whatever kernels there are; None and True, what the dispatcher has.

    Raises:
        RuntimeError: a tensor of another shape, dtype or device (all are on that of ``weights``), or an expanded
            parameter or state; nothing is changed then.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> network = l2l.CoordinatewiseLSTM(hidden_size=4, num_layers=1)
        >>> theta, grad = torch.zeros(3), torch.ones(3)
        >>> state = l2l.ops.new_state(theta, network.config)
        >>> l2l.ops.lstm_step_([theta], [grad], [state], network.flat_weights().detach(), torch.tensor(1.0),
        ...                    [torch.tensor(1.0)], network.config)
        >>> bool((theta != 0).all())
        True

    References:
        Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474
    """
    fields = *arguments.codes(config), weight_decay, maximize
    count_versions([*params, *states])
    op = torch.ops.l2l_fast.lstm_step_reference_ if fused is False else torch.ops.l2l_fast.lstm_step_
    op(params, grads, states, weights, lr, steps, *fields)


def count_versions(overwritten: Sequence[Tensor]) -> None:
    """Tell autograd, which does not see what a kernel writes: it refuses graphs that saved what was there before."""
    if torch.compiler.is_compiling():
        return  # the compiler makes of it what autograd sees
    if torch.is_inference_mode_enabled():  # whose own tensors have no versions
        overwritten = [tensor for tensor in overwritten if not tensor.is_inference()]
    increment_version(overwritten)


# ---------------------------------------------------------------- lstm_unroll


def _lstm_unroll_fake(grads, state, weights, step, *args):
    torch._check(grads.dim() == 2, lambda: f"grads must be [T, N], got shape {tuple(grads.shape)}")
    torch._check(state.dim() == 2, lambda: f"state must be [N, S], got shape {tuple(state.shape)}")
    return torch.empty_like(grads), reference.new_state_like(state)


_define(
    f"lstm_unroll(Tensor grads, Tensor state, Tensor weights, Tensor step, {_CONFIG}) -> (Tensor, Tensor)",
    arguments.check_unroll,
    reference.lstm_unroll_forward,
    _lstm_unroll_fake,
)


def lstm_unroll(
    grads: Tensor, state: Tensor, weights: Tensor, config: Config, step: Tensor | int = 1
) -> tuple[Tensor, Tensor]:
    r"""Updates that the learned optimizer makes of a sequence of gradients; differentiable once.

    (u[t], state[t+1]) = m(grads[t], state[t]; weights),  t = 0 .. T-1

    A gradient that is not finite (:func:`~l2l_fast.config.gradient_limit`) gives u = 0 and passes the state on. Under
    the transforms of ``torch.func`` the reference runs.

    Args:
        grads: [T, N], of the dtype of ``weights``.
        state: [N, S] before the first step, ``S = state_size(config)``; float32, bfloat16 or float64.
        weights: flat weight vector [W], float32 or float64; the arithmetic is done in its dtype.
        config: what the network computes.
        step: number of the first step, counted from 1: an int, or a 0-dim tensor of dtype float32, float64, int32 or
            int64.

    Returns:
        updates [T, N] and the state [N, S] after the last step, each of the dtype it came in.

    Raises:
        RuntimeError: a tensor of another shape, dtype or device.
        NotImplementedError: when differentiated twice.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> network = l2l.CoordinatewiseLSTM(hidden_size=4, num_layers=1)
        >>> state = l2l.ops.new_state(torch.empty(5), network.config)
        >>> updates, last = l2l.ops.lstm_unroll(torch.randn(3, 5), state, network.flat_weights(), network.config)
        >>> updates.shape, last.shape
        (torch.Size([3, 5]), torch.Size([5, 8]))
    """
    step = _as_tensor(step, grads)
    # torch.func's transforms refuse an op with a backward of its own (pytorch#168393), but not plain PyTorch.
    if torch._C._are_functorch_transforms_active():
        arguments.check_unroll(grads, state, weights, step, *arguments.codes(config))
        return reference.lstm_unroll(grads, state, weights, step, *config)
    return torch.ops.l2l_fast.lstm_unroll(grads, state, weights, step, *arguments.codes(config))


def _as_tensor(step: Tensor | int, like: Tensor) -> Tensor:
    return step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.float32, device=like.device)


# ---------------------------------------------------------------- lstm_unroll_backward


def _lstm_unroll_backward_fake(d_updates, d_last, grads, state, weights, step, *args):
    need_grads, need_state, need_weights = args[-3:]
    return (
        torch.empty_like(grads) if need_grads else grads.new_empty(0),
        reference.new_state_like(state) if need_state else state.new_empty(0),
        torch.empty_like(weights) if need_weights else weights.new_empty(0),
    )


_define(
    "lstm_unroll_backward(Tensor d_updates, Tensor? d_last, Tensor grads, Tensor state, Tensor weights, Tensor step, "
    f"{_CONFIG}, bool need_grads, bool need_state, bool need_weights) -> (Tensor, Tensor, Tensor)",
    arguments.check_unroll_backward,
    reference.lstm_unroll_backward,
    _lstm_unroll_backward_fake,
)


def lstm_unroll_backward(
    d_updates: Tensor,
    d_last: Tensor | None,
    grads: Tensor,
    state: Tensor,
    weights: Tensor,
    config: Config,
    step: Tensor | int = 1,
    *,
    need_grads: bool = False,
    need_state: bool = False,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Backward through time of :func:`lstm_unroll`, callable by itself.

    It stores nothing of the forward run but its inputs: each tile of coordinates is run forward again from its first
    state, then backward, so the extra memory is one tile's activations.

    Args:
        d_updates: gradient of the updates, [T, N], of the dtype of ``weights``.
        d_last: gradient of the last state, [N, S], float32, bfloat16 or float64, or None for zero.
        grads, state, weights, config, step: as :func:`lstm_unroll` had them.
        need_grads, need_state, need_weights: which gradients to form.

    Returns:
        gradients of grads [T, N], state [N, S] and weights [W], each of the dtype of what it belongs to; an empty
        tensor for each that is not needed.

    Raises:
        RuntimeError: a tensor of another shape, dtype or device.
        NotImplementedError: when differentiated.
    """
    fields = *arguments.codes(config), need_grads, need_state, need_weights
    return torch.ops.l2l_fast.lstm_unroll_backward(
        d_updates, d_last, grads, state, weights, _as_tensor(step, grads), *fields
    )


def _setup_context(ctx, inputs, output) -> None:
    grads, state, weights, step, *config = inputs
    ctx.save_for_backward(grads, state, weights, step)
    ctx.config = Config.of(*config)


def _lstm_unroll_autograd(ctx, d_updates, d_last):
    grads, state, weights, step = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    results = lstm_unroll_backward(
        d_updates.contiguous(), d_last, grads, state, weights, ctx.config, step,
        need_grads=needed[0], need_state=needed[1], need_weights=needed[2],
    )  # fmt: skip
    found = [result if need else None for result, need in zip(results, needed, strict=True)]
    return (*found, None, *[None] * len(ctx.config))


def _refuse_double_backward(ctx, *grads):
    raise NotImplementedError(
        "lstm_unroll is differentiable once; for second derivatives of the optimizer's own weights differentiate "
        "l2l_fast.reference.lstm_unroll, which is plain PyTorch"
    )


torch.library.register_autograd(
    "l2l_fast::lstm_unroll", _lstm_unroll_autograd, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd("l2l_fast::lstm_unroll_backward", _refuse_double_backward, lib=_LIBRARY)


# ---------------------------------------------------------------- state


def new_state(param: Tensor, config: Config, dtype: torch.dtype = torch.float32, *, several: bool = False) -> Tensor:
    """Zero state of a parameter: shape ``(*param.shape, S)``, each of the S rows contiguous over the coordinates.

    The shape is canonical, so the state slices and shards as its parameter does; the layout is only strides. The
    coordinates stand in the parameter's own memory order, and a row is padded to whole lines of cache (64 bytes, on a
    GPU 128), on a CPU an odd number of them, so that the rows of a power-of-two parameter do not all fall on one cache
    set. A row too short for that, which would be more padding than state, is padded to four coordinates at a time, and
    that of a single coordinate on a CPU not at all.

    Args:
        param: of any shape and strides, real.
        config: what the network computes.
        dtype: float32, bfloat16 or float64.
        several: for as many networks as the first dimension has places: each one's part by itself.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> network = l2l.CoordinatewiseLSTM(hidden_size=20, num_layers=2)
        >>> l2l.ops.new_state(torch.empty(3, 5), network.config).shape
        torch.Size([3, 5, 80])
    """
    if several:
        one = new_state(param[0], config, dtype)
        length = one.untyped_storage().nbytes() // dtype.itemsize
        storage = torch.zeros(len(param) * length, dtype=dtype, device=param.device)
        return storage.as_strided((len(param), *one.shape), (length, *one.stride()))
    size, count = state_size(config), param.numel()
    on_gpu = param.device.type == "cuda"
    line, fours = (128 if on_gpu else 64) // dtype.itemsize, -(-count // 4) * 4
    # CPU kernels work on whole lines where they lie, CUDA kernels on four coordinates: so the widest that is not waste.
    lines = -(-count // line) | int(not on_gpu)
    row = next(row for row in (lines * line, fours, count) if row <= 2 * count)
    row = max(row, fours) if on_gpu else row  # one that is no whole fours would take a launch of its own
    strides = torch.empty_like(param, device="meta").stride()
    storage = torch.zeros(size * row, dtype=dtype, device=param.device)
    return storage.as_strided((*param.shape, size), (*strides, max(row, 1)))
