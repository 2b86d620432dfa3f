"""Quadratic and the parts of Instances that no classifier needs."""

import pytest
import torch

from l2l_fast.tasks import Classifier, Instances, Quadratic


def test_equals_its_equation():
    instances = Instances(Quadratic(dimension=4), seeds=[0, 1])
    theta, (matrix, target) = instances.start(), instances.draw()
    losses, grads = instances.evaluate(theta, (matrix, target))
    residual = torch.einsum("bij,bj->bi", matrix, theta) - target
    torch.testing.assert_close(losses, residual.square().sum(1))
    torch.testing.assert_close(grads, 2 * torch.einsum("bij,bi->bj", matrix, residual))


def test_one_function_a_trajectory():
    instances = Instances(Quadratic(), seeds=[0])
    for one, two in zip(instances.draw(), instances.draw(), strict=True):
        assert torch.equal(one, two)


def test_start_scale():
    assert not Instances(Quadratic(start_scale=0), seeds=[0]).start().any()
    wide, unit = (Instances(Quadratic(start_scale=scale), seeds=[0]).start() for scale in (3.0, 1.0))
    torch.testing.assert_close(wide, 3 * unit)


@pytest.mark.parametrize("options", [{"dimension": 0}, {"start_scale": -1.0}])
def test_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Quadratic(**options)


def test_instances_resume():
    instances = Instances(Classifier("digits", batch_size=8), seeds=[0, 1])
    instances.draw()
    saved = instances.state_dict()
    expected = instances.draw()
    instances.draw()
    instances.load_state_dict(saved)
    assert torch.equal(instances.draw(), expected)


def test_drawing_ahead_is_drawing_one_after_another():
    one, other = (Instances(Classifier("digits", batch_size=8), seeds=[0, 1]) for _ in range(2))
    ahead = one.draws(3)
    assert ahead.shape == (3, 2, 8)
    assert torch.equal(ahead, torch.stack([other.draw() for _ in range(3)]))
    assert torch.equal(one.draw(), other.draw())
    matrix, target = Instances(Quadratic(), seeds=[0, 1]).draws(3)
    assert (matrix.shape, target.shape) == ((3, 2, 10, 10), (3, 2, 10))
