"""The networks that come with the package: whole, documented, trainable again, and as good as they are said to be."""

import json

import pytest
import torch

import l2l_fast as l2l
from l2l_fast import checkpoint
from l2l_fast.evaluate import compare
from l2l_fast.meta import recipes
from l2l_fast.meta.recipes import prepare, stages
from l2l_fast.optim import LSTMOptimizer

NAMES = ["l2l-base-v1", "l2l-paper", "l2l-quadratic", "l2l-small"]  # by a recipe; l2l-base is the first, otherwise used


def test_all_are_there():
    assert checkpoint.shipped() == ["l2l-base", *NAMES]
    assert not set(NAMES) - set(recipes.names())
    assert "l2l-base" not in recipes.names()


def test_the_default_is_the_first_network_with_its_update_scaled():
    new, old = (l2l.CoordinatewiseLSTM.from_pretrained(name) for name in ("l2l-base", "l2l-base-v1"))
    assert new.options == old.options | {"update_rms": 0.2, "max_update_rms": 1.0, "orthogonalize": True}
    assert torch.equal(new.flat_weights(), old.flat_weights())
    assert (old.default_lr, new.default_lr) == (1.0, 1e-3)
    card = (checkpoint.WEIGHTS / "l2l-base" / "README.md").read_text()
    for word in (
        "update_rms",
        "max_update_rms",
        "orthogonalize",
        "reproduce workloads",
        "## Figures",
        "## Limits",
        "Apache-2.0",
        "l2l-base-v1",
    ):
        assert word in card, word


def test_the_first_network_is_a_file_of_the_first_format():
    """Which had no update_rms: its options are those of then, and load as they did."""
    config = json.loads((checkpoint.WEIGHTS / "l2l-base-v1" / "config.json").read_text())
    assert config["format_version"] == 1
    assert "update_rms" not in config["options"]


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_card_and_the_recipe_that_trains_it(name):
    folder = checkpoint.WEIGHTS / name
    card = (folder / "README.md").read_text()
    for word in (f"l2l-fast meta-train --recipe {name}", "## Figures", "## Limits", "Apache-2.0"):
        assert word in card, word
    network = l2l.CoordinatewiseLSTM.from_pretrained(name)
    for stage in stages(recipes.read(name)):
        fresh, tasks, training = prepare(stage, "mnist", seed=0)
        assert network.options == fresh.options
        assert not torch.equal(network.flat_weights(), fresh.flat_weights())
        l2l.MetaTrainer(fresh, tasks, progress=False, **training)  # every option is one of the trainer's


def test_no_relu_in_meta_training():
    for name in NAMES:
        for task in (task for stage in stages(recipes.read(name)) for task in stage["tasks"]):
            assert "relu" not in task["name"]
            assert task.get("activation") != "relu"


@pytest.mark.parametrize("options", [{"lr": 0.03}, {"lr": 0.03, "orthogonalize": True}, {"network": "l2l-base-v1"}])
def test_the_default_networks_train_a_network(options):
    torch.manual_seed(0)
    inputs = torch.randn(256, 10)
    targets = (inputs[:, 0] * inputs[:, 1] > 0).long()
    model = torch.nn.Sequential(torch.nn.Linear(10, 30), torch.nn.ReLU(), torch.nn.Linear(30, 2))
    optimizer, losses = LSTMOptimizer(model.parameters(), **options), []
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(("name", "weight_decay", "furthest"), [
    ("l2l-base-v1", 0, 2.8), ("l2l-small", 0, 2.8), ("l2l-paper", 0, 1.8), ("l2l-quadratic", 0, 1.5),
    ("l2l-base-v1", 0.01, 0.7), ("l2l-small", 0.01, 0.7), ("l2l-paper", 0.01, 0.7), ("l2l-quadratic", 0.01, 0.7),
])  # fmt: skip
def test_how_far_parameters_go_without_a_gradient(name, weight_decay, furthest):
    """One that never had any, and two that had one in the first step; what the README and the cards say."""
    theta = torch.nn.Parameter(torch.zeros(3))
    optimizer, path = LSTMOptimizer([theta], name, weight_decay=weight_decay), []
    for step in range(3000):
        theta.grad = torch.tensor([0.0, 0.01, -0.01]) * (step == 0)
        optimizer.step()
        path.append(theta.detach().clone())
    path = torch.stack(path)
    assert path.abs().max() < furthest
    if weight_decay:
        return
    assert path.abs().max() > 0.9 * furthest
    with_moments = name in ("l2l-base-v1", "l2l-small")
    assert path[:, 0].eq(0).all() == with_moments
    assert path[2000:].diff(dim=0).eq(0).all() == with_moments


@pytest.mark.parametrize("name", ["l2l-base-v1", "l2l-small"])
def test_digits_are_learned_faster_than_by_tuned_baselines(name):
    found = compare("digits-mlp", name, horizon=100, seeds=4, tuning_seeds=4, baselines=["adam", "nesterov"])
    assert found.ratio_mean < 0.9


def test_quadratics_are_solved_faster_than_by_tuned_baselines():
    found = compare("quadratic", "l2l-quadratic", horizon=100, seeds=20, baselines=["adam", "nesterov"])
    assert found.ratio_mean < 0.75
