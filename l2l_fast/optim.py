"""The learned optimizer as an ordinary ``torch.optim.Optimizer``."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from os import PathLike

import torch
from torch import Tensor
from torch.optim import Optimizer

from l2l_fast import _native, ops, reference
from l2l_fast.checkpoint import from_pretrained
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.reference import Config

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_PLAIN = (torch.Tensor, torch.nn.Parameter)  # known not to be sharded without asking, which takes a microsecond each
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


class LSTMOptimizer(Optimizer):
    r"""An update rule that was learned: an LSTM shared by all parameters, with a state for each of their coordinates.

    theta <- theta - lr * weight_decay * theta + lr * u,   (u, state) <- m(grad, state; phi)

    A coordinate whose gradient is not finite keeps its value and its state. The network is copied when the optimizer is
    made: training it further does not change this optimizer.

    Args:
        params: parameters, or param groups, each with its own ``lr``, ``weight_decay``, ``maximize`` or ``network``.
        network: a :class:`CoordinatewiseLSTM`, a shipped name, a folder or a hub id.
        lr: multiplier of the learned update, a float or a 0-dim tensor; 1 is what the network was trained for.
        weight_decay: decoupled weight decay, per unit of lr.
        maximize: ascend instead of descend.
        state_dtype: float32 or bfloat16 (half the memory; the arithmetic stays float32). float64 computes in float64.
        fused: None: the compiled kernel where there is one; False: always the plain PyTorch reference; True: the
            compiled kernel, or an error that says why there is none.
        error_if_nonfinite: raise on a gradient that is not finite, before anything is changed.

    Raises:
        ValueError: an option out of its range, or a state_dict that belongs to another network.
        TypeError: a parameter of an unsupported dtype.
        RuntimeError: sparse gradients, or ``fused=True`` without compiled kernels.

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
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
        fused: bool | None = None,
        error_if_nonfinite: bool = False,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {', '.join(map(str, STATE_DTYPES))}, got {state_dtype}")
        if fused and not _native.build_info()["native"]:
            raise RuntimeError(f"fused=True needs the compiled kernels, and {_native.build_info()['reason']}")
        self.state_dtype, self.fused, self.error_if_nonfinite = state_dtype, fused, error_if_nonfinite
        self._networks: dict[str, tuple[Config, Tensor]] = {}  # by the name that param groups and state_dicts carry
        self._constants: dict[tuple, Tensor] = {}  # lr and weights by device
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "network": self._adopt(network)}
        super().__init__(params, defaults)

    # ------------------------------------------------------------ construction

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of parameters, with its own options if it names any."""
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):  # a set is refused by torch, with its own message
            group["params"] = list(group["params"])
        if "network" in group:
            group["network"] = self._adopt(group["network"])
        options = {**self.defaults, **group}
        for name in ("lr", "weight_decay"):
            value = options[name]
            if isinstance(value, Tensor) and name == "lr":
                if value.numel() != 1:
                    raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(value.shape)}")
            elif not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        for index, entry in enumerate(group["params"]):
            label, param = entry if isinstance(entry, tuple) else (f"number {index} of its group", entry)
            if isinstance(param, Tensor) and param.dtype not in PARAM_DTYPES:
                raise TypeError(
                    f"parameter {label} is {param.dtype}; LSTMOptimizer takes floating and complex parameters"
                )
        super().add_param_group(group)

    def _adopt(self, network) -> str:
        """Copy a network's weights; returns the name under which groups refer to it."""
        if isinstance(network, str) and network in self._networks:
            return network
        if not isinstance(network, CoordinatewiseLSTM):
            network = from_pretrained(network)
        dtype = torch.float64 if self.state_dtype == torch.float64 else torch.float32
        weights = network.flat_weights().detach().to("cpu", dtype, copy=True)
        config = network.config
        digest = hashlib.sha256(repr(config).encode() + weights.to(torch.float32).numpy().tobytes()).hexdigest()[:16]
        name = f"{config.features}-{config.num_layers}x{config.hidden_size}-{digest}"
        self._networks[name] = (config, weights)
        return name

    # ------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; optional.

        Returns:
            the closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything is looked at before anything is changed.
        work = [(group, self._with_gradient(group)) for group in self.param_groups]
        for group, params in work:
            config, _ = self._networks[group["network"]]
            devices = {param.device for param in params}
            for device in devices:
                here = params if len(devices) == 1 else [param for param in params if param.device == device]
                self._step_device(group, config, device, here)
        return loss

    def _with_gradient(self, group: dict) -> list[Tensor]:
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            grad = param.grad
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"{self._label(group, param)} has a {grad.layout} gradient; LSTMOptimizer needs dense ones "
                    "(for nn.Embedding: sparse=False)"
                )
            if self.error_if_nonfinite and not grad.isfinite().all():
                raise RuntimeError(
                    f"{self._label(group, param)} has a gradient that is not finite (error_if_nonfinite=True)"
                )
        return params

    def _step_device(self, group: dict, config: Config, device: torch.device, params: list[Tensor]) -> None:
        tensors, grads, states, steps = [], [], [], []
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["lstm"] = _new_state(param, config, self.state_dtype)
            tensors.append(_real(_local(param)))
            grads.append(_real(_local(param.grad)))
            states.append(_local(state["lstm"]))
            steps.append(state["step"])
        torch._foreach_add_(steps, 1)
        step = reference.lstm_step_ if self.fused is False else torch.ops.l2l_fast.lstm_step_
        step(
            tensors, grads, states, self._weights(group["network"], device), self._lr(group["lr"], device), steps,
            *config, group["weight_decay"], group["maximize"],
        )  # fmt: skip

    def _weights(self, name: str, device: torch.device) -> Tensor:
        key = ("weights", name, device)
        if key not in self._constants:
            self._constants[key] = self._networks[name][1].to(device)
        return self._constants[key]

    def _lr(self, lr: float | Tensor, device: torch.device) -> Tensor:
        if isinstance(lr, Tensor):
            return lr.to(device)
        key = ("lr", device)
        held = self._constants.get(key)
        if held is None or held[0] != lr:  # schedulers change it, so only the last value is kept
            held = self._constants[key] = (lr, torch.full((), lr, dtype=torch.float32, device=device))
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
            ValueError: it belongs to another network or to parameters of other shapes; nothing is changed then.
        """
        incoming = {}

        def check(_, final: dict) -> None:  # runs last of the pre-hooks, so it sees what will be loaded
            self._check_state_dict(final)
            incoming.update(final)

        def restore(_) -> None:  # torch casts state to the parameter's dtype; ours has its own dtype and strides
            for param, saved in self._paired(incoming):
                config, _ = self._networks[self._group_of(param)["network"]]
                state = _new_state(param, config, self.state_dtype)
                state.copy_(saved["lstm"])
                step = saved["step"].detach().to(param.device, torch.float32, copy=True)
                self.state[param].update(lstm=state, step=step)

        with ExitStack() as stack:
            stack.callback(self.register_load_state_dict_pre_hook(check).remove)
            stack.callback(self.register_load_state_dict_post_hook(restore, prepend=True).remove)
            super().load_state_dict(state_dict)

    def _paired(self, state_dict: dict):
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, index in zip(group["params"], saved["params"], strict=True):
                if index in state_dict["state"]:
                    yield param, state_dict["state"][index]

    def _check_state_dict(self, state_dict: dict) -> None:
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
            return  # torch says what is wrong
        for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
            if saved.get("network") != group["network"]:
                raise ValueError(
                    f"the state_dict's param group {index} belongs to network {saved.get('network')!r}, and this "
                    f"optimizer's to {group['network']!r}: make it with the network of the state_dict"
                )
        for param, saved in self._paired(state_dict):
            config, _ = self._networks[self._group_of(param)["network"]]
            shape = (*_real(param).shape, reference.state_size(config))
            found = tuple(saved["lstm"].shape) if "lstm" in saved and "step" in saved else None
            if found != shape:
                raise ValueError(
                    f"the state_dict's state of {self._label(self._group_of(param), param)} has shape {found}, "
                    f"needed is {shape}: it was saved for other parameters"
                )

    def _group_of(self, param: Tensor) -> dict:
        return next(group for group in self.param_groups if any(other is param for other in group["params"]))

    def __getstate__(self) -> dict:
        own = {name: getattr(self, name) for name in ("state_dtype", "fused", "error_if_nonfinite", "_networks")}
        return {**super().__getstate__(), **own, "_constants": {}}


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor is a pair of coordinates."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor: a learned step is coordinatewise, so ranks need nothing of each other."""
    return tensor if type(tensor) in _PLAIN or not hasattr(tensor, "to_local") else tensor.to_local()


def _new_state(param: Tensor, config: Config, dtype: torch.dtype) -> Tensor:
    """Zero state of a parameter, placed as the parameter is."""
    state = ops.new_state(_real(_local(param)), config, dtype)
    if not hasattr(param, "to_local"):
        return state
    from torch.distributed.tensor import DTensor

    whole = ops.new_state(torch.empty(_real(param).shape, device="meta"), config, dtype)
    return DTensor.from_local(
        state, param.device_mesh, param.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
