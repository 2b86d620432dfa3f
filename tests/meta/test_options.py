"""The options of the meta-trainer: said in one place, seen in all."""

import dataclasses
import inspect

import numpy as np
import pytest

import l2l_fast as l2l
from l2l_fast.meta import MetaTrainer
from l2l_fast.meta.options import TrainerOptions

FIELDS = dataclasses.fields(TrainerOptions)


def test_the_trainers_signature_and_docstring_have_every_option():
    parameters = inspect.signature(MetaTrainer).parameters
    assert list(parameters) == ["network", "tasks", *(field.name for field in FIELDS)]
    for field in FIELDS:
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[field.name].default == field.default
        assert f"\n        {field.name}: " in MetaTrainer.__doc__
    assert "{" not in MetaTrainer.__doc__.partition("Attributes:")[0].replace("sum_{t", "")
    assert max(map(len, MetaTrainer.__doc__.splitlines())) <= 124
    assert "every option but ``checkpoint``, ``checkpoint_every``, ``log_dir``" in " ".join(MetaTrainer.__doc__.split())


def test_options_are_checked_and_kept_as_plain_values():
    options = TrainerOptions(meta_lr=np.float32(0.5), imitation=1, loss_weights=(1, 2), unroll=2, horizon=7)
    assert (type(options.meta_lr), options.imitation, options.loss_weights) == (float, (1.0, 1.0), [1.0, 2.0])
    assert (options.horizon.steps, options.graphs, options.device.type) == (7, False, "cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.unroll = 5


@pytest.mark.parametrize("name", ["second_derivatives", "progress"])
def test_a_flag_is_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'yes'"):
        TrainerOptions(**{name: "yes"})


def test_all_that_decides_numbers_is_compared_but_what_says_how_a_run_is_kept():
    free = {field.name for field in FIELDS} - set(TrainerOptions().deciding())
    assert free == {"checkpoint", "checkpoint_every", "log_dir", "device", "graphs", "progress"}


def test_an_option_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(TypeError, match=r"MetaTrainer\(\) has no option 'meta_rl': did you mean 'meta_lr'\?"):
        MetaTrainer(l2l.CoordinatewiseLSTM(), "quadratic", meta_rl=0.1)
