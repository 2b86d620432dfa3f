"""A plain nn.Module, data and a loss as a task."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from l2l_fast.checks import require
from l2l_fast.tasks.base import Resident, look_up


class ModuleTask:
    r"""Training your own module on your own data.

    f(theta) = loss_fn(module_theta(x[rows]), y[rows], ...),   rows drawn with replacement

    The module's trainable parameters are the coordinates. Its frozen parameters and buffers are constants of the task,
    the same for every trajectory: those of the first module made. It must be a function of its parameters and input
    alone: no dropout, no running statistics.

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
            depend on (freeze them), is random or changes its buffers in its forward pass, the data do not share M, the
            test data are of another kind, or the loss is not a scalar.

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
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.make_module, self.loss_fn = make_module, loss_fn
        self.batch_size, self.name, self.resample = batch_size, name, resample
        self._module = self._make(seed=0)
        _check_module(self._module)
        self._data, self._constants = Resident(self.data), Resident(_constants(self._module))
        self._try()

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
        module = self._make(int(torch.randint(2**62, (), generator=generator)))
        return {name: param.detach().clone() for name, param in _trainable(module).items()}

    def sample(self, generator: torch.Generator) -> Tensor:
        """Rows [n] of the data, int64, on the CPU."""
        return torch.randint(len(self.data[0]), (self.batch_size,), generator=generator)

    def loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        """``loss_fn`` of the module's output on one minibatch.

        loss_fn(module_params(x[batch]), y[batch], ...)

        Args:
            params: those of :meth:`init`.
            batch: rows [n] of the data, int64, on the device of ``params``.

        Returns:
            0-dim.
        """
        inputs, *targets = (look_up(tensor, batch) for tensor in self._data.on(batch.device))
        constants = self._constants.on(batch.device)
        return self.loss_fn(functional_call(self._module, (params, constants), (inputs,)), *targets)

    def _make(self, seed: int) -> nn.Module:
        # Only the CPU's generator: torch.manual_seed would reseed every GPU's as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = self.make_module()
        if not isinstance(module, nn.Module):
            raise ValueError(f"make_module must return a torch.nn.Module, got {type(module).__name__}")
        return module

    def _try(self) -> None:
        """Differentiate two instances on two rows: what cannot work is refused here, not in the middle of training."""
        buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        params = {
            name: param.detach().expand(2, *param.shape).requires_grad_()
            for name, param in _trainable(self._module).items()
        }
        batch = torch.arange(min(2, len(self.data[0]))).expand(2, -1)
        try:
            with torch.enable_grad():
                losses = torch.vmap(self.loss)(params, batch)
                grads = _gradients(losses, params)
        except RuntimeError as error:
            raise ValueError(
                "the module and its loss cannot be differentiated under torch.vmap (they may not be random, nor change "
                f"anything in place, nor branch on values): {error}"
            ) from error
        if losses.shape != (2,):
            raise ValueError(f"loss_fn must return a scalar, got shape {list(losses.shape[1:])}")
        _check_gradients(grads)
        for name, buffer in self._module.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                raise ValueError(f"the module changes its buffer {name} in its forward pass: put it into eval() mode")


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
    """What can be refused by name."""
    for name, part in module.named_modules():
        where = f"{type(part).__name__} ({name or 'the module itself'})"
        if getattr(part, "track_running_stats", False) and part.training:
            raise ValueError(
                f"{where} keeps running statistics, so that a loss would change the next: give it "
                "track_running_stats=False, or use GroupNorm"
            )
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
