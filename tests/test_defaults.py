"""Torch's defaults and modes around a call change nothing of what is computed in it."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import l2l_fast as l2l
from l2l_fast.data import digits
from l2l_fast.evaluate import tune
from l2l_fast.evaluate.costs import measure_cost
from l2l_fast.meta.soap import Soap

PACKAGE = Path(l2l.__file__).parent
META = torch.device("meta")


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another device": lambda: default_device(META),
    "a device for a block": lambda: META,
}
MODES = DEFAULTS | {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
}


def network():
    with torch.inference_mode(False):  # what is made in it cannot be trained
        return l2l.CoordinatewiseLSTM.from_pretrained("l2l-small")


def numbers(comparison):
    return {name: (result.curve, result.curve_final, result.lr, result.lr_final, comparison.errors(name))
            for name, result in comparison.optimizers.items()} | comparison.ratios(comparison.network) | {
                "ratio_seconds": None}  # fmt: skip


def trained(task="quadratic", **options):
    options = {"instances": 2, "unroll": 4, "horizon": 8, "validate_every": 2, "validation_instances": 2} | options
    learner = network()
    history = l2l.MetaTrainer(learner, task, progress=False, **options).fit(5)
    return repr(history), learner.flat_weights().detach().double().tolist()


def step(**options):
    param = torch.linspace(-1, 1, 20, dtype=torch.float32, device="cpu").requires_grad_()
    optimizer = l2l.LSTMOptimizer([param], network="l2l-small", **options)
    for _ in range(3):
        param.grad = param.detach() ** 3
        optimizer.step()
    return param.detach().tolist()


def module():
    with torch.inference_mode(False):
        x = torch.linspace(-1, 1, 50, dtype=torch.float32, device="cpu").unsqueeze(1)

    def make():
        options = {"dtype": torch.float32}
        return nn.Sequential(nn.Linear(1, 4, **options), nn.BatchNorm1d(4, **options), nn.Linear(4, 1, **options))

    return l2l.tasks.ModuleTask(make, (x, x**3), F.mse_loss, batch_size=8)


def soap():
    with torch.inference_mode(False):
        param = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float32, device="cpu"))
    optimizer = Soap([param], lr=0.1, every=2)
    for _ in range(5):
        param.grad = param.detach() ** 2
        optimizer.step()
    return param.tolist()


def baseline(name, **options):
    task = l2l.tasks.Quadratic(3)
    return lambda: numbers(
        l2l.compare(task, network(), horizon=6, seeds=2, tuning_seeds=2, baselines=[name], **options)
    )


WORKS = {
    "adam-fused": baseline("adam-fused"),
    "adam": baseline("adam"),
    "rmsprop-linear": baseline("rmsprop-linear"),
    "nesterov": baseline("nesterov"),
    "tuning": lambda: tune(l2l.tasks.Quadratic(3), "adamw", horizon=5, seeds=range(2)).mean_losses,
    "comparison on digits": lambda: numbers(
        l2l.compare("digits-conv", network(), horizon=3, seeds=2, tuning_seeds=1, baselines=["sgd"])
    ),
    "meta-training": trained,
    "scaled, averaged, by soap": lambda: trained(scaling=1.0, average=0.9, meta_optimizer="soap", coordinates=5),
    "led": lambda: trained(imitation=1.0, lr=0.5, weight_decay=0.1),
    "second derivatives": lambda: trained("digits-mlp", second_derivatives=True),
    "loss weights": lambda: trained(loss_weights=[0.0, 1.0, 1.0, 2.0], objective="log"),
    "a module": lambda: trained(module()),
    "an optimizer's training": lambda: trained(l2l.tasks.MetaTraining(unroll=2, instances=2)),
    "soap": soap,
}


def expected(work, found={}):  # noqa: B006
    """Without any mode; once a work."""
    if work not in found:
        found[work] = WORKS[work]()
    return found[work]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("work", WORKS)
def test_the_numbers_are_the_same(work, mode):
    before = expected(work)
    with MODES[mode]():
        found = WORKS[work]()
    assert repr(found) == repr(before)


def ambient():
    return (torch.get_default_dtype(), torch.empty(0).device, torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"), torch.is_grad_enabled(), torch.is_inference_mode_enabled())  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_callers_own_function_is_called_in_its_own_modes(mode):
    learner, seen = network(), set()
    with MODES[mode]():
        before = ambient()
        trainer = l2l.MetaTrainer(learner, "quadratic", instances=2, unroll=4, horizon=8, progress=False)
        trainer.fit(2, on_step=lambda step: seen.add(ambient()))
        progress = lambda what, done, total: seen.add(ambient()) if what != "timing" else None  # noqa: E731
        tune(l2l.tasks.Quadratic(3), "sgd", horizon=2, seeds=range(2), progress=progress)
        assert seen == {before}
        assert ambient() == before


@pytest.mark.parametrize("mode", DEFAULTS)
@pytest.mark.parametrize("fused", [None, False])
def test_a_step_is_the_same(fused, mode):
    before = step(fused=fused)
    with MODES[mode]():
        assert step(fused=fused) == before


@pytest.mark.parametrize("mode", DEFAULTS)
def test_a_state_is_loaded_whatever_the_default(mode):
    param = nn.Parameter(torch.ones(3, dtype=torch.float32, device="cpu"))
    one, other = (l2l.LSTMOptimizer([param], network="l2l-small") for _ in range(2))
    param.grad = torch.ones_like(param)
    one.step()
    saved = one.state_dict()
    saved["state"][0]["step"] = 1  # as some other programs write it
    with MODES[mode]():
        other.load_state_dict(saved)
        for optimizer in (one, other):
            optimizer.step()
    assert other.state[param]["step"] == 2
    assert torch.equal(one.state[param]["lstm"], other.state[param]["lstm"])


@pytest.mark.parametrize("mode", DEFAULTS)
@pytest.mark.parametrize("name", [name for name in l2l.tasks.names() if not name.startswith("mnist")])
def test_a_task_is_its_seed(name, mode):
    def drawn():
        # The workloads of images are of MNIST, which not every machine has.
        data = {"data": "digits"} if name.startswith(("vision", "cnn", "autoencoder", "wide", "deep")) else {}
        task, generator = l2l.tasks.get(name, **data), torch.Generator().manual_seed(3)
        params, batch = task.init(generator), task.sample(generator)
        leaves = tree_map(lambda tensor: (tensor.dtype, tensor.device, tensor.tolist()), (params, batch))
        return leaves, task.loss(params, batch).item()

    before = drawn()
    with MODES[mode]():
        assert drawn() == before


@pytest.mark.parametrize("mode", DEFAULTS)
def test_a_checkpoint_goes_on(tmp_path, mode):
    options = {"instances": 2, "unroll": 4, "horizon": 8, "progress": False, "imitation": 0.5}

    def losses(steps, folder=None):
        return l2l.MetaTrainer(network(), "quadratic", checkpoint=folder, **options).fit(steps).meta_losses

    losses(3, tmp_path)
    with MODES[mode]():
        losses(5, tmp_path)
    assert losses(7, tmp_path) == losses(7)


def test_a_network_made_for_inference_is_refused_by_name():
    with torch.inference_mode():
        made = l2l.CoordinatewiseLSTM.from_pretrained("l2l-small")
    with pytest.raises(ValueError, match=r"weight_ih_l0 cannot be trained: make the network outside torch\.inference"):
        l2l.MetaTrainer(made, "quadratic")


def test_data_that_were_first_read_for_inference_can_be_trained_on(monkeypatch):
    digits.cache_clear()
    task = l2l.tasks.Classifier("digits", pool=2)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        task.loss(task.init(generator), task.sample(generator))
    assert trained(task)
    digits.cache_clear()


def test_a_cost_is_measured_whatever_the_default(monkeypatch):
    monkeypatch.setattr("l2l_fast.evaluate.costs.COORDINATES", 1000)
    for mode in DEFAULTS.values():
        with mode():
            assert measure_cost(network()).nanoseconds > 0


def test_a_task_of_another_dtype_is_refused_by_name():
    class Default(l2l.tasks.Quadratic):
        def init(self, generator):
            return {"x": torch.zeros(self.dimension)}

    with default_dtype(torch.float64), pytest.raises(
        ValueError, match=r"the task quadratic must start from float32 tensors, .*, got torch.float64: name the dtype"
    ):  # fmt: skip
        trained(Default())
    with (
        torch.device(META),
        pytest.raises(
            ValueError,
            match=r"must start from floating-point tensors on the CPU, got torch.float32 on meta for x: name",
        ),
    ):
        l2l.tasks.Instances(Default(), [0])
    with default_device(META):  # a device is not everybody's, so it is set right for the call
        assert trained(Default())


# ---------------------------------------------------------------- every factory call says what it makes

FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_tensors_are_made_with_a_dtype_and_a_device(path):
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in {f"torch.{name}" for name in FACTORIES}:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            where = f"{path.name}:{call.lineno}: {ast.unparse(call)}"
            # A network's own parameters follow torch's defaults, as those of every nn.Module do, and one asks for them.
            if where.startswith(("networks.py", "modes.py")) and ast.unparse(call) in (
                "torch.empty(shape)",
                "torch.empty(0)",
            ):
                continue
            assert "device" in given, where
            assert "dtype" in given or given["device"] == "'meta'", where  # of which only the shape is asked
