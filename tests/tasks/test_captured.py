"""What is captured of a task gives what autograd gives, to the last bit, and never outlives what it was captured of."""

import pytest
import torch
from torch import nn

from l2l_fast import MetaTrainer
from l2l_fast.tasks import Instances, ModuleTask, Quadratic, captured, get

KINDS = {
    "quadratic": Quadratic,
    "classifier": lambda: get("digits-mlp"),
    "convolutions": lambda: get("digits-conv"),
    "transformer": lambda: get("small-transformer", batch_size=4),
    "batch statistics": lambda: get("cnn-batchnorm", data="digits", batch_size=8),
}


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(captured, "AFTER", 0)


def walk(task, count, steps=4):
    """Losses and gradients at points of a walk."""
    instances = Instances(task, range(count))
    theta, found = instances.start(), []
    leaves = instances.leaves(theta)
    for _ in range(steps):
        out = torch.empty_like(theta)
        losses = instances.gradients(leaves, instances.draw(), out)
        assert not losses.requires_grad
        found += [losses, out]
        theta -= 0.01 * out
    return found, instances


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_autograds_to_the_last_bit(kind, count, monkeypatch):
    task = KINDS[kind]()
    monkeypatch.setattr(captured, "AFTER", 10**9)
    expected, eager = walk(task, count)
    monkeypatch.setattr(captured, "AFTER", 0)
    found, instances = walk(task, count)
    assert all(map(torch.equal, found, expected))
    assert not eager._evaluation._trusted
    assert len(instances._evaluation._trusted) == 1, "nothing was captured"


def test_a_meta_training_is_the_same(monkeypatch):
    runs = []
    for after in (3, 10**9):
        monkeypatch.setattr(captured, "AFTER", after)
        torch.manual_seed(0)
        trainer = MetaTrainer(_network(), "digits-mlp", unroll=4, horizon=10, instances=2, progress=False)
        trainer.fit(6)
        runs.append((trainer.history.meta_losses, trainer.network.flat_weights()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def _network():
    from l2l_fast import CoordinatewiseLSTM

    return CoordinatewiseLSTM("both", 3, 1)


def test_seldom_evaluated_is_never_traced(monkeypatch):
    monkeypatch.setattr(captured, "AFTER", 4)
    task = Quadratic()
    assert not walk(task, 2)[1]._evaluation._trusted
    assert walk(task, 2)[1]._evaluation._trusted  # the fifth evaluation, by another trajectory


class Changing(Quadratic):
    factor = 1.0

    def loss(self, params, batch):
        return self.factor * super().loss(params, batch)


def test_a_task_that_is_changed_is_noticed_by_the_next_trajectory(at_once):
    task = Changing()
    before, _ = walk(task, 2)
    task.factor = 2.0
    after, instances = walk(task, 2)
    assert torch.equal(after[0], 2 * before[0])
    assert not instances._evaluation._trusted
    assert all(map(torch.equal, walk(task, 2)[0], after))


class Branching(Quadratic):
    vmap = False

    def loss(self, params, batch):
        loss = super().loss(params, batch)
        return loss if float(loss.detach()) > 10 else 2 * loss


class ByNumPy(Quadratic):
    vmap = False

    def loss(self, params, batch):
        return super().loss(params, batch) * float(params["x"].detach().numpy().mean() ** 2 + 1)


class WithoutHash(Quadratic):
    __hash__ = None


def recurrent():
    """Its operator can be traced and not be called."""
    return get("recurrent-lm", batch_size=2)


@pytest.mark.parametrize("kind", [Branching, ByNumPy, WithoutHash, recurrent])
def test_what_cannot_be_captured_is_evaluated_as_before(kind, at_once):
    found, instances = walk(kind(), 2)
    assert not instances._evaluation._trusted
    assert all(map(torch.equal, found, walk(kind(), 2)[0]))
    assert all(torch.isfinite(each).all() for each in found)


def test_a_loss_that_is_not_finite_is_no_reason_to_drop_it(at_once):
    task = ModuleTask(lambda: nn.Linear(2, 1), (torch.randn(8, 2), torch.randn(8, 1)), nn.functional.mse_loss)
    walk(task, 1)
    instances = Instances(task, [0])
    theta = instances.start()
    leaves, out = instances.leaves(theta), torch.empty_like(theta)
    was = theta.clone()
    theta.fill_(float("inf"))
    assert not instances.gradients(leaves, instances.draw(), out).isfinite().all()
    theta.copy_(was)
    instances.gradients(leaves, instances.draw(), out)
    assert instances._evaluation._trusted
