"""LSTMOptimizer held to what PyTorch's own test suite asks of every optimizer, for each shipped network.

The optimizers are described as PyTorch describes its own (``torch.testing._internal.common_optimizers``), with the
kernels on and off. docs/conformity.md says which of PyTorch's checks have no counterpart here, and why.
"""

import copy
import functools
import gc
import inspect
import io
import pickle
import re
import warnings
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer, _native, checkpoint, ops
from l2l_fast.config import has_moments

pytest.importorskip("expecttest", reason="torch.testing._internal needs it: pip install expecttest")
with mock.patch.object(torch.backends, "disable_global_flags"):  # it would forbid other tests to set any
    from torch.testing._internal import common_optimizers
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo, OptimizerInput

NETWORKS = checkpoint.shipped()


@functools.cache
def _unit(network: str) -> float:
    """A large rate for it: 1 for steps of its own size; with ``update_rms``, where rates are AdamW's, less."""
    return 1.0 if CoordinatewiseLSTM.from_pretrained(network).update_rms is None else 0.1


def _inputs(network: str, fused: bool, device="cpu", dtype=None) -> list[OptimizerInput]:
    rate = 0.5 * _unit(network)
    options = {
        "default": {},
        "lr": {"lr": rate},
        "Tensor lr": {"lr": torch.tensor(rate)},
        "weight_decay": {"weight_decay": 1e-3},
        "maximize": {"maximize": True},
        "maximize, weight_decay": {"maximize": True, "weight_decay": 1e-3},
        "bfloat16 state": {"state_dtype": torch.bfloat16},
        "float64 state": {"state_dtype": torch.float64, "weight_decay": 1e-3},
        "error_if_nonfinite": {"error_if_nonfinite": True},
    }
    return [
        OptimizerInput(None, {"network": network, "fused": fused, **kwargs}, desc) for desc, kwargs in options.items()
    ]


DESCRIPTIONS = [each.desc for each in _inputs(NETWORKS[0], fused=False)]


def _errors(network: str, device="cpu", dtype=torch.float32) -> list[common_optimizers.ErrorOptimizerInput]:
    param = nn.Parameter(torch.ones(2, device=device, dtype=dtype))
    cases = [
        ({"lr": -1e-2}, "lr must be finite and not negative, got -0.01"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative, got -1.0"),
        ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
        ({"state_dtype": torch.float16}, "state_dtype must be one of"),
    ]
    return [
        *common_optimizers.get_error_inputs_for_all_optims(device, dtype),
        *(
            common_optimizers.ErrorOptimizerInput(
                OptimizerInput([param], {"network": network, **kwargs}), error_type=ValueError, error_regex=regex
            )
            for kwargs, regex in cases
        ),
    ]


def _info(network: str, fused: bool) -> OptimizerInfo:
    sgd = next(info for info in common_optimizers.optim_db if info.name == "SGD")  # which has the most schedulers
    return OptimizerInfo(
        LSTMOptimizer,
        optim_inputs_func=functools.partial(_inputs, network, fused),
        optim_error_inputs_func=functools.partial(_errors, network),
        scheduler_inputs=sgd.scheduler_inputs,
        supported_impls=(),
        not_og_supported_flags=("maximize", "capturable", "foreach", "differentiable", "fused"),
        supports_sparse=False,
        supports_complex=True,
    )


INFOS = {
    f"{network}-{'kernels' if on else 'reference'}": _info(network, on) for network in NETWORKS for on in (True, False)
}


@pytest.fixture(params=INFOS)
def info(request):
    if "kernels" in request.param and _native.extension is None:
        pytest.skip(f"no compiled kernels: {_native.build_info()['reason']}")
    return INFOS[request.param]


@pytest.fixture(params=DESCRIPTIONS)
def options(request, info):
    """Keyword arguments of the constructor, made anew: a scheduler changes a Tensor lr in place."""
    (found,) = (each.kwargs for each in info.optim_inputs_func() if each.desc == request.param)
    return found


@pytest.fixture
def plain(info):
    """The same without options."""
    return info.optim_inputs_func()[0].kwargs


def _has_moments(kwargs) -> bool:
    return has_moments(CoordinatewiseLSTM.from_pretrained(kwargs["network"]).config)


def _same(one, two) -> None:
    """Asserts that they are, to the last bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            _same(value, two[key])
    elif isinstance(one, list):
        for each, other in zip(one, two, strict=True):
            _same(each, other)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    else:
        assert one == two


class Problem:
    """Least squares of a matrix and a vector, the problem of PyTorch's own checks."""

    def __init__(self, contiguous=True, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator)
        if contiguous:
            weight, bias = draw(10, 5), draw(10)
        else:
            weight, bias = draw(10, 5, 2)[..., 0], draw(10, 2)[..., 0]
        self.weight, self.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))
        assert self.weight.is_contiguous() == contiguous
        self.input = draw(5).to(dtype)
        self.params = [self.weight, self.bias]

    def loss(self):
        return (self.weight.mv(self.input) + self.bias).square().sum()

    def closure(self):
        for param in self.params:
            param.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def run(self, optimizer, steps, schedulers=()):
        """Losses before each step."""
        losses = []
        for _ in range(steps):
            losses.append(self.closure().item())
            optimizer.step()
            for scheduler in schedulers:
                _advance(scheduler, losses[-1])
        return losses


