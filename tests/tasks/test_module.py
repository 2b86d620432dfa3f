"""ModuleTask: a plain module trained by hand and as a task comes out the same; what cannot be a task is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


class HiddenDropout(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), training=self.training)


class Spare(nn.Linear):
    def __init__(self, spares=1):
        super().__init__(1, 1)
        self.spare = nn.ModuleList(nn.Linear(1, 1) for _ in range(spares))


@pytest.mark.parametrize(
    ("make_module", "why"),
    [
        (nn.Tanh, "no trainable parameters"),
        (lambda: nn.Linear(1, 1).requires_grad_(False), "no trainable parameters"),
        (
            lambda: nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
            r"BatchNorm1d \(1\) keeps",
        ),
        (lambda: nn.Sequential(nn.Linear(1, 1), nn.Dropout()), r"Dropout \(1\) is random"),
        (lambda: HiddenDropout(1, 1), r"torch\.vmap"),
        (Counting, "changes its buffer calls"),
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
        ((X, Y), {"loss_fn": lambda out, y: y.square().mean()}, "does not depend on the module's parameters"),
        ((X, Y), {"loss_fn": lambda out, y: (out > y).float().mean()}, "does not depend on the module's parameters"),
        ((X, Y), {"loss_fn": lambda out, y: F.mse_loss(out.detach(), y)}, "first argument, without detach"),
    ],
)
def test_refuses_data_and_losses(data, options, why):
    with pytest.raises(ValueError, match=why):
        ModuleTask(make, data, **({"loss_fn": F.mse_loss} | options))


def test_refuses_sparse_gradients():
    with pytest.raises(ValueError, match=r"cannot be differentiated under .* sparse tensors"):
        ModuleTask(lambda: nn.Embedding(5, 2, sparse=True), torch.arange(4), lambda out: out.square().mean())


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
