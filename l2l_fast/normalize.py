r"""What surrounds the step of a network with ``update_rms``, ``max_update_rms``, ``input_rms`` or ``orthogonalize``.

x <- input_rms * grad / sqrt(v),    v <- beta2 v + (1 - beta2) mean grad^2, without its bias towards the start
d, state <- m(x, state; phi)
d <- d / (2 RMS(d)) - o / RMS(o) of a matrix,    o = NS(beta1 m + (1 - beta1) x), m being the state's running mean of x
theta <- theta - lr * weight_decay * theta + lr * r * d / RMS(d)
r = update_rms;   with max_update_rms: update_rms for noise, the more the gradients agree (:func:`update_sizes_`)

Means and root mean squares are over a whole tensor; where they are 0, nothing moves. Here the kernels need not know of
any of it: they step scratch tensors of zeros, which then hold d, and all else is passes over many tensors at once.
Nothing waits for the device. ``lstm_step_scaled_`` and ``lstm_update_sizes_`` are kernels of parts of it.

A coordinate whose gradient is not finite has d = 0, counts as 0 in the mean and keeps its value; v stays what it was.
The scratch says which these are: it begins as -0.0, and the step, which adds to every other coordinate, makes +0.0 of
it at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from l2l_fast.config import Config, gradient_limit, has_moments
from l2l_fast.reference import SMALLEST, outside_autocast

LEARNED_SHARE = 0.5  # RMS of the learned part beside that of the orthogonalized momentum, 1: docs/notebook.md
SLOW_BETA = 0.999  # of a tensor's mean square that its momentum is measured by; Adam's beta2
MOST_GROWTH = 100.0  # of a step's mean square beside the running one: an outlier would slow a tensor for 10,000 steps
MAX_SIDE = 16384  # of a matrix to orthogonalize: beyond are vocabularies, whose rows have nothing to do with each other
TOGETHER = 2**20  # coordinates of matrices that a CPU orthogonalizes in one call: its caches hold them
TOGETHER_ON_GPU = 2**26  # more would gain nothing, and take gigabytes while it lasts
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_LINE = 32  # coordinates; each tensor's scratch begins on a line of 128 bytes
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Updates:
    """Tensors of -0.0 in the parameters' shapes and memory order, all in one piece of memory.

    Those of one shape and order lie one after another, so that what is done to each of them is done to all at once.

    Args:
        params: real tensors.
        like: whose dtype and device they get.
    """

    def __init__(self, params: Sequence[Tensor], like: Tensor) -> None:
        alike: dict[tuple, list[int]] = {}
        for place, param in enumerate(params):
            # As dense as the parameter, without gaps: its state lies in the same order.
            dense = param if param.is_contiguous() else torch.empty_like(param, device="meta")
            alike.setdefault((tuple(param.shape), dense.stride()), []).append(place)
        self._places: dict[int, tuple] = {}
        self._kinds, end = [], 0
        for (shape, stride), places in alike.items():
            count = math.prod(shape)
            pitch = -(-count // _LINE) * _LINE
            self._kinds.append((places, shape, stride, count, pitch, end))
            for place in places:
                self._places[place] = shape, stride, end
                end += pitch
        self.flat = like.new_full((end,), -0.0)
        self.pieces = self.cut(self.flat)

    @property
    def order(self) -> list[int]:
        """The numbers of the tensors, kind after kind."""
        return [place for places, *_ in self._kinds for place in places]

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Another such piece of memory as tensors in the parameters' shapes."""
        return [flat.as_strided(*self._places[place]) for place in range(len(self._places))]

    def rows(self, flat: Tensor) -> list[Tensor]:
        """The same, a matrix [K, N] for each kind: K tensors of N coordinates in memory order."""
        return [
            flat.as_strided((len(places), count), (pitch, 1), start)
            for places, _, _, count, pitch, start in self._kinds
        ]

    def stacks(self, flat: Tensor) -> list[tuple[list[int], Tensor]]:
        """The same, the numbers of its tensors and [K, ...] for each kind."""
        return [
            (places, flat.as_strided((len(places), *shape), (pitch, *stride), start))
            for places, shape, stride, _, pitch, start in self._kinds
        ]


def is_held(updates: Tensor) -> Tensor:
    """Where a step has left -0.0, since the gradient is not finite."""
    return updates.signbit() & (updates == 0)


