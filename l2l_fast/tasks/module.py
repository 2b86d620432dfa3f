"""A plain nn.Module, data and a loss as a task."""

from __future__ import annotations

import copy
import functools
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from l2l_fast.checks import function, require, whole
from l2l_fast.modes import plain
from l2l_fast.tasks.base import Resident, batched, look_up

_one_thread = threading.RLock()  # at a time: modules are made with torch's global generator
TRIES = 8  # evaluations of the same, in which a module or a loss that is not a function shows itself
_SAME = {"rtol": 1e-4, "atol": 1e-6, "equal_nan": True}  # two evaluations of one point


class ModuleTask:
    r"""Training your own module on your own data.

    f(theta) = loss_fn(module_theta(x[rows]), y[rows], ...),   rows drawn with replacement

    The module's trainable parameters are the coordinates. Its frozen parameters and buffers are constants of the task,
    the same for every trajectory: those of the first module made. Its loss must be a function of its parameters and its
    input: no dropout. Buffers that the forward pass changes and the loss does not depend on, such as the running
    statistics of a BatchNorm, may be there: :meth:`loss` leaves them alone, :meth:`loss_and_buffers` carries them along
    a trajectory, and :meth:`evaluation_loss` uses them as eval() mode does. What ``torch.vmap`` cannot batch, such as
    ``nn.LSTM`` or a branch on values, is evaluated one instance after another.

    Args:
        make_module: makes a freshly initialised module. It draws from torch's global CPU generator, which is seeded
            from the trajectory's generator for the call and afterwards left as it was.
        data: a tensor [M, ...], the module's input, or a tuple of tensors sharing M: the input, then what ``loss_fn``
            takes besides the module's output.
        loss_fn: ``loss_fn(output, *targets) -> scalar``.
        batch_size: rows of a minibatch.
        name: what tables call it.
        resample: True draws new rows at every step; False draws them once a trajectory.
        test_data: as ``data``, for comparisons, so that optimizers are judged on rows they did not learn on. None: on
            those of ``data``, from other starts and in other minibatches.

    Raises:
        ValueError: if the module has no trainable parameters, some that are not float32 or some that its loss does not
            depend on (freeze them), its start does not follow from torch's seed, its loss is random, depends on what
            the forward pass changes or is not a scalar, the data do not share M, or the test data are of another kind.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> task = l2l.tasks.ModuleTask(lambda: torch.nn.Linear(1, 1), (x, 3 * x), torch.nn.functional.mse_loss)
        >>> generator = torch.Generator().manual_seed(0)
        >>> task.loss(task.init(generator), task.sample(generator)).shape
        torch.Size([])

    References:
        ``torch.func.functional_call``, https://docs.pytorch.org/docs/stable/generated/torch.func.functional_call.html
    """

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        data: Tensor | tuple[Tensor, ...],
        loss_fn: Callable[..., Tensor],
        *,
        batch_size: int = 128,
        name: str = "module",
        resample: bool = True,
        test_data: Tensor | tuple[Tensor, ...] | None = None,
    ) -> None:
        self.data = _as_tuple(data)
        _check_data(self.data, "data")
        self._halves = {"meta-train": self.data, "meta-test": self.data}
        if test_data is not None:
            self._halves["meta-test"] = _as_tuple(test_data)
            _check_test_data(self._halves["meta-test"], self.data)
        self.make_module = function("make_module", make_module, "a function that makes a module")
        self.loss_fn = function("loss_fn", loss_fn, "a function of the module's output and the targets")
        self.batch_size, self.name, self.resample = whole("batch_size", batch_size, 1), name, resample
        with plain():
            self._module = self._make(seed=0)
            _check_module(self._module)
            _check_start(self._module, self._make(seed=0))
            self._data, self._constants = Resident(self.data), Resident(_constants(self._module))
            self._changing: list[str] = list(dict(self._module.named_buffers()))  # for all that is known so far
            self._changing = self._try()
            self._vmap = self._can_be_batched()

    @property
    def vmap(self) -> bool:
        """Whether ``torch.vmap`` can batch the loss."""
        return self._vmap

    def with_half(self, half: str) -> ModuleTask:
        """The same task on ``data`` ("meta-train") or on ``test_data`` ("meta-test"), if it was given."""
        require(half in self._halves, "half", half, f"one of {', '.join(map(repr, self._halves))}")
        other = copy.copy(self)
        other.data = self._halves[half]
        other._data = Resident(other.data)
        return other

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Trainable parameters of a freshly made module.

        Args:
            generator: of the CPU; seeds torch's global one for the call.

        Returns:
            by the module's names, in its shapes, float32.

        Raises:
            ValueError: if ``make_module`` gives something else than a module.
        """
        seed = torch.randint(2**62, (), generator=generator, dtype=torch.int64, device="cpu")
        return {name: param.detach().clone() for name, param in _trainable(self._make(int(seed))).items()}

    def module(self, generator: torch.Generator) -> nn.Module:
        """The module of :meth:`init` itself, as ``make_module`` returns it, to be trained by any loop."""
        return self._make(int(torch.randint(2**62, (), generator=generator, dtype=torch.int64, device="cpu")))

    def sample(self, generator: torch.Generator) -> Tensor:
        """Rows [n] of the data, int64, on the CPU."""
        size = (self.batch_size,)
        return torch.randint(len(self.data[0]), size, generator=generator, dtype=torch.int64, device="cpu")

    def loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        """``loss_fn`` of the module's output on one minibatch.

        loss_fn(module_params(x[batch]), y[batch], ...)

        Args:
            params: those of :meth:`init`.
            batch: rows [n] of the data, int64, on the device of ``params``.

        Returns:
            0-dim.
        """
        return self.loss_and_buffers(params, batch)[0]

    def loss_and_buffers(
        self, params: dict[str, Tensor], batch: Tensor, buffers: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`loss`, and the buffers that the forward pass changes, as they are after it.

        Args:
            params: those of :meth:`init`.
            batch: rows [n] of the data, int64, on the device of ``params``.
            buffers: by name, those returned for the minibatch before; None for those of a fresh module.

        Returns:
            the 0-dim loss, and buffers by name, none of them that was given; {} if the forward pass changes none.

        Example:
            >>> import torch, l2l_fast as l2l
            >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
            >>> make = lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
            >>> task = l2l.tasks.ModuleTask(make, (x, 3 * x), torch.nn.functional.mse_loss)
            >>> generator, buffers = torch.Generator().manual_seed(0), None
            >>> params = task.init(generator)
            >>> for _ in range(3):
            ...     loss, buffers = task.loss_and_buffers(params, task.sample(generator), buffers)
            >>> buffers["0.num_batches_tracked"], task.evaluation_loss(params, task.sample(generator), buffers).shape
            (tensor(3), torch.Size([]))
        """
        constants = self._constants.on(batch.device)
        given = constants | params
        first = next(param for param in params.values() if param.numel()).detach()
        for name in self._changing:
            buffer = constants[name] if buffers is None else buffers[name]
            given[name] = _own(buffer, first, batch)
        return self._run(self._module, given, batch), {name: given[name].detach() for name in self._changing}

    def evaluation_loss(
        self, params: dict[str, Tensor], batch: Tensor, buffers: dict[str, Tensor] | None = None
    ) -> Tensor:
        """``loss_fn`` of the output that the module has in eval() mode.

        Args:
            params: those of :meth:`init`.
            batch: rows [n] of the data (of ``test_data``, for the task ``with_half("meta-test")``), int64.
            buffers: what :meth:`loss_and_buffers` gave along the trajectory; None for those of a fresh module.

        Returns:
            0-dim.
        """
        given = self._constants.on(batch.device) | (buffers or {}) | params
        return self._run(self._evaluated, given, batch)

    @functools.cached_property
    def _evaluated(self) -> nn.Module:
        """The module in eval() mode."""
        module = self._make(seed=0)
        return (copy.deepcopy(module) if module is self._module else module).eval()

    def _run(self, module: nn.Module, tensors: dict[str, Tensor], batch: Tensor) -> Tensor:
        """The loss with these for all parameters and buffers, among which buffers that are replaced come back."""
        inputs, *targets = (look_up(tensor, batch) for tensor in self._data.on(batch.device))
        return self.loss_fn(functional_call(module, tensors, (inputs,)), *targets)

    def _make(self, seed: int) -> nn.Module:
        # Only the CPU's generator: torch.manual_seed would reseed every GPU's as well. It is every thread's.
        with _one_thread, torch.random.fork_rng(devices=[]), plain():
            torch.default_generator.manual_seed(seed)
            module = self.make_module()
        if not isinstance(module, nn.Module):
            raise ValueError(f"make_module must return a torch.nn.Module, got {type(module).__name__}")
        for part in module.modules():
            if isinstance(part, nn.RNNBase):
                # On a GPU it would move the weights that are given for a call out of the trajectory's memory.
                part.flatten_parameters = _leave
        return module

    def _try(self) -> list[str]:
        """Evaluate and differentiate one instance on two rows: what cannot work is refused here, and not in training.

        Returns:
            names of the buffers that the forward pass changes.
        """
        params, rows = _start(self._module), self._some_rows()
        tensors = [*_tensors(self._module).items(), *params.items()]
        before = [tensor.detach().clone() for _, tensor in tensors]
        try:
            with _one_thread, _watched_generators():
                loss, _ = self.loss_and_buffers(params, rows)
                _check_loss(loss)
                grads = _gradients(loss, params)
                again = [self.loss(params, rows) for _ in range(TRIES - 1)]
                # At another point: what an iteration has brought to rest at the start does not change there.
                moved = {name: _moved(param) for name, param in params.items()}
                there, buffers = self.loss_and_buffers(moved, rows)
                fresh = _tensors(self._module)
                changing = [name for name, buffer in buffers.items() if not _equal(buffer, fresh[name])]
                others = {name: _another(buffer) if name in changing else buffer for name, buffer in buffers.items()}
                with_others, _ = self.loss_and_buffers(moved, rows, others)
        except RuntimeError as error:
            raise ValueError(f"the module and its loss cannot be evaluated and differentiated: {error}") from error
        _check_gradients(grads)
        for (name, tensor), was in zip(tensors, before, strict=True):
            if not _equal(tensor, was):
                raise ValueError(f"the forward pass changes {name} in place: make a new tensor of it")
        for one in again:
            if not torch.allclose(loss, one, **_SAME):
                raise ValueError(
                    f"the loss must follow from the parameters and the rows alone, and was {loss.item():.6g} and "
                    f"{one.item():.6g} of the same: the module or loss_fn is random, or counts its calls"
                )
        if not torch.allclose(there, with_others, **_SAME):
            raise ValueError(
                f"the loss depends on {_listed(changing)}, which the forward pass changes, so that a loss would change "
                "the next: put the module into eval() mode, or do without"
            )
        return changing

    def _can_be_batched(self) -> bool:
        """Whether ``torch.vmap`` does, twice over as comparisons need it, what a loop does."""
        params, rows = _start(self._module), self._some_rows()
        losses = {}
        for self._vmap in (False, True):  # which ``batched`` asks for
            several = {
                name: param.detach().expand(2, 2, *param.shape).requires_grad_() for name, param in params.items()
            }
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message=".*performance drop")  # one that loops by itself, slower
                    found = batched(self, batched(self, self.loss), (0, None))(several, rows.expand(2, -1))
                    grads = torch.autograd.grad(found.sum(), list(several.values()))
            except Exception:
                if self._vmap:
                    return False
                raise
            losses[self._vmap] = found.detach(), torch.cat([grad.flatten() for grad in grads]).nan_to_num()
        (loss, grad), (other, other_grad) = losses.values()
        return torch.allclose(loss, other, **_SAME) and bool((grad - other_grad).norm() <= 1e-3 * grad.norm())

    def _some_rows(self) -> Tensor:
        return torch.arange(min(2, self.batch_size), dtype=torch.int64, device="cpu") % len(self.data[0])


