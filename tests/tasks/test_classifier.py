"""Classifier: right gradients, pure functions, right sizes and starts."""

import math

import pytest
import torch
from torch import nn

from l2l_fast.data import Dataset, digits, halves
from l2l_fast.tasks import Classifier, Instances, Task

MODULES = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "elu": nn.ELU}


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(task: Classifier) -> nn.Sequential:
    """The same network in plain modules."""
    if task.kind == "conv":
        first, second = task.hidden
        return nn.Sequential(
            nn.Unflatten(1, (1, 8)), nn.Conv2d(1, first, 3, 2, 1), MODULES[task.activation](),
            nn.Conv2d(first, second, 3, 2, 1), MODULES[task.activation](), nn.Flatten(), nn.Linear(4 * second, 10),
        )  # fmt: skip
    layers, width = [nn.Flatten()], 64
    for units in task.hidden:
        layers += [nn.Linear(width, units), MODULES[task.activation]()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, 10))


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize(("kind", "hidden"), [("mlp", ()), ("mlp", (20,)), ("mlp", (5, 7)), ("conv", (3, 4))])
def test_loss_and_gradient_equal_plain_modules(activation, kind, hidden):
    task = Classifier("digits", hidden, activation, kind=kind)
    params = {name: param.double().requires_grad_() for name, param in task.init(seeded(1)).items()}
    rows = task.sample(seeded(2))
    inputs, targets = task.examples(rows)
    loss = task.loss(params, rows)
    module = plain(task).double()
    with torch.no_grad():
        for mine, theirs in zip(params.values(), module.parameters(), strict=True):
            theirs.copy_(mine)
    expected = nn.functional.cross_entropy(module(inputs.double().reshape(-1, 8, 8)), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(loss, list(params.values()))
    torch.testing.assert_close(got, torch.autograd.grad(expected, list(module.parameters())), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_instances_equal_a_loop(activation, kind):
    task = Classifier("digits", (4, 3), activation, kind=kind, init_scale=(0.1, 1.0))
    assert isinstance(task, Task)
    seeds = [5, 6, 7]
    instances = Instances(task, seeds)
    theta, batch = instances.start(), instances.draw()
    losses, grads = instances.evaluate(theta, batch)
    second = instances.draw()
    assert not torch.equal(second, batch)
    for i, seed in enumerate(seeds):
        generator = seeded(seed)
        params = {name: param.requires_grad_() for name, param in task.init(generator).items()}
        assert torch.equal(torch.cat([param.detach().flatten() for param in params.values()]), theta[i])
        loss = task.loss(params, task.sample(generator))
        flat = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(params.values()))])
        torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads[i], flat, rtol=1e-4, atol=1e-6)
        assert torch.equal(task.sample(generator), second[i])


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_second_derivatives(kind):
    tiny = Dataset("tiny", torch.rand(8, 4, 4, generator=seeded()), torch.arange(8) % 3, classes=3)
    task = Classifier(tiny, (2,), "tanh", kind=kind, batch_size=4)
    names = list(task.init(seeded()))
    params = tuple(param.double().requires_grad_() for param in task.init(seeded()).values())
    rows = task.sample(seeded(1))

    def loss(*params):
        return task.loss(dict(zip(names, params, strict=True)), rows)

    assert torch.autograd.gradgradcheck(loss, params, fast_mode=True)