def raw_updates(op: Callable, params, grads, states, weights, lr, steps, *args) -> Updates:
    """One step of the network: takes the arguments of ``lstm_step_``, moves the states and leaves the parameters.

    Returns:
        d, in the weights' dtype; -0.0 where the gradient is not finite.
    """
    *config, _, maximize = args
    updates = Updates(params, weights)
    op(updates.pieces, grads, states, weights, torch.ones_like(lr), steps, *config, 0.0, maximize)
    return updates


def no_momentum(config: Config, update_rms: float | None) -> str | None:
    """Why a network can have no ``orthogonalize``; None where it can."""
    if update_rms is None:
        return "without update_rms, whose update has a size of its own that would be lost"
    if not has_moments(config):
        return f"with features {config.features!r}, which have no momentum: those with moments have"
    return None


def relative(
    grads: Sequence[Tensor], squares: Sequence[Tensor], steps: Sequence[Tensor], config: Config, rms: float, wholes=None
) -> tuple[list[Tensor], Tensor]:
    """Gradients relative to the root mean square of their tensor's.

    x = rms * grad / sqrt(v / (1 - beta2^step)),   v <- beta2 v + (1 - beta2) mean grad^2

    Args:
        grads: real tensors of this rank.
        squares: v of each before the step, 0-dim; left as they are.
        steps: number of this step for each, 0-dim.
        config: for its ``beta2``.
        rms: ``input_rms``.
        wholes: what ``grads`` are the local, real views of, in shape and placement.

    Returns:
        x, and v of all [K] after the step: of a tensor with a gradient that is not finite what it was, but for the
        bias towards the start.
    """
    wholes = grads if wholes is None else wholes
    v, step = torch.stack(list(squares)), torch.stack(list(steps)).to(squares[0].dtype)
    grads = [grad.to(v.dtype) for grad in grads]
    means, finite = _mean_squares(grads, wholes, gradient_limit(config, v.dtype, v.dtype), v.dtype)
    v, factors = _next_square(v, means, finite, step, config.beta2, rms)
    return list(torch._foreach_mul(grads, list(factors.unbind()))), v


