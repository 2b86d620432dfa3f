"""ModuleTask: a plain module trained by hand and as a task comes out the same; what cannot be a task is refused."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l2l_fast as l2l
from l2l_fast.evaluate.compare import held_out
from l2l_fast.tasks import Instances, ModuleTask, Task

X = torch.linspace(-1, 1, 50).unsqueeze(1)
Y = X**3


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def test_equals_a_hand_written_loop():
    task = ModuleTask(make, (X, Y), F.mse_loss, batch_size=16)
    assert isinstance(task, Task)
    instances = Instances(task, seeds=[3, 4])
    theta, losses = instances.start(), []
    for _ in range(5):
        loss, grads = instances.evaluate(theta, instances.draw())
        losses.append(loss)
        theta = theta - 0.1 * grads
    for i, seed in enumerate([3, 4]):
        generator = torch.Generator().manual_seed(seed)
        module = make()
        module.load_state_dict(task.init(generator))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(5):
            rows = torch.randint(len(X), (16,), generator=generator)
            loss = F.mse_loss(module(X[rows]), Y[rows])
            torch.testing.assert_close(losses[step][i], loss.detach(), rtol=1e-5, atol=1e-7)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(theta[i], nn.utils.parameters_to_vector(module.parameters()).detach())


def test_starts_are_fresh_seeded_and_leave_the_global_generator():
    before = torch.random.get_rng_state()
    task = ModuleTask(make, (X, Y), F.mse_loss)
    one, same, other = (task.init(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_one_tensor_and_one_batch_for_ever():
    task = ModuleTask(lambda: nn.Linear(1, 1), X, lambda out: out.square().mean(), resample=False, name="mine")
    instances = Instances(task, seeds=[0])
    assert task.name == "mine"
    assert torch.equal(instances.draw(), instances.draw())
    assert instances.draw().shape == (1, 128)


def test_frozen_parameters_buffers_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.two = nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight
            self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
            self.register_buffer("shift", torch.ones(3))

        def forward(self, x):
            return self.two(self.one(x)) * self.frozen + self.shift

    x = torch.rand(10, 3)
    task = ModuleTask(Tied, x, lambda out: out.square().sum())
    params = task.init(torch.Generator())
    assert list(params) == ["one.weight"]
    weight = params["one.weight"]
    expected = (x @ weight.T @ weight.T * 2 + 1).square().sum()
    torch.testing.assert_close(task.loss(params, torch.arange(10)), expected)


def test_second_derivatives():
    instances = Instances(ModuleTask(make, (X, Y), F.mse_loss), seeds=[0, 1])
    theta = instances.start().requires_grad_()
    _, grads = instances.evaluate(theta, instances.draw(), create_graph=True)
    (second,) = torch.autograd.grad(grads.square().sum(), theta)
    assert second.isfinite().all()
    assert second.any()


class Counting(nn.Module):
    """Its loss depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class HiddenCounting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) / self.calls


class HiddenDropout(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), training=self.training)


class Random(nn.Linear):
    """Half of the calls are alike; what draws is told from what is drawn."""

    def __init__(self, draw):
        super().__init__(1, 1)
        self.draw = draw

    def forward(self, x):
        return super().forward(x) * (self.draw() < 0.5)