def test_pure_and_its_own_randomness():
    task = Classifier("digits")
    before = torch.random.get_rng_state()
    first, again = (task.init(seeded(3)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    one, two = (task.sample(seeded(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(task.init(seeded(4))["0.weight"], first["0.weight"])
    assert torch.equal(torch.random.get_rng_state(), before)
    inputs, targets = task.examples(one)
    assert (inputs.shape, inputs.dtype, targets.shape, targets.dtype) == ((128, 64), torch.float32, (128,), torch.int64)


def test_halves_share_no_example():
    task = Classifier("digits", batch_size=20000)
    other = task.with_half("meta-test")
    assert (task.half, other.half, other.name) == ("meta-train", "meta-test", task.name)
    seen = {}
    for each in (task, other):
        inputs, targets = each.examples(each.sample(seeded()))
        half = halves(digits())[each.half]
        known = {(*row.tolist(), int(target)) for row, target in zip(half.inputs.flatten(1), half.targets, strict=True)}
        seen[each.half] = {(*row.tolist(), int(target)) for row, target in zip(inputs, targets, strict=True)}
        assert seen[each.half] == known  # all of its half (20,000 draws from 899 miss none), and nothing else
    assert not seen["meta-train"] & seen["meta-test"]
    rows = task.sample(seeded())
    assert torch.equal(other.with_half("meta-train").examples(rows)[0], task.examples(rows)[0])


def test_default_start_is_torch_s():
    params = Classifier("digits", (200,)).init(seeded())
    for layer, fan_in in (("0", 64), ("1", 200)):
        bound = 1 / math.sqrt(fan_in)
        for part in ("weight", "bias"):
            values = params[f"{layer}.{part}"]
            assert values.abs().max() <= bound
            assert values.abs().max() > 0.8 * bound
        assert params[f"{layer}.weight"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        # ... and it is what torch.nn.Linear does, so that a new release of torch that differs is noticed.
        torch.manual_seed(0)
        theirs = nn.Linear(fan_in, 5000)
        assert theirs.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert theirs.bias.abs().max().item() == pytest.approx(bound, rel=1e-2)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_gaussian_start(kind):
    params = Classifier("digits", (100, 50), kind=kind, init_scale=0.03).init(seeded())
    weights = torch.cat([param.flatten() for name, param in params.items() if name.endswith("weight")])
    assert weights.std().item() == pytest.approx(0.03, rel=0.05)
    assert all(not param.any() for name, param in params.items() if name.endswith("bias"))


def test_log_uniform_start():
    task = Classifier("digits", init_scale=(0.003, 0.3))
    stds = torch.tensor([task.init(seeded(seed))["0.weight"].std().item() for seed in range(200)]).log()
    low, high = math.log(0.003), math.log(0.3)
    assert low - 0.1 < stds.min() < low + 0.3
    assert high - 0.3 < stds.max() < high + 0.1
    assert stds.mean().item() == pytest.approx((low + high) / 2, abs=0.3)


def test_pooled_images():
    plain, pooled = Classifier("digits"), Classifier("digits", pool=2)
    rows = torch.tensor([3, 0])
    images, targets = plain.examples(rows)
    squares, same = pooled.examples(rows)
    assert torch.equal(targets, same)
    torch.testing.assert_close(squares.view(2, 4, 4), images.view(2, 4, 2, 4, 2).mean((2, 4)))
    assert pooled.init(torch.Generator())["0.weight"].shape == (20, 16)
    assert pooled.name == "digits/2-mlp-20-sigmoid"
    assert Classifier("digits", kind="conv", pool=2).init(torch.Generator())["1.weight"].shape[1] == 80
    assert Classifier("digits", pool=3).init(torch.Generator())["0.weight"].shape[1] == 4  # 8 / 3: an edge is dropped


def test_own_data():
    colour = Dataset("colour", torch.rand(10, 3, 5, 7), torch.arange(10) % 2, classes=2)
    task = Classifier(colour, (4, 6), "gelu", kind="conv", batch_size=3)
    assert task.name == "colour-conv-4-6-gelu"
    assert [tuple(param.shape) for param in task.init(seeded()).values()] == [
        (4, 3, 3, 3), (4,), (6, 4, 3, 3), (6,), (2, 6 * 2 * 2), (2,),
    ]  # fmt: skip
    assert task.loss(task.init(seeded()), task.sample(seeded())).isfinite()
    flat = Dataset("flat", torch.rand(10, 5), torch.arange(10) % 2, classes=2)
    assert Classifier(flat).init(seeded())["0.weight"].shape == (20, 5)
    with pytest.raises(ValueError, match="needs images"):
        Classifier(flat, kind="conv").init(seeded())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dataset": "cifar"}, "dataset must be one of digits, mnist; got 'cifar'"),
        ({"activation": "swish"}, "activation must be one of sigmoid, tanh, relu, gelu"),
        ({"kind": "rnn"}, "kind must be one of mlp, conv"),
        ({"half": "test"}, "half must be one of meta-train, meta-test"),
        ({"hidden": (20, 0)}, "hidden"),
        ({"batch_size": 0}, "batch_size"),
        ({"init_scale": "small"}, "init_scale"),
        ({"init_scale": -1.0}, "init_scale"),
        ({"init_scale": float("nan")}, "init_scale"),
        ({"init_scale": (0.3, 0.003)}, "init_scale"),
        ({"init_scale": (0, 1)}, "init_scale"),
        ({"init_scale": (1, 2, 3)}, "init_scale"),
        ({"pool": 0}, "pool must be an int of at least 1"),
    ],
)
def test_refuses(options, why):
    with pytest.raises(ValueError, match=why):
        Classifier(**({"dataset": "digits"} | options))


def test_refuses_another_half():
    with pytest.raises(ValueError, match="half must be one of"):
        Classifier("digits").with_half("validation")
