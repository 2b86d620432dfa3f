"""The learned optimizer as an ordinary ``torch.optim.Optimizer``."""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from contextlib import ExitStack
from numbers import Real
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from l2l_fast import _native, arguments, normalize, ops
from l2l_fast.checkpoint import shipped
from l2l_fast.checks import require
from l2l_fast.config import STATE_DTYPES, Config, gradient_limit, state_size
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.normalize import is_sharded

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # known not to be sharded without asking, which takes a microsecond each
# torch 2.14's compiler cannot follow the gradients that fully_shard makes.
_HIDES_SHARDED = torch.__version__ >= "2.14"
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
# Options of param groups that not every version's state_dict has, with what such a state_dict means.
_LATER_OPTIONS = {"maximize": False, "orthogonalize": False}
_OPTIONS_OF_ALL = ("state_dtype", "fused", "error_if_nonfinite")  # the optimizer's, not a group's


class _Network(NamedTuple):
    """A network as an optimizer holds it."""

    config: Config
    weights: Tensor  # flat, on the CPU
    update_rms: float | None = None
    default_lr: float = 1.0
    input_rms: float | None = None
    orthogonalize: bool = False
    max_update_rms: float | None = None


class _Call(NamedTuple):
    """What one call of ``lstm_step_`` steps: parameters of one group on one device."""

    params: list[Tensor]
    arguments: tuple
    network: _Network
    orthogonalize: bool
    squares: dict[str, list[Tensor]]  # mean squares that the network needs, by their names in the state


