"""A checkpoint knows its tasks: it goes on with the same, and refuses each other one in a line."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l2l_fast as l2l
from l2l_fast.data import Dataset
from l2l_fast.meta import MetaTrainer
from l2l_fast.meta.identity import LONGEST, describe, differences
from l2l_fast.tasks import Classifier, ModuleTask, Quadratic

X = torch.linspace(-1, 1, 2000).unsqueeze(1)
Y = X**3
MIDDLE = Y.clone()
MIDDLE[5:-5] += 1  # the rows that a tensor's repr leaves out


def make(width=8, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(1, width), activation(), nn.Linear(width, 1))


def module(make_module=make, data=(X, Y), loss_fn=F.mse_loss, **options):
    return ModuleTask(make_module, data, loss_fn, **options)


def classifier(seed, half="meta-train"):
    generator = torch.Generator().manual_seed(seed)
    return Classifier(Dataset("mine", torch.rand(40, 5, generator=generator), torch.arange(40) % 3, 3), (4,), half=half)


def lambda_of(loss_fn):
    return lambda out, y: loss_fn(out, y)


class Scaled(Quadratic):
    def loss(self, params, batch):
        return 2 * super().loss(params, batch)


class Small(Quadratic):
    pass


def fit(folder, tasks, steps):
    torch.manual_seed(0)
    network = l2l.CoordinatewiseLSTM("identity", 4, 1)
    options = {"unroll": 5, "horizon": 12, "validation_instances": 1, "progress": False}
    return MetaTrainer(network, tasks, checkpoint=folder, **options).fit(steps)


CHANGES = {
    "loss": (module, lambda: module(loss_fn=F.l1_loss), r"tasks\[0\].loss_fn='mse_loss' \(now 'l1_loss'\)"),
    "rows": (module, lambda: module(data=(X, MIDDLE)), r"tasks\[0\].data='\(float32 \[2000, 1\] #\w{12}, float32"),
    "width": (module, lambda: module(functools.partial(make, 9)), r"tasks\[0\].parameters='{0.weight: \[8, 1\]"),
    "activation": (
        lambda: module(lambda: make(8)), lambda: module(lambda: make(8, nn.ReLU)), r"tasks\[0\].first_loss=0\.\d+ \(now"
    ),
    "lambda": (
        lambda: module(loss_fn=lambda_of(F.mse_loss)), lambda: module(loss_fn=lambda_of(F.l1_loss)),
        r"tasks\[0\].first_loss=0\.\d+ \(now 0\.\d+\): use",
    ),
    "batch size": (module, lambda: module(batch_size=16), r"tasks\[0\].batch_size=128 \(now 16\)"),
    "data set": (lambda: classifier(0), lambda: classifier(1), r"tasks\[0\].dataset=.{name: 'mine', inputs: float32"),
    "half": (lambda: classifier(0), lambda: classifier(0, "meta-test"), r"tasks\[0\].half='meta-train'"),
    "option": (Quadratic, lambda: Quadratic(start_scale=2.0), r"tasks\[0\].start_scale=1.0 \(now 2.0\)"),
    "class": (Small, Scaled, r"tasks\[0\].class='Small' \(now 'Scaled'\)"),
    "one more": (Quadratic, lambda: [Quadratic(), Quadratic()], r"with tasks\[1\]=None \(now 'quadratic'\): use"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_another_task_is_refused_and_the_same_goes_on(tmp_path, change):
    before, after, message = CHANGES[change]
    fit(tmp_path, before(), 2)
    saved = (tmp_path / "trainer.pt").read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        fit(tmp_path, after(), 4)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert "tensor(" not in str(caught.value)
    assert (tmp_path / "trainer.pt").read_bytes() == saved
    assert len(fit(tmp_path, before(), 4).meta_losses) == 4


def test_many_differences_are_counted(tmp_path):
    fit(tmp_path, module(), 2)
    with pytest.raises(ValueError, match=r"tasks\[0\].name='module' \(now 'mine-.*\), .* and \d+ more: use the same"):
        fit(tmp_path, classifier(0), 2)


def test_where_the_data_are_does_not_matter(tmp_path):
    one, other = (Classifier("digits", folder=folder) for folder in (None, tmp_path))
    assert describe(one) == describe(other)


def test_a_loss_may_differ_in_its_last_digits_and_not_be_finite():
    facts = describe(Quadratic())
    assert differences(facts, facts | {"first_loss": facts["first_loss"] * (1 + 1e-5)}) == []
    assert differences(facts, facts | {"first_loss": facts["first_loss"] * 1.01})
    never = describe(ModuleTask(make, (X, Y), lambda out, y: (out - y).sum() * float("nan")))
    assert never["first_loss"] is None
    assert differences(never, dict(never)) == []
    assert differences(facts, facts | {"first_loss": None})


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3.0), torch.zeros(0, 2), torch.zeros(2, dtype=torch.complex64), torch.ones(3, dtype=torch.bfloat16),
     torch.eye(3).to_sparse(), torch.arange(6).view(2, 3).T, torch.tensor([True]), torch.zeros(2).requires_grad_()],
)  # fmt: skip
def test_every_tensor_has_a_hash(tensor):
    task = Quadratic()
    task.constants = {"a": [tensor]}
    other = Quadratic()
    other.constants = {"a": [tensor.detach().clone()]}
    assert describe(task) == describe(other)
    other.constants["a"][0] = torch.full((2, 2), 7.0)
    assert [fact.split("=")[0] for fact in differences(describe(task), describe(other))] == ["constants"]


def test_facts_are_short():
    task = Quadratic()
    task.table = list(range(10**4))
    assert len(describe(task)["table"]) <= LONGEST
    same = Quadratic()
    same.table = [*range(10**4 - 1), 0]
    assert differences(describe(task), describe(same))