class Writing(nn.Linear):
    """Changes its frozen weight, or the one that is trained."""

    def __init__(self, trained):
        super().__init__(1, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.trained = trained

    def forward(self, x):
        (self.weight if self.trained else self.frozen).data.mul_(0.5)
        return super().forward(x)


class Drawn(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.weight.data.fill_(random.random())


def spectral():
    return nn.Sequential(nn.Linear(1, 3), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 1))


own_generator = random.Random(0)


class Spare(nn.Linear):
    def __init__(self, spares=1):
        super().__init__(1, 1)
        self.spare = nn.ModuleList(nn.Linear(1, 1) for _ in range(spares))


@pytest.mark.parametrize(
    ("make_module", "why"),
    [
        (nn.Tanh, "no trainable parameters"),
        (lambda: nn.Linear(1, 1).requires_grad_(False), "no trainable parameters"),
        (lambda: nn.Sequential(nn.Linear(1, 1), nn.Dropout()), r"Dropout \(1\) is random"),
        (lambda: HiddenDropout(1, 1), "module or loss_fn is random, .* draws from torch's generator"),
        (lambda: Random(random.random), "module or loss_fn is random, .* draws from Python's generator"),
        (lambda: Random(np.random.rand), "module or loss_fn is random, .* draws from NumPy's generator"),
        (
            lambda: Random(own_generator.random),
            r"was .* and .* of the same: the module or loss_fn is random, or counts",
        ),
        (lambda: HiddenCounting(1, 1), "of the same: .* or counts its calls"),
        (Counting, "loss depends on calls, which the forward pass changes, so that a loss would change the next: put"),
        (spectral, r"loss depends on 1\.parametrizations\.weight\.0\._u"),
        (lambda: Writing(False), "the forward pass changes frozen in place: make a new tensor"),
        (lambda: Writing(True), "the forward pass changes weight in place: make a new tensor"),
        (
            Drawn,
            "make the same module whenever torch's generator has the same seed, and weight differ: draw from torch",
        ),
        (Spare, r"does not depend on spare\.0\.weight, spare\.0\.bias: use each .* or freeze it in make_module"),
        (lambda: Spare(4), r"spare\.0\.weight, .*, spare\.2\.weight and 3 more"),
        (lambda: "not a module", "must return a torch.nn.Module, got str"),
    ],
)
def test_refuses_modules(make_module, why):
    with pytest.raises(ValueError, match=why):
        ModuleTask(make_module, (X, Y), F.mse_loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_refuses_parameters_that_are_not_float32(dtype):
    data = X.to(dtype), Y.to(dtype)  # with which the module itself would run
    with pytest.raises(ValueError, match=rf"must be float32, .* got {dtype} for 0\.weight, .* as float\(\) does"):
        ModuleTask(lambda: make().to(dtype), data, F.mse_loss)

    class Shifted(nn.Linear):
        def __init__(self):
            super().__init__(1, 1)
            self.register_buffer("shift", torch.ones((), dtype=dtype))

        def forward(self, x):
            return super().forward(x.float()) + self.shift

    task = ModuleTask(Shifted, data, F.mse_loss)  # constants and data may be what they like
    assert {param.dtype for param in task.init(torch.Generator()).values()} == {torch.float32}


def frozen_spare():
    module = Spare()
    module.spare.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    "make_module",
    [
        lambda: nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)),
        lambda: nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval(),
        lambda: spectral().eval(),
        lambda: nn.Sequential(nn.Linear(1, 4), nn.GroupNorm(2, 4), nn.Linear(4, 1)),
        lambda: nn.Sequential(nn.Linear(1, 1), nn.Dropout()).eval(),
        frozen_spare,
    ],
)
def test_cures_work(make_module):
    instances = Instances(ModuleTask(make_module, (X, Y), F.mse_loss), seeds=[0, 1])
    losses, grads = instances.evaluate(instances.start(), instances.draw())
    assert losses.isfinite().all()
    assert grads.isfinite().all()


@pytest.mark.parametrize(
    ("data", "options", "why"),
    [
        ((X, Y[:-1]), {}, r"lengths \[50, 49\]"),
        ((X[:0], Y[:0]), {}, "at least 1"),
        ((), {}, "data must be"),
        ((X, 3), {}, "data must be"),
        (torch.tensor(1.0), {}, "data must be"),
        ((X, Y), {"batch_size": 0}, "batch_size"),
        ((X, Y), {"loss_fn": lambda out, y: out - y}, r"scalar, got shape \[2, 1\]"),
        ((X, Y), {"loss_fn": lambda out, y: 3.0}, "loss_fn must return a scalar tensor, got float"),
        ((X, Y), {"loss_fn": lambda out, y: F.dropout(out).sum()}, "random, .* it draws from torch's generator"),
        ((X, Y), {"loss_fn": lambda out, y: (out @ y).sum()}, "cannot be evaluated and differentiated: mat1 and mat2"),
        ((X, Y), {"loss_fn": lambda out, y: y.square().mean()}, "does not depend on the module's parameters"),
        ((X, Y), {"loss_fn": lambda out, y: (out > y).float().mean()}, "does not depend on the module's parameters"),
        ((X, Y), {"loss_fn": lambda out, y: F.mse_loss(out.detach(), y)}, "first argument, without detach"),
    ],
)
def test_refuses_data_and_losses(data, options, why):
    with pytest.raises(ValueError, match=why):
        ModuleTask(make, data, **({"loss_fn": F.mse_loss} | options))


