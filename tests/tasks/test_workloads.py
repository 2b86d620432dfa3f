"""The workloads: what they learn on, what they are judged on, and modules that a loop can train."""

import pytest
import torch

from l2l_fast import tasks
from l2l_fast.tasks import SMALL, small, workloads
from l2l_fast.tasks.workloads import WORKLOADS

SMALL_NAMES = [name for name in SMALL if not name.startswith("mnist")]
OF_IMAGES = ("vision-transformer", "cnn-batchnorm", "autoencoder", "wide-mlp", "deep-mlp")


def make(name):
    return tasks.get(name, **{"data": "digits"} if name in OF_IMAGES else {})


@pytest.mark.parametrize("name", [*WORKLOADS, *SMALL_NAMES])
def test_a_module_learns_in_a_loop_of_its_own(name):
    task, generator = make(name), torch.Generator().manual_seed(1)
    module = task.module(generator)
    optimizer, losses = torch.optim.AdamW(module.parameters(), 1e-2), []
    for _ in range(30):
        rows = task.sample(generator)
        inputs, *targets = (tensor[rows] for tensor in task.data)
        loss = task.loss_fn(module(inputs), *targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("name", [*WORKLOADS, *SMALL_NAMES])
def test_a_module_is_the_start_of_its_seed(name):
    task = make(name)
    params = task.init(torch.Generator().manual_seed(2))
    module = task.module(torch.Generator().manual_seed(2))
    for key, param in module.named_parameters():
        assert torch.equal(params[key], param), key


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_is_held_out_is_of_the_same_kind_and_another(name):
    task = make(name)
    held_out = task.with_half("meta-test")
    assert len(task.data[0]) > 2 * len(held_out.data[0]) > 100
    if name.endswith("lm"):  # the last windows to learn on end before the first that are held out begin
        (train, _), (others, _), _ = workloads.text()
        assert train.shape[1] == others.shape[1] == workloads.LENGTH
        assert len(set(map(tuple, train.tolist())) & set(map(tuple, others.tolist()))) < 0.01 * len(others)
    else:
        rows = set(map(tuple, task.data[0].flatten(1).tolist()))
        assert not rows & set(map(tuple, held_out.data[0].flatten(1).tolist()))


def test_targets_of_text_are_the_next_characters():
    (inputs, targets), _, characters = workloads.text()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert 50 < characters < 200
    assert int(inputs.max()) < characters


def test_the_transformer_does_not_see_what_comes():
    module = make("transformer-lm").module(torch.Generator().manual_seed(0))
    ids = workloads.text()[0][0][:2].clone()
    before = module(ids)
    ids[:, 30] = (ids[:, 30] + 1) % 50
    after = module(ids)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


def test_friedmans_function_has_the_noise_that_it_says():
    (x, y), (others, _) = workloads.friedman()
    assert (len(x), len(others)) == (10_000, 2_500)
    clean = 10 * (torch.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5).square() + 10 * x[:, 3] + 5 * x[:, 4]
    slope = ((clean - clean.mean()) * y[:, 0]).mean() / clean.var()
    rest = y[:, 0] / slope - clean
    assert rest.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_other_data_are_refused(name):
    with pytest.raises(ValueError, match="data must be 'mnist' or 'digits', got 'cifar'"):
        tasks.get(name, data="cifar")


def test_small_tasks_and_workloads_share_no_images_and_no_text():
    """What a rule is meta-trained on says nothing of what it is judged on."""
    of_one, of_other = (
        {tuple(row) for part in workloads.pooled("digits", 1, half)[:2] for row in part[0].flatten(1).round().tolist()}
        for half in ("meta-train", "meta-test")
    )
    assert len(of_one & of_other) < 0.02 * len(of_one)  # rounded, since each half has its own mean
    ids, characters = small.source()
    assert 50 < characters < 120
    assert len(ids) > 200_000


def test_a_teacher_is_noisy_as_asked_and_has_variance_one():
    x, y = small.teacher(6, 2, 4000, 0.0, 3)
    _, noisy = small.teacher(6, 2, 4000, 1.0, 3)
    assert x.shape == (4000, 6)
    assert y.std(0) == pytest.approx(torch.ones(2).numpy(), rel=1e-3)
    assert torch.corrcoef(torch.stack([y[:, 0], noisy[:, 0]]))[0, 1] == pytest.approx(0.5**0.5, abs=0.05)


@pytest.mark.parametrize("name", ["digits-small-mlp", "small-regression", "small-text-mlp"])
def test_an_activation_that_there_is_not(name):
    with pytest.raises(ValueError, match=r"activation must be one of .*relu"):
        tasks.get(name, activation="swish")
