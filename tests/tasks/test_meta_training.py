"""MetaTraining: equal to a hand-written unroll, differentiable as tasks are, and good to train and compare on."""

import copy
import math

import pytest
import torch
from torch.utils._pytree import tree_map

import l2l_fast as l2l
from l2l_fast.meta.identity import describe, differences
from l2l_fast.tasks import Classifier, Instances, MetaTraining, Quadratic, Task

TINY = {"hidden": 3, "unroll": 4, "instances": 2}


def doubled(tree):
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def drawn(task, seed=0):
    """Parameters and a batch, in float64."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: param.requires_grad_() for name, param in doubled(task.init(generator)).items()}
    return params, doubled(task.sample(generator))


def by_hand(task, params, batch, second_derivatives):
    """The equations, one inner instance and one plain autograd call at a time."""
    total = 0.0
    for i in range(task.instances):
        starts = {name: start[i] for name, start in batch[0].items()}
        batches = tree_map(lambda leaf, i=i: leaf[:, i], batch[1])
        theta = {name: start.clone().requires_grad_() for name, start in starts.items()}
        m, v = dict.fromkeys(theta, 0.0), dict.fromkeys(theta, 0.0)
        for t in range(task.unroll + 1):
            loss = task.task.loss(theta, tree_map(lambda leaf, t=t: leaf[t % len(leaf)], batches))
            total = total + loss * (t > 0)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            for (name, x), grad in zip(theta.items(), grads, strict=True):
                grad = grad if second_derivatives else grad.detach()
                m[name], v[name] = 0.95 * m[name] + 0.05 * grad, 0.95 * v[name] + 0.05 * grad**2
                root = (v[name] / (1 - 0.95 ** (t + 1)) + 1e-16).sqrt()
                ratios = m[name] / (1 - 0.95 ** (t + 1)) / root, grad / root
                small = grad.abs() < math.exp(-10)
                log = torch.where(small, -1.0, torch.where(small, 1.0, grad.abs()).log() / 10)
                z = torch.stack([*ratios, log, torch.where(small, math.exp(10) * grad, grad.sign())], -1)
                h = torch.tanh(z @ params["hidden.weight"].T + params["hidden.bias"][:, 0])
                theta[name] = x + 0.1 * (h @ params["head.weight"][0] + params["head.bias"][0, 0])
    return total / task.unroll / task.instances


INNER = {
    "quadratic": lambda: Quadratic(3),
    "digits": lambda: Classifier("digits", (2,), batch_size=5, pool=4),
    "convolutions": lambda: Classifier("digits", (2,), kind="conv", activation="tanh", batch_size=5, pool=2),
}


@pytest.mark.parametrize("second_derivatives", [False, True])
@pytest.mark.parametrize("inner", INNER)
def test_equals_an_unroll_by_hand(inner, second_derivatives):
    task = MetaTraining(INNER[inner](), second_derivatives=second_derivatives, **TINY)
    params, batch = drawn(task)
    loss, expected = task.loss(params, batch), by_hand(task, params, batch, second_derivatives)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    grads, right = (torch.autograd.grad(value, list(params.values())) for value in (loss, expected))
    for one, other in zip(grads, right, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_second_derivatives_are_those_of_finite_differences():
    task = MetaTraining(Quadratic(2), second_derivatives=True, **TINY)
    params, batch = drawn(task)
    names = list(params)
    loss = lambda *values: task.loss(dict(zip(names, values, strict=True)), batch)  # noqa: E731
    torch.autograd.gradcheck(loss, tuple(params.values()))


@pytest.mark.parametrize("second_derivatives", [False, True])
def test_instances_side_by_side_are_each_alone(second_derivatives):
    task = MetaTraining(INNER["digits"](), second_derivatives=second_derivatives, **TINY)
    instances = Instances(task, seeds=[0, 1, 2])
    theta, batch = instances.start(), instances.draw()
    losses, grads = instances.evaluate(theta, batch)
    for i in range(3):
        alone = Instances(task, seeds=[i])
        loss, grad = alone.evaluate(alone.start(), alone.draw())
        torch.testing.assert_close(loss[0], losses[i])
        torch.testing.assert_close(grad[0], grads[i], rtol=1e-3, atol=1e-4)
    functional = torch.vmap(torch.func.grad(task.loss))(instances.unflatten(theta), batch)
    torch.testing.assert_close(torch.cat([grad.flatten(1) for grad in functional.values()], 1), grads)


def test_an_optimizer_that_optimizes_optimizers_has_its_own_training():
    twice = MetaTraining(MetaTraining(Quadratic(2), **TINY), **TINY)
    instances = Instances(twice, seeds=[0, 1])
    losses, grads = instances.evaluate(instances.start(), instances.draw())
    assert twice.name == "meta-meta-quadratic"
    assert losses.isfinite().all()
    assert grads.isfinite().all()
    assert grads.any()


def test_all_randomness_is_the_generator_s():
    task = MetaTraining(INNER["digits"](), **TINY)
    assert isinstance(task, Task)
    before = torch.random.get_rng_state()
    (starts, rows), same, other = (task.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert rows.shape == (5, 2, 5)  # T + 1 batches of B instances
    assert torch.equal(rows, same[1])
    assert not torch.equal(rows, other[1])
    assert all(torch.equal(start, same[0][name]) for name, start in starts.items())
    matrix, _ = MetaTraining(Quadratic(3), **TINY).sample(torch.Generator())[1]
    assert matrix.shape == (1, 2, 3, 3)  # the function itself, once


def test_halves_are_the_inner_task_s():
    task = MetaTraining("digits-mlp", name="mine")
    assert (task.task.half, task.with_half("meta-test").task.half, task.task.half) == (
        "meta-train", "meta-test", "meta-train",
    )  # fmt: skip
    assert task.with_half("meta-test").name == "mine"
    assert MetaTraining(Quadratic(3)).with_half("meta-test").task.dimension == 3


def test_a_checkpoint_tells_inner_tasks_apart():
    first, *others = (describe(MetaTraining(inner, **TINY)) for inner in (Quadratic(3), Quadratic(4), Quadratic(3)))
    assert [differences(first, other) != [] for other in others] == [True, False]


def test_an_lstm_learns_to_train_it_and_stands_beside_tuned_adam():
    task = MetaTraining(Quadratic(3), **TINY | {"unroll": 3})
    network = l2l.CoordinatewiseLSTM("moments", hidden_size=8, num_layers=1)
    options = {"unroll": 10, "horizon": 20, "instances": 8, "meta_lr": 0.03, "objective": "relative"}
    trainer = l2l.MetaTrainer(network, task, validate_every=15, progress=False, **options)
    untrained = copy.deepcopy(network)
    history = trainer.fit(30)
    assert history.skipped == 0
    assert sum(history.meta_losses[-10:]) < 0.9 * sum(history.meta_losses[:10])

    found = l2l.compare(task, {"LSTM": network, "untrained": untrained}, horizon=15, seeds=10, baselines=["adam"],
                        tuning_seeds=2)  # fmt: skip
    assert set(found.optimizers) == {"LSTM", "untrained", "adam"}
    assert found.optimizers["LSTM"].mean_loss < 0.9 * found.optimizers["untrained"].mean_loss
    assert found.optimizers["adam"].mean_loss < found.optimizers["untrained"].mean_loss


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"task": 3}, "task must be a task or the name of one, got 3"),
        ({"task": "quadratc"}, "Did you mean quadratic"),
        ({"hidden": 0}, "hidden must be an int of at least 1, got 0"),
        ({"unroll": 0}, "unroll must be an int of at least 1, got 0"),
        ({"instances": -1}, "instances must be an int of at least 1, got -1"),
        ({"output_scale": 0.0}, "output_scale must be a positive number, got 0"),
        ({"output_scale": math.inf}, "output_scale must be a positive number, got inf"),
    ],
)
def test_refuses(options, why):
    with pytest.raises(ValueError, match=why):
        MetaTraining(**options)