def _advance(scheduler, loss) -> None:
    scheduler.step(loss) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


def _goes_right(problem, losses, options) -> None:
    last = problem.loss().item()
    assert last > losses[0] if options.get("maximize") else last < losses[0]


# ---------------------------------------------------------------- construction


@pytest.mark.parametrize("number", range(len(_errors(NETWORKS[0]))))
def test_errors(info, plain, number):
    case = info.optim_error_inputs_func()[number]
    given, kwargs = case.optimizer_error_input.params, plain | case.optimizer_error_input.kwargs
    given = [nn.Parameter(torch.ones(2))] if given is None else given
    assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            LSTMOptimizer(given, **kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            LSTMOptimizer(given, **kwargs)


def test_no_parameters_are_an_error(plain):
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        LSTMOptimizer([], **plain)


def test_parameters_that_are_computed_are_an_error(plain):
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        LSTMOptimizer([torch.ones(2, requires_grad=True) * 2], **plain)


def test_what_is_no_tensor_is_an_error(plain):
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        LSTMOptimizer([1.0], **plain)


def test_it_can_be_printed(options):
    text = repr(LSTMOptimizer([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))], **options))
    assert text.startswith("LSTMOptimizer (")
    assert re.search(r"lr: \S", text)


# ---------------------------------------------------------------- descent, schedulers


@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_the_right_direction(options, contiguous):
    problem = Problem(contiguous)
    losses = problem.run(LSTMOptimizer(problem.params, **options), 20)
    _goes_right(problem, losses, options)


@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_the_right_direction_with_a_closure(options, contiguous):
    problem, twin = Problem(contiguous), Problem(contiguous)
    optimizer, other = LSTMOptimizer(problem.params, **options), LSTMOptimizer(twin.params, **copy.deepcopy(options))
    losses = [optimizer.step(problem.closure).item() for _ in range(20)]
    assert losses == twin.run(other, 20)
    _goes_right(problem, losses, options)


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_the_right_direction_with_schedulers(info, contiguous, number):
    for each in info.optim_inputs_func():
        problem = Problem(contiguous)
        optimizer = LSTMOptimizer(problem.params, **each.kwargs)
        losses = problem.run(optimizer, 20, [make(optimizer) for make in info.scheduler_inputs[number]])
        _goes_right(problem, losses, each.kwargs)


@pytest.mark.parametrize("number", range(7))
def test_a_param_group_with_schedulers_goes_the_right_direction(info, plain, number):
    problem = Problem()
    optimizer = LSTMOptimizer([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.1}], **plain)
    losses = problem.run(optimizer, 20, [make(optimizer) for make in info.scheduler_inputs[number]])
    _goes_right(problem, losses, plain)


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.9**t),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.3, 4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 1.0, 5),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(opt, 7)], [3]
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.3, 4), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=0.5),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 1.0, 3, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 1.0, total_steps=12, cycle_momentum=False),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 10, 2.0),
    "SWALR": lambda opt: swa_utils.SWALR(opt, 0.05, 5),
}


def test_every_scheduler_is_here():
    base = {"LRScheduler", "_LRScheduler"}
    known = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, lr_scheduler.LRScheduler)
    }
    assert known - base == SCHEDULERS.keys()


@pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_schedulers_scale_the_update(plain, name, lr):
    """As if the learning rate of each step were set by hand; and a saved scheduler goes on from where it was."""
    problem, twin, lr = Problem(), Problem(), lr * _unit(plain["network"])
    optimizer = LSTMOptimizer(problem.params, **plain, lr=lr)
    by_hand, scheduler, rates = LSTMOptimizer(twin.params, **plain), SCHEDULERS[name](optimizer), []
    for t in range(10):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        by_hand.param_groups[0]["lr"] = rates[-1]
        problem.closure(), twin.closure()
        optimizer.step(), by_hand.step()
        _same(problem.weight, twin.weight)
        _advance(scheduler, 1.0)
        if t == 4:
            saved, state = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
    assert len(set(rates)) > 1
    again = LSTMOptimizer([nn.Parameter(torch.ones_like(each)) for each in problem.params], **plain)
    scheduler = SCHEDULERS[name](again)
    again.load_state_dict(saved)
    if name != "LambdaLR":  # which saves no function
        scheduler.load_state_dict(state)
        for rate in rates[5:]:
            assert float(again.param_groups[0]["lr"]) == pytest.approx(rate)
            again.step()
            _advance(scheduler, 1.0)


def test_a_learning_rate_in_a_tensor_is_as_good_as_a_float(plain):
    for lr in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.float64)):
        problem, twin = Problem(), Problem()
        problem.run(LSTMOptimizer(problem.params, **plain, lr=lr), 5)
        twin.run(LSTMOptimizer(twin.params, **plain, lr=0.25), 5)
        _same(problem.weight, twin.weight)
        _same(problem.bias, twin.bias)


def test_maximize_is_minimizing_the_negative(plain):
    problem, twin = Problem(), Problem()
    up, down = LSTMOptimizer(problem.params, **plain, maximize=True), LSTMOptimizer(twin.params, **plain)
    for _ in range(5):
        problem.closure(), twin.closure()
        for param in twin.params:
            param.grad.neg_()
        up.step(), down.step()
    _same(problem.weight, twin.weight)


# ---------------------------------------------------------------- param groups


def test_param_groups_have_their_lr(options):
    problem = Problem()
    apart, before = nn.Parameter(torch.randn(2)), None
    before = apart.detach().clone()
    names = ("lr", "weight_decay", "maximize", "network")
    group = {"lr": _unit(options["network"])} | {name: value for name, value in options.items() if name in names}
    whole = {name: value for name, value in options.items() if name not in names} | {"network": options["network"]}
    optimizer = LSTMOptimizer([{"params": problem.params, **group}, {"params": [apart]}], **whole, lr=1e-28)
    losses = []
    for _ in range(20):
        losses.append(problem.closure().item())
        apart.grad = torch.rand_like(apart)
        optimizer.step()
    _goes_right(problem, losses, options)
    _same(apart.detach(), before)


def test_param_groups_have_their_weight_decay(options):
    problem = Problem()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "weight_decay": 0.0}]
    losses = problem.run(LSTMOptimizer(groups, **options), 20)
    _goes_right(problem, losses, options)


def test_param_groups_are_as_good_as_optimizers(plain):
    problem, twin = Problem(), Problem()
    first, second = {"lr": 0.5, "weight_decay": 0.1}, {"lr": 0.2, "maximize": True}
    together = LSTMOptimizer([{"params": [problem.weight], **first}, {"params": [problem.bias], **second}], **plain)
    apart = [LSTMOptimizer([twin.weight], **plain, **first), LSTMOptimizer([twin.bias], **plain, **second)]
    for _ in range(5):
        problem.closure(), twin.closure()
        together.step()
        for each in apart:
            each.step()
    _same(problem.weight, twin.weight)
    _same(problem.bias, twin.bias)


def test_a_group_is_added_while_training(plain):
    problem = Problem()
    optimizer = LSTMOptimizer([problem.weight], **plain)
    problem.run(optimizer, 3)
    before = problem.bias.detach().clone()
    optimizer.add_param_group({"params": [problem.bias]})
    losses = problem.run(optimizer, 10)
    _goes_right(problem, losses, plain)
    assert (problem.bias != before).all()
    assert [optimizer.state[param]["step"].item() for param in problem.params] == [13, 10]


# ---------------------------------------------------------------- state_dict


def _named(params, named):
    return [(f"name{i}", param) for i, param in enumerate(params)] if named else params


def _without_names(state_dict):
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("param_names", None)
    return state_dict


