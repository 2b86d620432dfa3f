"""Recipes from Python: what is trained, what is kept, what is left alone."""

import json

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.tasks import Quadratic

OPTIONS = {"unroll": 3, "horizon": "4:6", "validation_instances": 1}
RECIPE = {"tasks": [Quadratic(2)], "network": {"hidden_size": 2, "num_layers": 1}, "training": OPTIONS, "meta_steps": 2}
TWO = RECIPE | {"then": [{"training": {"meta_lr": 0.01}, "meta_steps": 3}]}


def train(recipe=TWO, folder=None, **options):
    return l2l.train(recipe, folder, progress=False, **options)


def test_a_stage_after_the_other_is_the_recipe():
    seen, counted = [], []
    done = train(on_stage=seen.append, on_step=lambda *numbers: counted.append(numbers))
    assert [(stage.number, stage.stages, stage.finished, stage.folder) for stage in seen] == [
        (1, 2, True, None), (2, 2, True, None),
    ]  # fmt: skip
    assert counted == [(step, 5) for step in range(1, 6)]
    first = train(RECIPE)
    second = train(RECIPE | TWO["then"][0] | {"training": OPTIONS | {"meta_lr": 0.01}}, network=first.network)
    assert done.history == second.history
    assert torch.equal(done.network.flat_weights(), second.network.flat_weights())


def test_what_was_stopped_goes_on_and_what_is_done_stays(tmp_path):
    unbroken, stopped = train(), []

    def stop(done, total):
        if done == 4 and not stopped:
            stopped.append(done)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(folder=tmp_path, on_step=stop, checkpoint_every=1)
    assert l2l.CoordinatewiseLSTM.from_pretrained(tmp_path / "stage-1" / "network")
    for _ in range(2):
        done = train(folder=tmp_path, checkpoint_every=1)
        assert done.history == unbroken.history
        assert json.loads((tmp_path / "history.json").read_text())["meta_losses"] == done.history.meta_losses
    kept = l2l.CoordinatewiseLSTM.from_pretrained(tmp_path / "network")
    assert torch.equal(kept.flat_weights(), unbroken.network.flat_weights())


def test_options_of_ones_own_are_in_every_stage():
    stages = []
    train(objective="log", meta_steps=1, on_stage=stages.append)
    assert [stage.trainer.options.objective for stage in stages] == ["log", "log"]
    assert [len(stage.history.meta_losses) for stage in stages] == [1, 1]


def test_time_that_is_over_ends_a_training_early():
    done = train(RECIPE | {"meta_steps": 10**6}, max_seconds=0.0)
    assert not done.finished
    assert 1 <= done.trainer.meta_step < 10**6


def test_the_callers_random_numbers_stay():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(RECIPE)
    assert torch.equal(torch.rand(2), expected)


def test_a_recipe_may_be_like_another(tmp_path):
    tasks = [{"name": "quadratic", "dimension": 2}]
    (tmp_path / "base.json").write_text(json.dumps(RECIPE | {"tasks": tasks}))
    one = train({"like": str(tmp_path / "base.json"), "training": {"meta_lr": 0.1}})
    two = train(RECIPE | {"tasks": tasks, "training": OPTIONS | {"meta_lr": 0.1}})
    assert one.history == two.history


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"tasks": []}, "the recipe must have network, training, meta_steps"),
        (RECIPE | {"tasks": ["quadratic"]}, '"tasks" of a recipe must be'),
        (RECIPE | {"training": {"horizon": "ten"}}, "horizon 'ten': give 100, 50:300 or 100,200,500"),
        (RECIPE | {"meta_steps": 0}, '"meta_steps" of a recipe must be a whole number'),
    ],
)
def test_nonsense_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        train(recipe)
