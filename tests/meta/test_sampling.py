"""A meta-gradient from some of the coordinates."""

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM, MetaTrainer
from l2l_fast.meta.estimators import TruncatedBackpropagation
from l2l_fast.meta.sampling import sample_coordinates
from l2l_fast.meta.unroll import Rule, Trajectory
from l2l_fast.tasks import Instances, Quadratic, get


def some_updates(count=50, steps=4):
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(steps, count, generator=generator) * (0.05 + torch.rand(count, generator=generator))
    return updates.masked_fill(torch.rand(count, generator=generator) < 0.2, 0)


def shifts(number):
    return ((torch.arange(number, dtype=torch.float64) + 0.5) / number).unbind()


def test_the_mean_over_shifts_counts_every_coordinate_once():
    updates, total = some_updates(), torch.zeros(50, dtype=torch.float64)
    for shift in shifts(4000):
        chosen, factors = sample_coordinates(updates, 12, shift)
        total.index_add_(0, chosen, factors.double())
    some = updates.abs().sum(0) > 0
    torch.testing.assert_close(total[some] / 4000, torch.ones(int(some.sum()), dtype=torch.float64), atol=0.02, rtol=0)
    assert (total[~some] == 0).all()


def test_heavy_coordinates_are_always_among_them():
    updates = torch.full((3, 100), 0.01)
    updates[:, 7] = 5.0
    for shift in shifts(9):
        chosen, factors = sample_coordinates(updates, 4, shift)
        assert (chosen == 7).sum() >= 3
        assert (chosen.dtype, factors.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("updates", [torch.zeros(3, 5), torch.tensor([[0.0, 0, 0, 0, 2.0]]), torch.ones(1, 5)])
def test_edges(updates):
    for shift in (0.0, 0.5, 1 - 2**-53):
        chosen, factors = sample_coordinates(updates, 3, torch.tensor(shift, dtype=torch.float64))
        assert ((chosen >= 0) & (chosen < 5)).all()
        counted = (updates[:, chosen].abs().sum(0) * factors).sum()
        torch.testing.assert_close(counted, updates.abs().sum())


def window(coordinates, seed=1):
    torch.manual_seed(0)
    network = CoordinatewiseLSTM("both", 8, 1)
    rule = Rule(network.config, network.flat_weights().detach())
    trajectory = Trajectory(Instances(get("digits-mlp"), [seed]), rule.config)
    return trajectory, TruncatedBackpropagation(rule, coordinates=coordinates).prepare(trajectory, 10)()


def test_few_coordinates_give_nearly_the_whole_gradient():
    trajectory, (meta_loss, whole) = window(None)
    for coordinates, tolerance in ((1000, 0.03), (300, 0.1)):
        other, (other_loss, gradient) = window(coordinates)
        assert torch.equal(trajectory.theta, other.theta)
        assert torch.equal(meta_loss, other_loss)
        assert 0 < (gradient - whole).norm() / whole.norm() < tolerance
    assert torch.equal(window(10_000)[1].gradient, whole)


def test_every_window_has_its_own_shift_and_it_is_the_same_again():
    def drawn():
        trajectory = Trajectory(Instances(Quadratic(), [5, 6]), CoordinatewiseLSTM().config)
        return [float((trajectory.next(20), trajectory.shift)[1]) for _ in range(5)]

    assert len(set(drawn())) == 5
    assert drawn() == drawn()


def test_a_resumed_run_draws_what_the_unbroken_one_does(tmp_path):
    def train(stops, checkpoint=None):
        torch.manual_seed(0)
        for stop in stops:
            network = CoordinatewiseLSTM("both", 4, 1)
            trainer = MetaTrainer(
                network, "digits-mlp", coordinates=64, horizon=30, unroll=10, checkpoint=checkpoint, progress=False,
                validate_every=100, validation_instances=1,
            )  # fmt: skip
            trainer.network.load_flat_weights_(torch.linspace(-0.3, 0.3, network.flat_weights().numel()))
            trainer.fit(stop)
        return trainer.weights.current

    assert torch.equal(train([5]), train([2, 5], tmp_path / "run"))


@pytest.mark.parametrize("options", [{"coordinates": 0}, {"coordinates": 5, "second_derivatives": True}])
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match="coordinates must be"):
        MetaTrainer(CoordinatewiseLSTM(), Quadratic(), progress=False, **options)