@pytest.mark.parametrize("named", [(False, False), (False, True), (True, False), (True, True)])
def test_a_state_dict_is_deterministic(options, named):
    problem, twin = Problem(), Problem()
    optimizer = LSTMOptimizer(_named(problem.params, named[0]), **options)
    problem.run(optimizer, 10)
    other = LSTMOptimizer(_named(twin.params, named[1]), **copy.deepcopy(options))
    with torch.no_grad():
        for theirs, ours in zip(twin.params, problem.params, strict=True):
            theirs.copy_(ours)
    saved = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(saved)
    other.load_state_dict(given)
    _same(given["state"], saved["state"])  # loading changes nothing of what is loaded
    assert problem.run(optimizer, 10) == twin.run(other, 10)
    _same(problem.weight, twin.weight)
    one, two = _without_names(optimizer.state_dict()), _without_names(other.state_dict())
    _same(one["state"], two["state"])
    _same(one["param_groups"], two["param_groups"])
    other.param_groups.extend(other.param_groups)  # parameters that are there twice have one number
    _same(_without_names(other.state_dict())["param_groups"][-1], one["param_groups"][-1])


def _conv_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))


def _train(model, optimizer, steps):
    image = torch.linspace(-1, 1, 1024).view(1, 4, 16, 16)
    for _ in range(steps):
        optimizer.zero_grad()
        model(image).square().sum().backward()
        optimizer.step()


def test_an_older_state_dict_is_loaded(info, options):
    model = _conv_model()
    optimizer = LSTMOptimizer(model.parameters(), **options)
    _train(model, optimizer, 3)
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        for flag in info.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(older)
    _train(model, optimizer, 1)
    assert optimizer.param_groups[0]["maximize"] is False