def _mean_squares(grads, wholes, limit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean squares [K] of gradients, and whether these are finite: their norm below what one coordinate has to be."""
    roots = root_mean_squares(grads, wholes, dtype)
    norms = torch._foreach_mul(roots, [_root_of_count(whole) for whole in wholes])
    return torch.stack(roots).square(), torch.stack(norms) < limit


def _next_square(
    v: Tensor, means: Tensor, finite: Tensor, step: Tensor, beta: float, scale: float, growth: float = math.inf
) -> tuple[Tensor, Tensor]:
    """v after a step, of tensors whose mean squares are given, and scale / sqrt of it, 0 where v is.

    growth: of a mean square, at most, beside v as it was.
    """
    biases = _bias(beta, step - 1)
    before = torch.where(biases > 0, v / torch.where(biases > 0, biases, 1.0), 0.0)
    if growth < math.inf:
        means = torch.where(before > 0, torch.minimum(means, growth * before), means)
    v = beta * v + (1 - beta) * torch.where(finite, means, before)
    unbiased = v / _bias(beta, step)
    return v, torch.where(unbiased >= SMALLEST, scale / unbiased.clamp_min(SMALLEST).sqrt(), 0.0)


def _bias(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step, without the difference, which would cost float32 a third of its digits."""
    return -torch.expm1(math.log(beta) * step) if beta else (step > 0).to(step.dtype)


def update_sizes_(
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    config: Config,
    rms: float,
    max_rms: float,
    wholes: Sequence[Tensor] | None = None,
) -> Tensor:
    """How far tensors move: as far as Adam would, which goes far where gradients agree from step to step.

    r = rms * sqrt((1 + beta1) / (1 - beta1)) * RMS(m / (1 - beta1^step)) / sqrt(v / (1 - b^step)), at most max_rms
    v <- b v + (1 - b) mean grad^2,   b = 0.999

    A momentum of independent gradients without a mean has sqrt((1 - beta1) / (1 + beta1)) of their RMS, so that r is
    ``rms`` for noise. When gradients shrink, r does, until v has forgotten what they were. A mean square counts as at
    most a hundred times the v before it, without its bias, so that one outlier does not slow a tensor for long.

    Args:
        grads: real tensors of this rank, what the network has seen.
        states: after the step, [..., S].
        squares: v of each, 0-dim; moved on.
        steps: number of this step for each, 0-dim.
        config: for its ``beta1``.
        rms: ``update_rms``, also what a tensor has whose gradients were never finite.
        max_rms: ``max_update_rms``.
        wholes: what ``grads`` are the local, real views of, in shape and placement.

    Returns:
        r, [K]; 0 where all gradients were, or smaller than a square can be. Of a tensor with a gradient that is not
        finite, v stays what it was, but for the bias towards the start.
    """
    wholes = grads if wholes is None else wholes
    v, step = torch.stack(list(squares)), torch.stack(list(steps)).to(squares[0].dtype)
    limit = gradient_limit(config, v.dtype, states[0].dtype)
    means, finite = _mean_squares(grads, wholes, limit, v.dtype)
    roots = torch.stack(root_mean_squares([state[..., 0] for state in states], wholes, v.dtype))
    sizes, v = _next_sizes(v, means, finite, roots, step, config, rms, max_rms)
    torch._foreach_copy_(list(squares), list(v.unbind()))
    return sizes


def _next_sizes(
    v: Tensor, means: Tensor, finite: Tensor, roots: Tensor, step: Tensor, config: Config, rms: float, max_rms: float
) -> tuple[Tensor, Tensor]:
    """r and v after a step, of tensors whose mean squares and whose momenta's root mean squares are given."""
    scale = rms * math.sqrt((1 + config.beta1) / (1 - config.beta1))
    v, factors = _next_square(v, means, finite, step, SLOW_BETA, scale, MOST_GROWTH)
    found = (factors * roots / _bias(config.beta1, step)).clamp_max(max_rms)
    return torch.where((factors > 0) | finite, found, rms), v


def move_(
    params: Sequence[Tensor],
    updates: Updates,
    lr: Tensor,
    rms: float | Tensor,
    weight_decay: float = 0.0,
    wholes: Sequence[Tensor] | None = None,
    momenta: Tensor | None = None,
) -> None:
    """Move every parameter along its update, scaled; the updates are spent.

    Args:
        params: real tensors of this rank, changed in place.
        updates: from :func:`raw_updates`.
        lr: 0-dim, of the updates' dtype.
        rms: of every update, or [K], of each.
        weight_decay: decoupled, per unit of lr.
        wholes: what ``params`` are the local, real views of; DTensors have their RMS over all ranks.
        momenta: of matrices that begin with their orthogonalized momentum, from :func:`flat_momenta`; spent likewise.
    """
    pieces, wholes = updates.pieces, params if wholes is None else wholes
    held = is_held(updates.flat)  # known only as long as the updates are as the step has left them
    if momenta is not None:
        momenta.masked_fill_(held, 0.0)
        _scale_(updates, wholes, LEARNED_SHARE)
        _subtract_orthogonal_units_(updates, momenta, wholes)
        updates.flat.masked_fill_(held, 0.0)  # an orthogonalized matrix mixes coordinates
    _scale_(updates, wholes, lr * rms)
    if weight_decay:
        # In the updates' dtype, so that a parameter of half precision is rounded once.
        rates = updates.cut(torch.where(held, 0.0, -weight_decay * lr))
        torch._foreach_addcmul_(pieces, [param.to(updates.flat.dtype) for param in params], rates)
    torch._foreach_add_(list(params), pieces)


def _scale_(updates: Updates, wholes: Sequence[Tensor], rms: float | Tensor) -> None:
    rows = updates.rows(updates.flat)
    if any(map(is_sharded, wholes)):  # in the order that all ranks have: their parts may be of other shapes
        roots = root_mean_squares(updates.pieces, wholes)
        root = torch.stack([roots[place] for place in updates.order])
    else:
        norms = [torch.linalg.vector_norm(some, dim=1) / math.sqrt(max(1, some.shape[1])) for some in rows]
        root = torch.cat(norms)
    if isinstance(rms, Tensor) and rms.dim():
        sizes = rms.unbind()
        rms = torch.stack([sizes[place] for place in updates.order])
    factors = torch.where(root >= SMALLEST, rms / root, 0.0)
    for some, factor in zip(rows, factors.split([len(some) for some in rows]), strict=True):
        some.mul_(factor[:, None])


def flat_momenta(
    updates: Updates, grads: Sequence[Tensor], states: Sequence[Tensor], config: Config, maximize: bool = False
) -> Tensor:
    """:func:`momentum` of every tensor, in one piece of memory that :meth:`Updates.cut` cuts up."""
    share, flat = 1 - config.beta1, torch.empty_like(updates.flat)
    pieces = updates.cut(flat)
    torch._foreach_copy_(pieces, [state[..., 0] for state in states])
    flat.mul_(config.beta1)
    torch._foreach_add_(pieces, list(grads), alpha=-share if maximize else share)
    return flat


def momentum(grad: Tensor, state: Tensor, config: Config, dtype: torch.dtype, maximize: bool = False) -> Tensor:
    """beta1 m + (1 - beta1) x, Nesterov's, after the step that has moved the state's m.

    Args:
        grad: x, [...].
        state: [..., S].
        config: for its ``beta1``.
        dtype: of the result.
        maximize: m is of -x.
    """
    share = 1 - config.beta1
    return torch.add(config.beta1 * state[..., 0].to(dtype), grad.to(dtype), alpha=-share if maximize else share)


def root_mean_squares(
    updates: Sequence[Tensor], wholes: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """RMS of each, 0-dim and of ``dtype`` if given; of what is sharded, over the whole tensor. An empty one has 0."""
    counts = [_root_of_count(whole) for whole in wholes]
    if dtype is not None:  # a norm is taken in a wider dtype, not in a narrower one
        updates = [update.to(dtype) if update.dtype.itemsize > dtype.itemsize else update for update in updates]
    roots = list(torch._foreach_div(torch._foreach_norm(list(updates), dtype=dtype), counts))
    sharded = {place: whole for place, whole in enumerate(wholes) if is_sharded(whole)}
    if not sharded:
        return roots
    from torch.distributed.tensor import DTensor, Partial, Replicate

    groups: dict[tuple, list[int]] = {}
    for place, whole in sharded.items():
        kinds = tuple(placement.is_replicate() for placement in whole.placements)
        groups.setdefault((whole.device_mesh, kinds), []).append(place)
    for (mesh, kinds), places in groups.items():  # one vector of squares for each way to shard
        squares = torch.stack([roots[place] for place in places]).square()
        summands = [Replicate() if replicated else Partial() for replicated in kinds]
        summed = DTensor.from_local(squares, mesh, summands, run_check=False).full_tensor().sqrt()
        for place, root in zip(places, summed.unbind(), strict=True):
            roots[place] = root
    return roots


def _root_of_count(whole: Tensor) -> float:
    """The root of the number of real coordinates: a norm beside its RMS."""
    return math.sqrt(max(1, whole.numel() * (2 if whole.is_complex() else 1)))


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Asked of the class: torch.compile answers no for the tensor itself."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(type(tensor), "to_local")


# ---------------------------------------------------------------- matrices


def is_matrix(tensor: Tensor) -> bool:
    """Whether ``orthogonalize`` takes it: two dimensions or more, none of them a vocabulary's."""
    return _is_matrix(tensor.shape)


def _is_matrix(shape: torch.Size) -> bool:
    return len(shape) > 1 and max(shape[0], math.prod(shape[1:])) <= MAX_SIDE


def _subtract_orthogonal_units_(updates: Updates, momenta: Tensor, wholes: Sequence[Tensor]) -> None:
    """update <- update - NS(momentum) / RMS of it, matrices of one shape together."""
    alone: list[int] = []
    for (places, found), (_, given) in zip(updates.stacks(updates.flat), updates.stacks(momenta), strict=True):
        if any(is_sharded(wholes[place]) or wholes[place].is_complex() for place in places):
            alone += places
            continue
        if not found.numel():
            continue
        together = max(1, (TOGETHER_ON_GPU if found.is_cuda else TOGETHER) // given[0].numel())
        for some, matrices in zip(found.split(together), given.split(together), strict=True):
            o = orthogonalize_each(matrices.flatten(2))
            factor = _unit_factor(o, (1, 2))
            some.addcmul_(o.view(some.shape), factor.view(-1, *[1] * (some.dim() - 1)), value=-1)
    pieces = updates.cut(momenta)
    for place in sorted(alone):  # in the order that all ranks have
        updates.pieces[place].sub_(_orthogonal_unit(pieces[place], wholes[place]))


def _orthogonal_unit(update: Tensor, whole: Tensor) -> Tensor:
    """The same of one that may be complex, and a rank's part: gathered, orthogonalized, and cut up again."""
    update = torch.view_as_complex(update.contiguous()) if whole.is_complex() else update
    if is_sharded(whole):
        from torch.distributed.tensor import DTensor, Replicate

        mesh, placements = whole.device_mesh, whole.placements
        shape, stride = whole.shape, torch.empty(whole.shape, device="meta").stride()
        update = DTensor.from_local(
            update.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
        ).full_tensor()
        spread = DTensor.from_local(unit(orthogonalize(update)), mesh, [Replicate()] * mesh.ndim, run_check=False)
        found = spread.redistribute(mesh, placements).to_local()
    else:
        found = unit(orthogonalize(update))
    return torch.view_as_real(found.resolve_conj()) if whole.is_complex() else found


def unit(matrix: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """matrix / RMS(matrix), over all of it or some dimensions; 0 where that is 0. A complex number counts as a pair."""
    return matrix * _unit_factor(matrix, dims)


def _unit_factor(matrix: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    squares = torch.view_as_real(matrix).square().sum(-1) / 2 if matrix.is_complex() else matrix.square()
    mean = squares.mean(dims, keepdim=True) if dims else squares.mean()
    moves = mean > 0  # twice asked: autograd would make NaN of 0 rsqrt(0)
    return torch.where(moves, torch.where(moves, mean, 1.0).rsqrt(), 0.0)


@outside_autocast
def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Near the orthogonal matrix U V^H of an update U S V^H: its singular values become 0.7 to 1.2.

    X <- a X + b (X X^H) X + c (X X^H)^2 X, five times from X = update / ||update||

    Args:
        update: [out, ...], two dimensions or more; a convolution's kernel counts as [out, -1].
        steps: of the iteration.

    Returns:
        a tensor of its shape; 0 where all of it is 0. Rows and columns of zeros stay.

    Example:
        >>> import torch
        >>> from l2l_fast.normalize import orthogonalize
        >>> bool((torch.linalg.svdvals(orthogonalize(torch.randn(6, 4, 3, 3)).flatten(1)) < 1.3).all())
        True

    References:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """
    return _newton_schulz(update.flatten(1)[None], steps).reshape(update.shape)


@outside_autocast
def orthogonalize_each(matrices: Tensor, steps: int = 5) -> Tensor:
    """:func:`orthogonalize` of B matrices [B, out, in]."""
    return _newton_schulz(matrices, steps)


def _newton_schulz(x: Tensor, steps: int) -> Tensor:
    def adjoint(matrices: Tensor) -> Tensor:  # of real ones mH does more work on the host than a small product
        return matrices.mH if matrices.is_complex() else matrices.mT

    dtype = x.dtype
    if x.numel():  # of a gradient that has vanished the squares would be 0, or that of a large one infinite
        x = x / x.detach().abs().amax((1, 2), keepdim=True).clamp_min(SMALLEST)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(SMALLEST)
    if _on_matrix_units(x):
        x = x.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else adjoint(x)
    a, b, c = _QUINTIC
    for _ in range(steps):
        square = torch.bmm(x, adjoint(x))
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return (x if wide else adjoint(x).resolve_conj()).to(dtype)


def _on_matrix_units(x: Tensor) -> bool:
    """Whether products are taken in bfloat16, as Muon has them: on a GPU that is 16 times as fast, and good enough.

    The iteration leaves singular values anywhere between 0.7 and 1.2; the rounding moves them by 0.01.
    """
    return x.is_cuda and x.dtype == torch.float32


# ---------------------------------------------------------------- rows of several tensors, as in meta-training


def relative_rows(grads: Tensor, v: Tensor, step: Tensor, sizes: Sequence[int], config: Config, rms: float) -> Tensor:
    """:func:`relative` of rows [..., N] that hold one tensor after another; moves v [..., K] on."""
    means, finite = _mean_squares_of_rows(grads, sizes, gradient_limit(config, v.dtype, v.dtype))
    moved, factors = _next_square(v, means, finite, step.to(v.dtype), config.beta2, rms)
    v.copy_(moved)
    pieces = grads.split(list(sizes), -1)
    return torch.cat([piece * factors[..., place, None] for place, piece in enumerate(pieces)], -1)


def _mean_squares_of_rows(rows: Tensor, sizes: Sequence[int], limit: float) -> tuple[Tensor, Tensor]:
    """:func:`_mean_squares` of rows [..., N] that hold one tensor after another, [..., K] each; differentiable."""
    sums = [piece.square().sum(-1) for piece in rows.split(list(sizes), -1)]
    means = [one / max(1, size) for one, size in zip(sums, sizes, strict=True)]
    return torch.stack(means, -1), torch.stack(sums, -1) < limit**2


def size_rows(
    grads: Tensor, momenta: Tensor, v: Tensor, step: Tensor, sizes: Sequence[int], config: Config, rms: float,
    max_rms: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`update_sizes_` of rows [..., N] that hold one tensor after another: r and v after the step, [..., K].

    Args:
        grads: what the network has seen, [..., N].
        momenta: m after the step, [..., N].
        v: before the step, [..., K]; left as it is.
        step: 0-dim.
        sizes: coordinates of each tensor; their sum is N.
        config, rms, max_rms: as the function has them.

    Returns:
        both differentiable.
    """
    limit = gradient_limit(config, grads.dtype, momenta.dtype)
    means, finite = _mean_squares_of_rows(grads, sizes, limit)
    squares, _ = _mean_squares_of_rows(momenta, sizes, limit)
    moves = squares > 0  # twice asked: autograd would make NaN of a root's derivative at 0
    roots = torch.where(moves, torch.where(moves, squares, 1.0).sqrt(), 0.0)
    return _next_sizes(v, means, finite, roots, step.to(v.dtype), config, rms, max_rms)


def join_rows(updates: Tensor, momenta: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """d / (2 RMS(d)) - o / RMS(o) of the matrices in rows, o being their orthogonalized momenta; d of other tensors.

    Args:
        updates: d, [B, N].
        momenta: [B, N].
        shapes: of each tensor of an instance.

    Returns:
        [B, N].
    """
    sizes, found = [math.prod(shape) for shape in shapes], []
    for d, momentum, shape in zip(updates.split(sizes, -1), momenta.split(sizes, -1), shapes, strict=True):
        if _is_matrix(shape):
            o = unit(orthogonalize_each(momentum.reshape(len(d), shape[0], -1)), (1, 2))
            d = _scaled(d, LEARNED_SHARE)[0] - o.reshape(d.shape)
        found.append(d)
    return torch.cat(found, -1)


def join_rows_backward(d_joined: Tensor, updates: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """dL/dd of :func:`join_rows`, [..., N]."""
    sizes, found = [math.prod(shape) for shape in shapes], []
    for g, d, shape in zip(d_joined.split(sizes, -1), updates.split(sizes, -1), shapes, strict=True):
        found.append(_scaled_backward(g, d, LEARNED_SHARE) if _is_matrix(shape) else g)
    return torch.cat(found, -1)


def scale_rows(updates: Tensor, sizes: Sequence[int], rms: float | Tensor) -> Tensor:
    """r * d / RMS(d) of rows that hold one tensor after another.

    Args:
        updates: d, [..., N].
        sizes: coordinates of each tensor; their sum is N.
        rms: r: ``update_rms``, or [..., K], from :func:`size_rows`.

    Returns:
        [..., N]; differentiable, any number of times.
    """
    pieces = updates.split(list(sizes), -1)
    return torch.cat([_scaled(piece, r)[0] for piece, r in zip(pieces, _by_tensor(rms, sizes), strict=True)], -1)


def _by_tensor(rms: float | Tensor, sizes: Sequence[int]) -> list:
    """r of each tensor, which its coordinates can be multiplied by."""
    return list(rms[..., None].unbind(-2)) if isinstance(rms, Tensor) else [rms] * len(sizes)


def scale_rows_backward(d_scaled: Tensor, updates: Tensor, sizes: Sequence[int], rms: float | Tensor) -> Tensor:
    """dL/dd of :func:`scale_rows`, without a graph; r counts as a constant.

    dL/dd = (r / rho) * (g - d * mean(g d) / rho^2),   rho = RMS(d), g = dL/d(scaled)

    Args:
        d_scaled: g, [..., N].
        updates, sizes, rms: as the function had them.

    Returns:
        [..., N]; 0 for tensors whose d is 0.
    """
    pieces = d_scaled.split(list(sizes), -1), updates.split(list(sizes), -1), _by_tensor(rms, sizes)
    return torch.cat([_scaled_backward(*piece) for piece in zip(*pieces, strict=True)], -1)


def _scaled_backward(d_scaled: Tensor, updates: Tensor, rms: float | Tensor) -> Tensor:
    """Of one tensor, over the last dimension."""
    d, inverse = _scaled(updates, 1.0)  # d / rho and 1 / rho
    return rms * inverse * (d_scaled - d * (d_scaled * d).mean(-1, keepdim=True))


def _scaled(updates: Tensor, rms: float | Tensor) -> tuple[Tensor, Tensor]:
    """d scaled over its last dimension, and the factors [..., 1]."""
    mean = updates.square().mean(-1, keepdim=True)
    moves = mean > 0
    factor = torch.where(moves, rms / torch.where(moves, mean, 1.0).sqrt(), 0.0)
    return updates * factor, factor