def test_refuses_sparse_gradients():
    with pytest.raises(ValueError, match=r"gradient of weight is sparse, .*: for nn.Embedding, sparse=False"):
        ModuleTask(lambda: nn.Embedding(5, 2, sparse=True), torch.arange(4), lambda out: out.square().mean())


def test_a_module_that_is_refused_has_drawn_nothing_from_its_neighbours():
    """What is accepted changes no generator, and the module that is looked at is left as it was made."""
    module = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = torch.random.get_rng_state(), random.getstate()
    task = ModuleTask(lambda: module, (X, Y), F.mse_loss)  # the same one every time
    task.evaluation_loss(task.init(torch.Generator()), torch.arange(3))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training


def test_can_be_made_where_gradients_are_off():
    with torch.no_grad():
        ModuleTask(make, (X, Y), F.mse_loss)


def test_comparisons_are_on_the_test_data():
    task = ModuleTask(make, (X, Y), F.mse_loss, batch_size=4, test_data=(X + 5, Y))
    there = held_out(task)
    batch, params = torch.tensor([0, 7, 49]), task.init(torch.Generator().manual_seed(0))
    expected = F.mse_loss(torch.func.functional_call(make(), params, (X[batch] + 5,)), Y[batch])
    torch.testing.assert_close(there.loss(params, batch), expected)
    assert not torch.equal(task.loss(params, batch), expected)
    back = there.with_half("meta-train")
    torch.testing.assert_close(back.loss(params, batch), task.loss(params, batch))
    alone = ModuleTask(make, (X, Y), F.mse_loss)
    assert torch.equal(held_out(alone).loss(params, batch), alone.loss(params, batch))


def test_test_data_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="test_data must have rows like those of data"):
        ModuleTask(make, (X, Y), F.mse_loss, test_data=(X, Y.double()))
    with pytest.raises(ValueError, match="test_data must share a first dimension"):
        ModuleTask(make, (X, Y), F.mse_loss, test_data=(X, Y[1:]))
    with pytest.raises(ValueError, match="half must be one of 'meta-train', 'meta-test', got 'test'"):
        ModuleTask(make, (X, Y), F.mse_loss).with_half("test")


# ---------------------------------------------------------------- recurrent modules, branches


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.recurrent = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens):
        return self.head(self.recurrent(self.embedding(tokens))[0]).flatten(0, 1)