@pytest.mark.parametrize("named", [(False, False), (False, True), (True, False), (True, True)])
def test_named_and_unnamed_state_dicts_are_loaded(options, named):
    model = _conv_model()

    def make(with_names):
        params = model.named_parameters() if with_names else model.parameters()
        return LSTMOptimizer(params, **options)

    optimizer, other = make(named[0]), make(named[1])
    _train(model, optimizer, 3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(model, other, 1)
    if any(named):
        names = other.state_dict()["param_groups"][0]["param_names"]
        assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_hook_that_reorders_by_name_is_obeyed(plain):
    """The recipe of torch's own documentation for parameters that come in another order."""
    problem, twin = Problem(), Problem()
    optimizer = LSTMOptimizer([("weight", problem.weight), ("bias", problem.bias)], **plain)
    problem.run(optimizer, 3)
    other = LSTMOptimizer([("bias", twin.bias), ("weight", twin.weight)], **plain)

    def by_name(target, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for saved, group in zip(state_dict["param_groups"], target.param_groups, strict=True):
            number = dict(zip(saved["param_names"], saved["params"], strict=True))
            saved["params"] = [number[name] for name in group["param_names"]]
            saved["param_names"] = list(group["param_names"])
        return state_dict

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(problem.params, twin.params, strict=True):
        _same(optimizer.state[ours]["lstm"], other.state[theirs]["lstm"])
        with torch.no_grad():
            theirs.copy_(ours)
    assert problem.run(optimizer, 3) == twin.run(other, 3)


@pytest.mark.parametrize("named", [False, True])
def test_a_saved_state_dict_is_the_same(options, named):
    problem, file = Problem(), io.BytesIO()
    optimizer = LSTMOptimizer(_named(problem.params, named), **options)
    problem.run(optimizer, 3)
    torch.save(optimizer.state_dict(), file)
    for weights_only in (False, True):
        file.seek(0)
        _same(torch.load(file, weights_only=weights_only), optimizer.state_dict())


def test_a_step_that_is_no_tensor_is_loaded(options):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **options)
    problem.run(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    problem.run(optimizer, 1)
    assert all(state["step"] == 4 for state in optimizer.state.values())


def test_a_state_dict_is_loaded_again_and_again(options):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **options)
    problem.run(optimizer, 2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [param.detach().clone() for param in problem.params]
    runs = []
    for _ in range(3):
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            for param, value in zip(problem.params, weights, strict=True):
                param.copy_(value)
        runs.append(problem.run(optimizer, 3))
    assert runs[0] == runs[1] == runs[2]


def test_a_state_dict_of_other_groups_is_an_error(plain):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **plain)
    apart = LSTMOptimizer([{"params": [param]} for param in problem.params], **plain)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(apart.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(LSTMOptimizer([problem.weight], **plain).state_dict())


def test_state_moves_between_the_dtypes_of_parameters(plain):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **plain)
    problem.run(optimizer, 3)
    for dtype in (torch.float64, torch.bfloat16):
        twin = Problem(dtype=dtype)
        other = LSTMOptimizer(twin.params, **plain)
        other.load_state_dict(optimizer.state_dict())
        _same(other.state[twin.weight]["lstm"], optimizer.state[problem.weight]["lstm"])
        twin.run(other, 1)


# ---------------------------------------------------------------- hooks


def _mark(optimizer):
    optimizer.state["test"] = 1


def _unmark(optimizer, state_dict):
    state_dict["marked"] = state_dict["state"].pop("test", None) is not None
    return state_dict


def test_state_dict_hooks(options):
    param = torch.rand(2, 3, requires_grad=True)
    optimizer = LSTMOptimizer([param], **options)
    optimizer.register_state_dict_post_hook(_unmark)
    assert optimizer.state_dict()["marked"] is False
    optimizer.register_state_dict_pre_hook(_mark)
    state_dict = optimizer.state_dict()
    assert "test" not in state_dict["state"]
    assert state_dict["marked"] is True
    alone = LSTMOptimizer([param], **options)
    alone.register_state_dict_pre_hook(_mark)
    assert alone.state_dict()["state"]["test"] == 1


def test_state_dict_hooks_run_in_their_order(plain):
    optimizer, order = LSTMOptimizer([torch.rand(2, requires_grad=True)], **plain), []
    optimizer.register_state_dict_pre_hook(lambda _: order.append("pre 2"))
    optimizer.register_state_dict_pre_hook(lambda _: order.append("pre 1"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda *_: order.append("post 2"))
    optimizer.register_state_dict_post_hook(lambda *_: order.append("post 1"), prepend=True)
    optimizer.state_dict()
    assert order == ["pre 1", "pre 2", "post 1", "post 2"]


def _rate(value):
    def hook(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = value
        return state_dict

    return hook


def test_load_state_dict_pre_hooks_and_prepend(options):
    optimizer = LSTMOptimizer([torch.rand(2, 3, requires_grad=True)], **options)
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(_rate(0.002))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(_rate(0.003), prepend=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002  # the hook that ran last
    optimizer.register_load_state_dict_pre_hook(_rate(0.004))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.004


def test_load_state_dict_post_hooks_and_prepend(options):
    problem, seen = Problem(), []
    optimizer = LSTMOptimizer(problem.params, **options)
    problem.run(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    problem.run(optimizer, 1)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(("second", opt.param_groups[0]["lr"])))
    optimizer.register_load_state_dict_post_hook(
        lambda opt: seen.append(("first", opt.state[problem.weight]["step"].item())), prepend=True
    )
    optimizer.register_load_state_dict_pre_hook(_rate(0.25))
    optimizer.load_state_dict(saved)
    assert seen == [("first", 2.0), ("second", 0.25)]  # all is loaded when they run


def test_what_hooks_put_into_the_state_stays(plain):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **plain)
    optimizer.register_load_state_dict_post_hook(lambda opt: opt.state.update(loaded=True))
    optimizer.load_state_dict(optimizer.state_dict())
    problem.run(optimizer, 2)
    assert optimizer.state["loaded"]
    saved = optimizer.state_dict()
    assert saved["state"]["loaded"]
    optimizer.load_state_dict(saved)
    problem.run(optimizer, 1)


@pytest.mark.parametrize("place", ["pre", "post"])
def test_step_hooks(options, place):
    param, calls = torch.tensor([1.0, 1.0]), []
    optimizer = LSTMOptimizer([param], **options)
    handle = getattr(optimizer, f"register_step_{place}_hook")(lambda opt, args, kwargs: calls.append((opt, args)))
    optimizer.step(None)
    optimizer.step()
    assert [opt is optimizer for opt, _ in calls] == [True, True]
    handle.remove()
    optimizer.step()
    assert len(calls) == 2


def test_a_step_pre_hook_may_replace_the_closure(plain):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **plain)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7), {}))
    assert optimizer.step() == 7


def test_local_and_global_step_hooks_run_in_their_order(plain):
    param, order = torch.tensor([1.0, 1.0]), []
    optimizer, other = LSTMOptimizer([param], **plain), torch.optim.SGD([param])

    def note(what):
        return lambda *_: order.append(what)

    handles = [register_optimizer_step_pre_hook(note(0)), register_optimizer_step_post_hook(note(5))]
    try:
        for each in (optimizer, other):
            handles += [each.register_step_pre_hook(note(1)), each.register_step_post_hook(note(2))]
        optimizer.step()
        other.step()
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert order == [0, 1, 2, 5] * 3


# ---------------------------------------------------------------- copies


def _public(optimizer):
    return {name for name in vars(optimizer) if not name.startswith("_")}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_have_all_public_attributes_and_go_on(options, how):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **options)
    problem.run(optimizer, 3)
    twin = Problem()
    copied, twin.params = how((optimizer, problem.params))
    twin.weight, twin.bias = twin.params
    assert _public(copied) == _public(optimizer)
    for name in _public(optimizer) - {"state", "param_groups"}:
        assert type(getattr(copied, name)) is type(getattr(optimizer, name))
    assert problem.run(optimizer, 3) == twin.run(copied, 3)
    _same(problem.weight, twin.weight)
    _same(optimizer.state_dict(), copied.state_dict())