def _leave() -> None:
    """In the place of ``flatten_parameters``."""


def _own(buffer: Tensor, *others: Tensor) -> Tensor:
    """A copy to be written on, which under ``torch.vmap`` each instance has for itself as it has ``others``."""
    numbers = [torch.zeros_like(other[(0,) * other.ndim], dtype=torch.bool) for other in others]
    return torch.where(torch.stack(numbers).any(), buffer, buffer)


@contextmanager
def _watched_generators() -> Iterator[None]:
    """Refuse what draws random numbers."""
    states = {
        "torch's": lambda: torch.random.get_rng_state().tolist(),
        "NumPy's": lambda: [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002
        "Python's": random.getstate,
    }
    before = {name: state() for name, state in states.items()}
    yield
    if drawn := [name for name, state in states.items() if state() != before[name]]:
        raise ValueError(
            f"the module or loss_fn is random, and a task's loss is not: it draws from {' and '.join(drawn)} "
            "generator; put it into eval() mode, or do without"
        )


def _start(module: nn.Module) -> dict[str, Tensor]:
    """Parameters to differentiate in, apart from the module's own."""
    return {name: param.detach().clone().requires_grad_() for name, param in _trainable(module).items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def _constants(module: nn.Module) -> dict[str, Tensor]:
    trainable = _trainable(module)
    frozen = {name: param.detach() for name, param in module.named_parameters() if name not in trainable}
    return frozen | dict(module.named_buffers())


def _gradients(losses: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Of the sum of the losses; None where they do not depend on the parameter."""
    if not losses.requires_grad:
        return dict.fromkeys(params)
    grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
    return dict(zip(params, grads, strict=True))


def _moved(param: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(param.numel())
    noise = torch.randn(param.shape, generator=generator, dtype=torch.float32, device="cpu")
    return param.detach() + 0.1 * noise


def _another(buffer: Tensor) -> Tensor:
    """A value that it does not have."""
    return ~buffer if buffer.dtype == torch.bool else 2 * buffer + 1


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _check_loss(loss: Tensor) -> None:
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss_fn must return a scalar tensor, got {type(loss).__name__}")
    if loss.shape != ():
        raise ValueError(f"loss_fn must return a scalar, got shape {list(loss.shape)}")


def _check_gradients(grads: dict[str, Tensor | None]) -> None:
    # Zeros in their place would hide a layer that was forgotten, and cost an optimizer's state for each coordinate.
    unused = [name for name, grad in grads.items() if grad is None]
    if len(unused) == len(grads):
        raise ValueError(
            "the loss does not depend on the module's parameters in a way that can be differentiated: use loss_fn's "
            "first argument, without detach(), argmax or a comparison"
        )
    if unused:
        raise ValueError(
            f"the loss does not depend on {_listed(unused)}: use each in the module's forward pass, or freeze it in "
            "make_module by requires_grad_(False)"
        )
    if sparse := [name for name, grad in grads.items() if grad.layout != torch.strided]:
        raise ValueError(
            f"the gradient of {_listed(sparse)} is sparse, and optimizers here take dense ones: for nn.Embedding, "
            "sparse=False"
        )


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _as_tuple(data: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (data,) if isinstance(data, Tensor) else tuple(data)


def _check_data(data: tuple[Tensor, ...], name: str) -> None:
    if not data or not all(isinstance(tensor, Tensor) and tensor.ndim > 0 for tensor in data):
        raise ValueError(f"{name} must be a tensor or a tuple of tensors, each of at least one dimension")
    lengths = [len(tensor) for tensor in data]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(f"{name} must share a first dimension of at least 1, got lengths {lengths}")


def _check_test_data(test_data: tuple[Tensor, ...], data: tuple[Tensor, ...]) -> None:
    _check_data(test_data, "test_data")
    found, needed = ([(list(tensor.shape[1:]), tensor.dtype) for tensor in tensors] for tensors in (test_data, data))
    if found != needed:
        raise ValueError(f"test_data must have rows like those of data, {needed}, got {found}")


def _check_module(module: nn.Module) -> None:
    """What can be refused by name, before anything runs."""
    for name, part in module.named_modules():
        where = f"{type(part).__name__} ({name or 'the module itself'})"
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"{where} is random, and a task's loss is not: set p=0 or put it into eval() mode")
    trainable = _trainable(module)
    if not trainable:
        raise ValueError("the module has no trainable parameters, so that there is nothing to optimize")
    if others := [name for name, param in trainable.items() if param.dtype != torch.float32]:
        raise ValueError(
            f"the module's trainable parameters must be float32, as a task's are, got {trainable[others[0]].dtype} for "
            f"{_listed(others)}: make the module float32 in make_module, as float() does, and the data to suit it"
        )


def _check_start(module: nn.Module, again: nn.Module) -> None:
    """Two modules of one seed."""
    others = _tensors(again)
    differ = [name for name, tensor in _tensors(module).items() if not _equal(tensor.detach(), others[name].detach())]
    if differ:
        raise ValueError(
            "make_module must make the same module whenever torch's generator has the same seed, and "
            f"{_listed(differ)} differ: draw from torch's global generator, neither Python's nor NumPy's"
        )