class Branching(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else 2 * y


TOKENS = torch.arange(84).view(12, 7) * 7919 % 5
NEXT = (TOKENS + 1) % 5


def language(kind=nn.LSTM, **options):
    return ModuleTask(
        lambda: Recurrent(kind, **options), (TOKENS, NEXT), lambda out, y: F.cross_entropy(out, y.flatten()),
        batch_size=4,
    )  # fmt: skip


BY_LOOPS = {
    "lstm": language,
    "two layers of gru": lambda: language(nn.GRU, num_layers=2),
    "rnn": lambda: language(nn.RNN),
    "branch": lambda: ModuleTask(lambda: Branching(1, 1), (X, Y), F.mse_loss, batch_size=4),
}


@pytest.mark.parametrize("name", BY_LOOPS)
def test_what_vmap_cannot_batch_is_evaluated_one_by_one(name):
    task = BY_LOOPS[name]()
    assert not task.vmap
    assert not task.with_half("meta-test").vmap
    instances = Instances(task, seeds=[3, 4, 5])
    theta, batch = instances.start(), instances.draw()
    losses, grads = instances.evaluate(theta, batch)
    for i in range(3):
        module = task.make_module()
        params = {name: value[i].clone().requires_grad_() for name, value in instances.unflatten(theta).items()}
        rows = batch[i]
        inputs, targets = (tensor[rows] for tensor in task.data)
        expected = task.loss_fn(torch.func.functional_call(module, params, (inputs,)), targets)
        expected_grads = torch.autograd.grad(expected, list(params.values()))
        torch.testing.assert_close(losses[i], expected.detach())
        torch.testing.assert_close(grads[i], torch.cat([grad.flatten() for grad in expected_grads]))
    leaves = instances.leaves(theta)  # as the meta-trainer has them: views that are changed in place
    theta.mul_(0.5)
    out = torch.empty_like(theta)
    torch.testing.assert_close(instances.gradients(leaves, batch, out), instances.evaluate(theta, batch)[0])
    assert all(leaf.untyped_storage().data_ptr() == theta.untyped_storage().data_ptr() for leaf in leaves.values())


def test_vmap_is_used_where_it_can_be():
    assert ModuleTask(make, (X, Y), F.mse_loss).vmap
    assert with_statistics().vmap


@pytest.mark.parametrize("name", ["lstm", "two layers of gru"])
def test_second_derivatives_one_by_one(name):
    instances = Instances(BY_LOOPS[name](), seeds=[0, 1])
    theta = instances.start().requires_grad_()
    _, grads = instances.evaluate(theta, instances.draw(), create_graph=True)
    (second,) = torch.autograd.grad(grads.square().sum(), theta)
    step = 1e-3 * second / second.norm()
    instances = [Instances(BY_LOOPS[name](), seeds=[0, 1]) for _ in range(2)]  # the same batches again
    ends = [
        one.evaluate(theta.detach() + sign * step, one.draw())[1].square().sum().item()
        for one, sign in zip(instances, (1, -1), strict=True)
    ]
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(second.norm().item(), rel=2e-2)


def test_trained_and_compared_one_by_one():
    """A task that loops is the same task: it is trained on and compared on as the others are."""
    options = {"unroll": 3, "horizon": 6, "instances": 2, "validation_instances": 2, "progress": False}
    network = l2l.CoordinatewiseLSTM("moments", 3, 1)
    history = l2l.MetaTrainer(network, language(), **options).fit(4)
    assert all(map(math.isfinite, history.meta_losses))
    found = l2l.compare(language(), network, horizon=5, seeds=2, tuning_seeds=2, baselines=["sgd"])
    alone = [l2l.compare(language(), sgd(rate), horizon=5, seeds=2, tuning_seeds=2, baselines=["adam"])
             for rate in [found.optimizers["sgd"].lr]]  # fmt: skip
    assert alone[0].optimizers["learned"].curve == pytest.approx(found.optimizers["sgd"].curve, rel=1e-4)
    inner = l2l.tasks.MetaTraining(language(), unroll=2, instances=2)
    assert not inner.vmap
    assert Instances(inner, [0, 1]).draw() is not None
    losses, grads = (instances := Instances(inner, [0, 1])).evaluate(instances.start(), instances.draw())
    assert losses.isfinite().all()
    assert grads.isfinite().all()
    assert grads.any()


def sgd(rate):
    def learned(params):
        return torch.optim.SGD(params, lr=rate)

    return learned


# ---------------------------------------------------------------- buffers that the forward pass changes


def normalised():
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def with_statistics(make_module=normalised):
    return ModuleTask(make_module, (X, Y), F.mse_loss, batch_size=16, test_data=(X[::2] + 0.1, Y[::2]))


def test_running_statistics_are_carried_for_each_instance():
    """Three instances at once, against a module of its own for each, trained by hand."""
    task, rate = with_statistics(), 0.1
    instances = Instances(task, seeds=[3, 4, 5])
    modules = [normalised() for _ in range(3)]
    for module, params in zip(modules, _rows(instances.unflatten(instances.start()), 3), strict=True):
        module.load_state_dict(params, strict=False)
    theta, buffers = instances.start(), None
    for _ in range(4):
        batch = instances.draw()
        params = instances.unflatten(theta)
        if buffers is None:
            losses, buffers = torch.vmap(task.loss_and_buffers)(params, batch)
        else:
            losses, buffers = torch.vmap(task.loss_and_buffers)(params, batch, buffers)
        plain, grads = instances.evaluate(theta, batch)
        torch.testing.assert_close(losses, plain)
        theta = theta - rate * grads
        for i, module in enumerate(modules):
            loss = F.mse_loss(module(X[batch[i]]), Y[batch[i]])
            torch.testing.assert_close(losses[i], loss.detach())
            grads = torch.autograd.grad(loss, list(module.parameters()))
            with torch.no_grad():
                for param, grad in zip(module.parameters(), grads, strict=True):
                    param -= rate * grad
    assert set(buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    there, rows = task.with_half("meta-test"), torch.arange(25)
    for i, module in enumerate(modules):
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer)
        expected = F.mse_loss(module.eval()(X[::2] + 0.1), Y[::2])
        mine = [_rows(tree, 3)[i] for tree in (instances.unflatten(theta), buffers)]
        torch.testing.assert_close(there.evaluation_loss(mine[0], rows, mine[1]), expected)
    together = torch.vmap(there.evaluation_loss, (0, None, 0))(instances.unflatten(theta), rows, buffers)
    assert len(together.unique()) == 3


def _rows(tree, count):
    return [{name: tensor[i] for name, tensor in tree.items()} for i in range(count)]


def test_losses_leave_no_trace_in_one_another():
    task = with_statistics()
    params, rows = task.init(torch.Generator().manual_seed(0)), torch.arange(16)
    first, buffers = task.loss_and_buffers(params, rows)
    task.loss(params, rows + 20)
    second, same = task.loss_and_buffers(params, rows)
    assert torch.equal(first, second)
    assert all(torch.equal(buffers[name], same[name]) for name in buffers)
    given = {name: buffer.clone() for name, buffer in buffers.items()}
    _, later = task.loss_and_buffers(params, rows, buffers)
    assert all(torch.equal(buffers[name], given[name]) for name in buffers)
    assert later["1.num_batches_tracked"] == 2
    assert ModuleTask(make, (X, Y), F.mse_loss).loss_and_buffers(task_params(), rows)[1] == {}


def task_params():
    return ModuleTask(make, (X, Y), F.mse_loss).init(torch.Generator().manual_seed(0))


class Tallying(nn.Linear):
    """Counts its calls in a buffer that nothing depends on, by a new tensor each time."""

    def __init__(self):
        super().__init__(1, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


@pytest.mark.parametrize("make_module", [Tallying, lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3),
                                                                        nn.Flatten(), nn.Linear(108, 1))])  # fmt: skip
def test_trained_and_compared_with_statistics(make_module):
    inputs = X if make_module is Tallying else torch.linspace(-1, 1, 50 * 64).view(50, 1, 8, 8).sin()
    task = ModuleTask(make_module, (inputs, Y), F.mse_loss, batch_size=8)
    assert task.vmap
    network = l2l.CoordinatewiseLSTM("moments", 3, 1)
    options = {"unroll": 3, "horizon": 6, "instances": 2, "validation_instances": 2, "progress": False}
    assert all(map(math.isfinite, l2l.MetaTrainer(network, task, **options).fit(4).meta_losses))
    found = l2l.compare(task, network, horizon=5, seeds=2, tuning_seeds=2, baselines=["sgd"])
    assert found.ratio_mean is not None
    _, buffers = task.loss_and_buffers(task.init(torch.Generator()), torch.arange(8))
    assert buffers[next(reversed(buffers))] == 1