def test_an_optimizer_is_freed(plain):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **plain)
    problem.run(optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------- steps


def test_a_step_is_none_where_no_parameter_has_a_gradient(options):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [param.clone() for param in params]
    optimizer = LSTMOptimizer(params, **options)
    assert optimizer.step(lambda: torch.tensor([1.0])) == 1
    _same(params, before)
    assert not optimizer.state


def test_a_step_is_none_where_gradients_are_zero(options):
    """For networks with moments: without, an update of 0 is not promised for a gradient of 0 (docs/conformity.md)."""
    if not _has_moments(options):
        options["lr"] = 0.0
    if options.get("weight_decay", 0) != 0:
        options["weight_decay"] = 0.0
    param = torch.randn(5, 1, requires_grad=True)
    before, param.grad = param.detach().clone(), torch.zeros(5, 1)
    optimizer = LSTMOptimizer([param], **options)
    for _ in range(3):
        optimizer.step(lambda: torch.tensor([1.0]))
    _same(param.detach(), before)


def test_state_is_not_empty(options):
    model = nn.Linear(5, 5)
    optimizer = LSTMOptimizer(model.parameters(), **options)
    model(torch.rand(2, 5)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
    sized = CoordinatewiseLSTM.from_pretrained(options["network"]).max_update_rms is not None
    for param in model.parameters():
        assert optimizer.state[param].keys() == {"step", "lstm"} | ({"slow_square"} if sized else set())
        assert not sized or optimizer.state[param]["slow_square"] > 0
        assert optimizer.state[param]["step"] == 1
        assert optimizer.state[param]["lstm"].any()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(plain, set_to_none):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **plain)
    problem.closure()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((param.grad is None) if set_to_none else (not param.grad.any()) for param in problem.params)


def test_the_closure_runs_with_gradients(plain):
    problem, modes = Problem(), []
    optimizer = LSTMOptimizer(problem.params, **plain)

    def closure():
        modes.append(torch.is_grad_enabled())
        return problem.closure()

    with torch.no_grad():
        optimizer.step(closure)
    assert modes == [True]
    assert problem.weight.requires_grad
    assert problem.weight.is_leaf


@pytest.mark.skipif(_native.extension is None, reason="no compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("desc", DESCRIPTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_kernels_match_the_reference(network, desc, dtype):
    """Every dtype, a layer that is frozen for a while, a step without gradients, a scalar and an empty parameter."""
    models, optimizers = [], []
    for fused in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
        scalar, empty = nn.Parameter(torch.ones((), dtype=dtype)), nn.Parameter(torch.ones(0, 3, dtype=dtype))
        scalar.grad, empty.grad = torch.ones_like(scalar), torch.ones_like(empty)
        (options,) = (each.kwargs for each in _inputs(network, fused) if each.desc == desc)
        models.append((model, [*model.parameters(), scalar, empty]))
        optimizers.append(LSTMOptimizer(models[-1][1], **options))
    inputs, eps = torch.linspace(0.1, 0.6, 6, dtype=dtype).view(3, 2), torch.finfo(dtype).eps
    of_state = max(2e-5, 4 * torch.finfo(optimizers[0].state_dtype).eps)
    for t in range(7):
        for (model, params), optimizer in zip(models, optimizers, strict=True):
            for param in params[:4]:
                param.grad = None
            model[2].requires_grad_(not 3 <= t < 5)
            if t != 2:
                model(inputs).sum().backward()
            optimizer.step()
        for one, two in zip(models[0][1], models[1][1], strict=True):
            torch.testing.assert_close(two, one, rtol=max(4 * eps, 1e-5), atol=max(eps, 1e-5))
            ours, theirs = optimizers[0].state[one], optimizers[1].state[two]
            assert ours["step"] == theirs["step"]
            torch.testing.assert_close(theirs["lstm"], ours["lstm"], rtol=of_state, atol=of_state)
            with torch.no_grad():  # so that errors do not add up
                two.copy_(one)
                theirs["lstm"].copy_(ours["lstm"])


def test_dtypes_mix(plain):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
    together = [nn.Parameter(torch.ones(2, 3, dtype=dtype)) for dtype in dtypes]
    apart = [nn.Parameter(param.detach().clone()) for param in together]
    plain = {**plain, "lr": _unit(plain["network"])}  # half precision does not lose its steps
    optimizer, others = LSTMOptimizer(together, **plain), [LSTMOptimizer([param], **plain) for param in apart]
    for t in range(3):
        for params in (together, apart):
            for param in params:
                param.grad = torch.full_like(param, 0.5 - t)
        optimizer.step()
        for other in others:
            other.step()
    for one, two in zip(together, apart, strict=True):
        _same(one, two)
        assert one.detach().ne(1).all()


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_changes_nothing(options, default):
    problem, twin, before = Problem(), Problem(), torch.get_default_dtype()
    expected = problem.run(LSTMOptimizer(problem.params, **options), 5)
    torch.set_default_dtype(default)
    try:
        optimizer = LSTMOptimizer(twin.params, **copy.deepcopy(options))
        assert twin.run(optimizer, 5) == expected
    finally:
        torch.set_default_dtype(before)
    assert optimizer.state[twin.weight]["step"].dtype == torch.float32


def test_the_default_device_changes_nothing(plain):
    problem, twin = Problem(), Problem()
    expected = problem.run(LSTMOptimizer(problem.params, **plain), 3)
    twin.closure()
    with torch.device("meta"):
        optimizer = LSTMOptimizer(twin.params, **plain)
        optimizer.step()
    assert twin.run(optimizer, 2) == expected[1:]


def test_complex_parameters_are_pairs_of_real_ones(options):
    """But for what a matrix begins with: one of complex numbers is orthogonalized as such."""
    options = {**options, "orthogonalize": False}
    shapes = [(10, 5), (10,)]
    ours = [torch.randn(shape, dtype=torch.complex64, requires_grad=True) for shape in shapes]
    ours.append(torch.randn(10, 5, requires_grad=True))  # and a real one among them
    theirs = [
        (torch.view_as_real(param) if param.is_complex() else param).detach().clone().requires_grad_() for param in ours
    ]
    optimizers = LSTMOptimizer(ours, **options), LSTMOptimizer(theirs, **copy.deepcopy(options))
    for _ in range(3):
        for one, two in zip(ours, theirs, strict=True):
            two.grad = torch.randn_like(two)
            one.grad = torch.view_as_complex(two.grad) if one.is_complex() else two.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, two in zip(ours, theirs, strict=True):
        _same(torch.view_as_real(one.detach()) if one.is_complex() else one.detach(), two.detach())


def _rosenbrock(point):
    x, y = point
    return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs()


def test_complex_parameters_descend_as_their_parts_do(options):
    """Which are one tensor, where that matters, and a vector: no matrix."""
    options = {**options, "orthogonalize": False}
    whole = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    parts = torch.view_as_real(whole).detach().clone().requires_grad_()
    one, two = LSTMOptimizer([whole], **options), LSTMOptimizer([parts], **copy.deepcopy(options))
    for _ in range(3):
        one.zero_grad(), two.zero_grad()
        _rosenbrock(whole).backward()
        _rosenbrock(torch.view_as_complex(parts)).backward()
        with torch.no_grad():  # the two ways of autograd round differently
            parts.grad.copy_(torch.view_as_real(whole.grad))
        one.step(), two.step()
        _same(torch.view_as_real(whole.detach()), parts.detach())


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided", "expanded gradient"])
def test_any_layout(plain, layout):
    make = {
        "transposed": lambda: torch.randn(4, 3).T,
        "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "strided": lambda: torch.randn(8, 6)[::2, 1::2],
        "expanded gradient": lambda: torch.randn(4, 5),
    }[layout]
    theta, grads = make(), [make() for _ in range(3)]
    if layout == "expanded gradient":
        grads = [torch.randn(1, 5).expand(4, 5) for _ in range(3)]
    one, two = nn.Parameter(theta), nn.Parameter(theta.clone(memory_format=torch.contiguous_format))
    optimizers = LSTMOptimizer([one], **plain), LSTMOptimizer([two], **plain)
    for grad in grads:
        one.grad, two.grad = grad, grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(one, two)
    assert one.stride() == theta.stride()


def _peak(function) -> int:
    """Bytes by which the process's memory grows at most while it runs."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1])

    reset.write_text("5")  # the peak is what it is now
    before = kilobytes("VmRSS")
    function()
    return 1024 * (kilobytes("VmHWM") - before)


def test_peak_memory(plain):
    """A step needs no memory that grows with its parameters, neither for those of its own nor for temporaries."""
    try:
        _peak(lambda: None)
    except OSError:
        pytest.skip("no /proc/self/clear_refs")
    params = [nn.Parameter(torch.zeros(500, 500)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = LSTMOptimizer(params, **plain)
    for _ in range(2):
        optimizer.step()
    assert _peak(optimizer.step) < 0.2 * sum(state["lstm"].nbytes for state in optimizer.state.values())
    assert _peak(optimizer.step) < 16 * 2**20


def test_parameters_without_memory_are_an_error_where_kernels_are_asked_for(plain):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    if plain["fused"]:
        with pytest.raises(RuntimeError, match="fused=True needs compiled kernels for the device meta"):
            LSTMOptimizer(model.parameters(), **plain)
        return
    optimizer = LSTMOptimizer(model.parameters(), **plain)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(state["lstm"].is_meta for state in optimizer.state.values())


def test_sparse_gradients_are_an_error(plain):
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.eye(3, 2).to_sparse()
    optimizer = LSTMOptimizer([weight], **plain)
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert weight.eq(1).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_change_nothing(plain, mode):
    problem, twin = Problem(), Problem()
    one, two = LSTMOptimizer(problem.params, **plain), LSTMOptimizer(twin.params, **plain)
    for _ in range(3):
        problem.closure(), twin.closure()
        one.step()
        with mode():
            two.step()
    _same(problem.weight, twin.weight)
    assert twin.weight.requires_grad


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_step_is_the_same_step(plain, fullgraph):
    torch._dynamo.reset()
    problem, twin = Problem(), Problem()
    one, two = LSTMOptimizer(problem.params, **plain), LSTMOptimizer(twin.params, **plain)
    step = torch.compile(two.step, backend="aot_eager", fullgraph=fullgraph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it compiles with a closure
        for _ in range(3):
            problem.closure()
            one.step()
            twin.closure() if fullgraph else None
            step() if fullgraph else step(twin.closure)
    torch.testing.assert_close(problem.weight, twin.weight)
    assert two.state[twin.weight]["step"] == 3


def test_a_grad_scaler_skips_what_is_infinite(plain):
    problem, twin = Problem(), Problem()
    optimizer, other = LSTMOptimizer(problem.params, **plain), LSTMOptimizer(twin.params, **plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    for t in range(5):
        for param in problem.params:
            param.grad = None
        scaler.scale(problem.loss()).backward()
        if t == 2:
            problem.weight.grad[0, 0] = float("inf")
        before = problem.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if t == 2:
            _same(problem.weight.detach(), before)
            assert optimizer.state[problem.weight]["step"] == 2
        else:
            twin.closure()
            other.step()
    _same(problem.weight, twin.weight)


def test_averaged_models_follow(plain):
    model = _conv_model()
    optimizer, averaged = LSTMOptimizer(model.parameters(), **plain), swa_utils.AveragedModel(model)
    expected = torch.zeros_like(model[0].weight)
    for _ in range(3):
        _train(model, optimizer, 1)
        averaged.update_parameters(model)
        expected += model[0].weight.detach() / 3
    torch.testing.assert_close(averaged.module[0].weight, expected)


def test_stepping_in_backward_is_the_same(plain):
    model, twin = _conv_model(), _conv_model()
    plainly = LSTMOptimizer(model.parameters(), **plain)
    _train(model, plainly, 3)
    optimizers = {param: LSTMOptimizer([param], **plain) for param in twin.parameters()}

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(step)
    image = torch.linspace(-1, 1, 1024).view(1, 4, 16, 16)
    for _ in range(3):
        twin(image).square().sum().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        _same(one, two)


def test_the_profiler_names_the_step(plain):
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **plain)
    problem.closure()
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in profile.function_events}
    assert {"Optimizer.step#LSTMOptimizer.step", "Optimizer.zero_grad#LSTMOptimizer.zero_grad"} <= names


def test_state_is_laid_out_for_its_network(plain):
    """As the constructor's own after a step and after loading."""
    problem = Problem()
    optimizer = LSTMOptimizer(problem.params, **plain)
    problem.run(optimizer, 1)
    config = CoordinatewiseLSTM.from_pretrained(plain["network"]).config
    optimizer.load_state_dict(_contiguous(optimizer.state_dict()))
    for param in problem.params:
        like = ops.new_state(param, config)
        state = optimizer.state[param]["lstm"]
        assert (state.shape, state.stride()) == (like.shape, like.stride())


def _contiguous(state_dict):
    for state in state_dict["state"].values():
        state["lstm"] = state["lstm"].contiguous()
    return state_dict