class LSTMOptimizer(Optimizer):
    r"""An update rule that was learned: an LSTM shared by all parameters, with a state for each of their coordinates.

    theta <- theta - lr * weight_decay * theta + lr * u,   (u, state) <- m(grad, state; phi)

    A network with ``update_rms`` = r, such as the default one, moves a tensor by lr * r * u / RMS(u), the root mean
    square being over the whole tensor, so ``lr``, its schedule and ``weight_decay`` are what they are for AdamW. With
    ``max_update_rms`` as well, r is larger where a tensor's gradients agree from step to step, as Adam's update is.

    A coordinate whose gradient is not finite keeps its value and its state, and counts as u = 0. The network is copied
    when the optimizer is made: training it further does not change this optimizer.

    Args:
        params: parameters, or param groups, each with its own ``lr``, ``weight_decay``, ``maximize``, ``orthogonalize``
            or ``network``. The other options are those of all groups.
        network: a :class:`CoordinatewiseLSTM`, a shipped name, a folder or a hub id.
        lr: multiplier of the update, a float or a 0-dim tensor. None is the ``default_lr`` of a group's network: 0.001
            with ``update_rms``, a rate as AdamW has it; otherwise 1, which is what the network was trained for.
        weight_decay: decoupled weight decay, per unit of lr.
        maximize: ascend instead of descend.
        orthogonalize: of networks with ``update_rms`` and moments: begin with Muon's update where a tensor has two
            dimensions or more. u, with RMS 1/2, is added to the momentum after five Newton-Schulz steps
            (:func:`~l2l_fast.normalize.orthogonalize`), with RMS 1, and their sum is scaled. None: as the network says.
            Left as they are: tensors of one dimension, and those with a side above 16,384, a vocabulary's. A sharded
            matrix is gathered for it.
        state_dtype: float32, or bfloat16: half the memory, but a step may be slower where the CPU has only AVX2; the
            arithmetic stays float32. float64 computes in float64. A gradient that is not finite in the dtype of the
            arithmetic counts as one that is not; so does one whose square is not (2^63 in float32), which networks with
            moments form.
        fused: None: the compiled kernel where there is one; False: always the plain PyTorch reference; True: the
            compiled kernel, or an error that says why there is none for a parameter's device.
        error_if_nonfinite: raise on a gradient that is not finite, before anything is changed.

    Parameters may be sharded, as DTensors (``fully_shard``, tensor parallelism): their state then shards with them.

    Warns:
        UserWarning: for a network with ``update_rms`` a rate of 1 or more, or one that moves tensors by over 0.5.

    Raises:
        ValueError: an option out of its range, or a state_dict that belongs to another network.
        TypeError: a parameter of an unsupported dtype or kind, or a ``network`` that is none.
        FileNotFoundError: no network of that name.
        RuntimeError: ``fused=True`` without compiled kernels.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = l2l.LSTMOptimizer(model.parameters(), network=l2l.CoordinatewiseLSTM())
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    References:
        Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474
    """

    def __init__(
        self,
        params,
        network: CoordinatewiseLSTM | str | PathLike = "l2l-base",
        lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        orthogonalize: bool | None = None,
        state_dtype: torch.dtype = torch.float32,
        fused: bool | None = None,
        error_if_nonfinite: bool = False,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {', '.join(map(str, STATE_DTYPES))}, got {state_dtype}")
        require(fused in (None, True, False), "fused", fused, "True, False or None")
        require(error_if_nonfinite in (True, False), "error_if_nonfinite", error_if_nonfinite, "True or False")
        self.state_dtype, self.fused, self.error_if_nonfinite = state_dtype, fused, error_if_nonfinite
        self._networks: dict[str, _Network] = {}  # by the name that param groups and state_dicts carry
        self._constants: dict[tuple, Any] = {}  # lr and weights by device, configs as the ops take them
        self._rated = lr is not None  # or each group's rate is its network's
        options: dict[str, Any] = {"lr": 1.0 if lr is None else lr, "weight_decay": weight_decay, "maximize": maximize}
        options["orthogonalize"] = orthogonalize
        _check_options(options)  # groups need not use them, but those that are added later may
        name = self._adopt(network)
        if not self._rated:
            options["lr"] = self._networks[name].default_lr
        super().__init__(params, {**options, "network": name})

    # ------------------------------------------------------------ construction

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of parameters, with its own options if it names any.

        Args:
            param_group: ``params``, and any of ``lr``, ``weight_decay``, ``maximize``, ``orthogonalize`` and
                ``network``, as the constructor takes them.

        Raises:
            As the constructor does; no group is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):  # a set is refused by torch, with its own message
            group["params"] = list(group["params"])
        _check_options({**self.defaults, **group})
        for name in _OPTIONS_OF_ALL:
            own = getattr(self, name)
            value = group.pop(name, own)
            require(value == own, f"{name} of a param group", value, f"the optimizer's, {own}: it holds for all groups")
        for index, entry in enumerate(group["params"]):
            label, param = entry if isinstance(entry, tuple) else (f"number {index} of its group", entry)
            if not isinstance(param, Tensor):
                continue  # torch says what is wrong
            if param.dtype not in PARAM_DTYPES:
                raise TypeError(
                    f"parameter {label} is {param.dtype}; LSTMOptimizer takes floating and complex parameters"
                )
            # Marks of FSDP1's own: no class tells, and with use_orig_params these are plain parameters.
            if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
                raise TypeError(
                    f"parameter {label} is sharded by FSDP1, whose state_dict cannot hold a state for each of its "
                    "coordinates: shard with FSDP2's fully_shard"
                )
            if not is_lazy(param) and (param.is_conj() or param.is_neg()):
                raise ValueError(
                    f"parameter {label} is a view that conjugates or negates another tensor: make it of its "
                    "resolve_conj().resolve_neg()"
                )
            self._need_kernel(param.device)
        if "network" in group:
            group["network"] = self._adopt(group["network"])
            if not self._rated:
                group.setdefault("lr", self._networks[group["network"]].default_lr)
        self._check_rule({**self.defaults, **group})
        super().add_param_group(group)
        self._warn_of_leaps(self.param_groups[-1])

    def _check_rule(self, options: dict, where: str = "") -> None:
        """What a group's options ask of its network."""
        network = self._networks[options["network"]]
        reason = normalize.no_momentum(network.config, network.update_rms)
        if options["orthogonalize"] and reason:
            raise ValueError(
                f"{where}orthogonalize must be False for a network {reason}; l2l-base is one that has what it takes"
            )

    def _warn_of_leaps(self, group: dict) -> None:
        """A rate meant for a network that gives its update a size of its own would be silent ruin here."""
        network = self._networks[group["network"]]
        lr, rms = group["lr"], network.max_update_rms or network.update_rms
        if rms is not None and isinstance(lr, Real) and (float(lr) >= 1 or float(lr) * rms > 0.5):
            warnings.warn(
                f"lr={lr:g} moves tensors by up to {lr * rms:g} a step, root mean square: a network with update_rms "
                "has AdamW's rates, such as 0.003. l2l-base has it now; what it was before, for lr=1, is l2l-base-v1",
                stacklevel=4,
            )

    def _adopt(self, network) -> str:
        """Copy a network's weights; returns the name under which groups refer to it."""
        if isinstance(network, str) and network in self._networks:
            return network
        found = _shipped(network, self._arithmetic) if isinstance(network, str) else None
        name, self._networks[name] = found or _flattened(network, self._arithmetic)
        return name

    def _need_kernel(self, device: torch.device) -> None:
        reason = _native.no_kernel(device.type) if self.fused else None
        if reason is not None:
            raise RuntimeError(f"fused=True needs compiled kernels for the device {device}: {reason}")

    # ------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; optional.

        Returns:
            the closure's loss, or None.

        Raises:
            RuntimeError: a gradient that is sparse, or not finite with ``error_if_nonfinite``; or no compiled kernel
                for a parameter's device with ``fused=True``. Nothing is changed then.
            ValueError: a group's ``network`` was replaced. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            if _HIDES_SHARDED and any(is_sharded(param) for group in self.param_groups for param in group["params"]):
                self._move_uncompiled()
                return loss
            self._prepare()
        self._move()
        return loss

    def _move(self) -> None:
        """Everything is looked at before anything is changed."""
        calls: list[_Call] = []
        fresh: list[Tensor] = []
        stepped: list[Tensor] = []
        try:
            for group in self.param_groups:
                calls += self._calls(group, fresh)
            # A call looks at its arguments itself, but the one before has changed its parameters by then; and of a
            # parameter that it steps on scratch it sees nothing.
            if fresh and (len(calls) > 1 or any(_on_scratch(call.network) for call in calls)):
                for call in calls:
                    arguments.check_step(*call.arguments)
            for call in calls:
                self._run(call)
                stepped += call.params
        except Exception:
            for param in fresh:
                if not any(param is other for other in stepped):
                    del self.state[param]
            raise

    _move_uncompiled = torch._disable_dynamo(_move)

    def _run(self, call: _Call) -> None:
        op = torch.ops.l2l_fast.lstm_step_reference_ if self.fused is False else torch.ops.l2l_fast.lstm_step_
        network, (tensors, grads, states, weights, lr, steps, *rest) = call.network, call.arguments
        squares = updates = None
        ops.count_versions(call.params)
        torch._foreach_add_(steps, 1)
        try:
            if network.input_rms is not None:
                grads, squares = normalize.relative(
                    grads, call.squares["square"], steps, network.config, network.input_rms, call.params
                )
            arguments = (tensors, grads, states, weights, lr, steps, *rest)
            if network.update_rms is None:
                op(*arguments)
            elif self._has_scaled_kernel(call):
                slow = call.squares.get("slow_square", [])
                torch.ops.l2l_fast.lstm_step_scaled_(
                    *arguments, network.update_rms, slow, network.max_update_rms or network.update_rms
                )
            else:
                updates = normalize.raw_updates(op, *arguments)
        except RuntimeError:
            torch._foreach_sub_(steps, 1)
            raise
        if squares is not None:
            torch._foreach_copy_(call.squares["square"], list(squares.unbind()))
        if updates is not None and network.update_rms is not None:
            weight_decay, maximize = rest[-2:]
            sizes: float | Tensor = network.update_rms
            if network.max_update_rms is not None:
                sizes = self._update_sizes(call, grads)
            momenta = None
            if call.orthogonalize:
                momenta = normalize.flat_momenta(updates, grads, states, network.config, maximize)
            normalize.move_(tensors, updates, lr, sizes, weight_decay, call.params, momenta)

    def _has_scaled_kernel(self, call: _Call) -> bool:
        """Whether one operator does it all: the step of whole tensors, and their updates scaled."""
        return not call.orthogonalize and self._has_kernel(call)

    def _has_kernel(self, call: _Call) -> bool:
        """Whether one may look at whole tensors: there is the whole of each, and kernels are wanted."""
        return self.fused is not False and not any(map(is_sharded, call.params))

    def _update_sizes(self, call: _Call, grads: list[Tensor]) -> Tensor:
        """How far each tensor moves; grads: as the network has seen them."""
        network, squares = call.network, call.squares["slow_square"]
        rms, most = network.update_rms, network.max_update_rms
        assert rms is not None
        assert most is not None
        tensors, _, states, weights, _, steps, *fields, _, _ = call.arguments
        if self._has_kernel(call):
            return torch.ops.l2l_fast.lstm_update_sizes_(
                tensors, grads, states, weights, steps, *fields, rms, squares, most
            )
        return normalize.update_sizes_(grads, states, squares, steps, network.config, rms, most, call.params)

    @torch.compiler.assume_constant_result
    def _prepare(self) -> None:
        """Make what a first step makes. torch.compile runs this as it is, so that one graph serves all steps."""
        for group in self.param_groups:
            self._calls(group, [])

    def _calls(self, group: dict, fresh: list[Tensor]) -> list[_Call]:
        """The group's parameters that have a gradient, by device, each list with its arguments of ``lstm_step_``.

        Matrices to orthogonalize are apart: what becomes of a tensor does not depend on its company.

        Models of many small tensors pay for every line of the loops here, so there are few.

        fresh: takes the parameters whose state is made here.
        """
        name = group["network"]
        network = self._networks.get(name)
        if network is None:
            raise ValueError(
                f"network of a param group must be one that it was added with, got {name!r}: a group keeps "
                "its network; make a new optimizer, or give it with add_param_group"
            )
        pairs = [(param, param.grad) for param in group["params"] if param.grad is not None]
        for param, grad in pairs:
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{self._label(group, param)} has a {grad.layout} gradient; LSTMOptimizer needs dense ones "
                    "(for nn.Embedding: sparse=False)"
                )
            if self.error_if_nonfinite and not self._is_finite(param, grad, network.config):
                raise RuntimeError(
                    f"{self._label(group, param)} has a gradient that is not finite (error_if_nonfinite=True)"
                )
        orthogonalize = network.orthogonalize if group["orthogonalize"] is None else bool(group["orthogonalize"])
        by_kind: dict[tuple[torch.device, bool], tuple] = {}
        names, last, arithmetic = _square_names(network), None, self._arithmetic
        for param, grad in pairs:
            device = param.device
            kind = device, orthogonalize and normalize.is_matrix(param)
            if kind != last:
                last = kind
                params, tensors, grads, states, steps, squares = by_kind.setdefault(
                    kind, ([], [], [], [], [], {name: [] for name in names})
                )
            state = self.state.get(param)
            if not state:
                state = self._first_state(param, network)
                fresh.append(param)
            step = state["step"]
            # ZeroRedundancyOptimizer puts every number on the CPU, and other loaders may leave one that is no tensor.
            if not isinstance(step, Tensor) or step.device != device:
                step = state["step"] = _number(step, torch.float32, device)
            if type(grad) not in _PLAIN:
                grad = _local(_beside(grad, param))
            if grad.is_complex():
                grad = torch.view_as_real(grad.resolve_conj())
            params.append(param)
            tensors.append(_real(_local(param)))
            grads.append(grad.resolve_neg())
            states.append(_local(state["lstm"]))
            steps.append(step)
            for name in names:
                square = state[name]
                if not isinstance(square, Tensor) or square.device != device or square.dtype != arithmetic:
                    square = state[name] = _number(square, arithmetic, device)
                squares[name].append(square)
        return [
            _Call(columns[0], self._arguments(group, device, *columns), network, matrices, squares)
            for (device, matrices), (*columns, squares) in by_kind.items()
        ]

    def _first_state(self, param: Tensor, network: _Network) -> dict:
        state = {"step": _number(0, torch.float32, param.device)}
        state["lstm"] = _new_state(param, network.config, self.state_dtype)
        for name in _square_names(network):
            state[name] = _number(0, self._arithmetic, param.device)
        self.state[param] = state
        return state

    @property
    def _arithmetic(self) -> torch.dtype:
        return torch.float64 if self.state_dtype == torch.float64 else torch.float32

    def _is_finite(self, param: Tensor, grad: Tensor, config: Config) -> bool:
        """Whether the gradient is, as the ops mean it; of a sharded one, whether it is on every rank."""
        grad = _real(_beside(grad, param))
        limit = gradient_limit(config, self._arithmetic, self.state_dtype)
        finite = (grad.to(self._arithmetic).abs() < limit).all()
        finite = finite.full_tensor() if is_sharded(finite) else finite
        return isinstance(finite, FakeTensor) or bool(finite)  # a fake one has no values

    def _arguments(self, group: dict, device: torch.device, params, tensors, grads, states, steps) -> tuple:
        """Those of ``lstm_step_`` for parameters of a group that are on one device."""
        weights = self._weights(group["network"], device, params[0])
        lr = self._lr(group["lr"], device, weights.dtype)
        options = float(group["weight_decay"]), bool(group["maximize"])
        return (tensors, grads, states, weights, lr, steps, *self._codes(group["network"]), *options)

    def _codes(self, name: str) -> tuple:
        """A network's config as the ops take it; worked out once, since small models pay for every line of a step."""
        key = ("codes", name)
        if key not in self._constants:
            self._constants[key] = arguments.codes(self._networks[name].config)
        return self._constants[key]

    def _weights(self, name: str, device: torch.device, param: Tensor) -> Tensor:
        """A network's weights on a device; fake where the parameter is."""
        weights = self._networks[name].weights
        if not torch.compiler.is_compiling() and isinstance(_local(param), FakeTensor):
            return torch.empty(weights.shape, dtype=weights.dtype, device=device)
        key = ("weights", name, device)
        if key not in self._constants:
            self._need_kernel(device)  # parameters may have moved since their group was added
            self._constants[key] = weights.to(device)
        return self._constants[key]

    def _lr(self, lr: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if isinstance(lr, Tensor):
            return lr.to(device, dtype).reshape(())  # what a float becomes, too
        if torch.compiler.is_compiling():  # which would compile anew for each value that it is compared with
            return torch.ones((), dtype=dtype, device=device) * lr
        key = ("lr", device)
        held = self._constants.get(key)
        if held is None or held[0] != lr:  # schedulers change it, so only the last value is kept
            held = self._constants[key] = (lr, _number(lr, dtype, device))
        return held[1]

    def _label(self, group: dict, param: Tensor) -> str:
        position = next(i for i, other in enumerate(group["params"]) if other is param)
        if "param_names" in group:
            return f"parameter {group['param_names'][position]!r}"
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        return f"parameter {position} of param group {index} (shape {tuple(param.shape)})"

    # ------------------------------------------------------------ state_dict, pickle

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state_dict of the same network, made on any device, with any backend and any ``state_dtype``.

        Raises:
            ValueError: it belongs to another network, to parameters of other shapes, or lacks something; nothing is
                changed then.
        """
        restored: list[tuple[Tensor, dict]] = []

        def check(_, final: dict) -> None:  # runs last of the pre-hooks, so it sees what will be loaded
            restored.extend(self._restored(final))

        def restore(_) -> None:  # torch casts state to the parameter's dtype; ours has its own dtype and strides
            for param, state in restored:
                self.state[param].update(state)

        with ExitStack() as stack:
            stack.callback(self.register_load_state_dict_pre_hook(check).remove)
            stack.callback(self.register_load_state_dict_post_hook(restore, prepend=True).remove)
            super().load_state_dict(state_dict)

    def _restored(self, state_dict: dict) -> list[tuple[Tensor, dict]]:
        """Each parameter's state as a state_dict has it, which is looked at here."""
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
            return []  # torch says what is wrong
        for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
            where = f"the state_dict's param group {index}"
            if saved.get("network") != group["network"]:
                raise ValueError(
                    f"{where} belongs to network {saved.get('network')!r}, and this optimizer's to "
                    f"{group['network']!r}: make it with the network of the state_dict"
                )
            missing = {"lr", "weight_decay"} - saved.keys()
            if missing:
                raise ValueError(f"{where} has no {', '.join(sorted(missing))}: it was not saved whole")
            options = {**_LATER_OPTIONS, **saved}
            _check_options(options, f"{where}: ")
            self._check_rule(options, f"{where}: ")
        return [
            (param, self._restored_state(group, param, state_dict["state"][index]))
            for group, saved in zip(groups, saved_groups, strict=True)
            for param, index in zip(group["params"], saved["params"], strict=True)
            if state_dict["state"].get(index)
        ]

    def _restored_state(self, group: dict, param: Tensor, saved: dict) -> dict:
        config = self._networks[group["network"]].config
        shape = (*_real(param).shape, state_size(config))
        lstm: Any = saved.get("lstm")
        step: Any = saved.get("step")
        found = tuple(lstm.shape) if isinstance(lstm, Tensor) and "step" in saved else None
        if found != shape:
            raise ValueError(
                f"the state_dict's state of {self._label(group, param)} has shape {found}, "
                f"needed is {shape}: it was saved for other parameters"
            )
        if not _is_number(step):
            raise ValueError(
                f"the state_dict's step of {self._label(group, param)} must be a number of steps, got {step!r}"
            )
        state = _new_state(param, config, self.state_dtype)
        state.copy_(lstm)
        restored = {"lstm": state, "step": _number(step, torch.float32, param.device)}
        for name in _square_names(self._networks[group["network"]]):
            square: Any = saved.get(name)
            if not _is_number(square):
                raise ValueError(
                    f"the state_dict's {name} of {self._label(group, param)} must be a number, got {square!r}"
                )
            restored[name] = _number(square, self._arithmetic, param.device)
        return restored

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_rated", True)  # earlier versions' pickles, in which every network was a pair
        self._networks = {name: _Network(*held) for name, held in self._networks.items()}
        for group in self.param_groups:
            for name, value in _LATER_OPTIONS.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict:
        own = {name: getattr(self, name) for name in (*_OPTIONS_OF_ALL, "_networks", "_rated")}
        return {**super().__getstate__(), **own, "_constants": {}}


@functools.cache
def _shipped(name: str, dtype: torch.dtype) -> tuple[str, _Network] | None:
    """A shipped network flattened, or None where there is none of the name: its files are read once a process."""
    return _flattened(name, dtype) if name in shipped() else None


def _flattened(network, dtype: torch.dtype) -> tuple[str, _Network]:
    """The name that groups and state_dicts call a network by, and the network, its weights on the CPU."""
    # Under FakeTensorMode the weights are needed all the same, and other optimizers share those of shipped networks.
    with _disable_current_modes(), torch.inference_mode(False):
        if isinstance(network, str | PathLike):
            network = CoordinatewiseLSTM.from_pretrained(network)
        if not isinstance(network, CoordinatewiseLSTM):
            raise TypeError(
                "network must be a CoordinatewiseLSTM, a shipped name, a folder or a hub id, got "
                f"{torch.typename(network)}; MLPOptimizer steps a CoordinatewiseMLP or an AdaptiveMLP"
            )
        config, weights = network.config, network.flat_weights().detach()
        if weights.is_meta:
            raise ValueError("network has no weights yet, they are on the meta device: load or initialise them first")
        weights = weights.to("cpu", dtype, copy=True)
        # Fake weights have no values, and neither have the steps that are made with them.
        values = b"" if isinstance(weights, FakeTensor) else weights.to(torch.float32).numpy().tobytes()
        digest = hashlib.sha256(network.rule.encode() + values).hexdigest()[:16]
    name = f"{config.features}-{config.num_layers}x{config.hidden_size}-{digest}"
    return name, _Network(
        config, weights, network.update_rms, network.default_lr, network.input_rms, network.orthogonalize,
        network.max_update_rms,
    )  # fmt: skip


def _on_scratch(network: _Network) -> bool:
    """Whether its step does something before or after the op."""
    return network.update_rms is not None or network.input_rms is not None


def _square_names(network: _Network) -> tuple[str, ...]:
    """The mean squares of each tensor's gradients that a step needs, as the state calls them."""
    needed = {"square": network.input_rms is not None, "slow_square": network.max_update_rms is not None}
    return tuple(name for name, needs in needed.items() if needs)


def _is_number(value) -> bool:
    """Whether it is finite and not negative; a tensor may have any shape of one element, and a fake one any value."""
    single = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    return single and (isinstance(value, FakeTensor) or 0.0 <= float(value) < math.inf)


def _check_options(options: dict, where: str = "") -> None:
    for name in ("lr", "weight_decay"):
        value = options[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{where}{name} must be a number or a tensor of one element, got shape {tuple(value.shape)} "
                f"(Tensor {name} must be 1-element)"  # torch's own words
            )
        if not _is_number(value):
            raise ValueError(f"{where}{name} must be finite and not negative, got {value!r}")
    require(options["maximize"] in (True, False), f"{where}maximize", options["maximize"], "True or False")
    known = options["orthogonalize"] in (True, False, None)
    require(known, f"{where}orthogonalize", options["orthogonalize"], "True, False or None")


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor is a pair of coordinates."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor: a learned step is coordinatewise, so ranks need nothing of each other."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _beside(grad: Tensor, param: Any) -> Tensor:
    """The gradient placed as its parameter is: one that every rank has a summand of is summed here."""
    if not is_sharded(grad) or grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


# What outlives a call is an ordinary tensor also where the call was made under torch.inference_mode.
@torch.inference_mode(False)
def _number(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=device).reshape(()).clone()


@torch.inference_mode(False)
def _new_state(param: Tensor, config: Config, dtype: torch.dtype) -> Tensor:
    """Zero state of a parameter, placed as the parameter is."""
    state = ops.new_state(_real(_local(param)), config, dtype)
    if not is_sharded(param):
        return state
    from torch.distributed.tensor import DTensor

    whole = ops.new_state(torch.empty(_real(param).shape, device="meta"), config, dtype)
    return DTensor.from_local(
        state, param.device_mesh, param.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
