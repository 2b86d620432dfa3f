"""Parameters of a network that are frozen stay to the last bit, whatever trains the others."""

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.meta import MetaTrainer, Staged
from l2l_fast.meta.estimators import TruncatedBackpropagation
from l2l_fast.meta.soap import Soap
from l2l_fast.meta.unroll import Rule
from l2l_fast.meta.update import MetaUpdate

WAYS = {
    "adam": {},
    "soap": {"meta_optimizer": "soap"},
    "decay": {"meta_optimizer": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)},
    "average": {"average": 0.9},
    "second derivatives": {"second_derivatives": True},
    "imitation": {"imitation": 1.0},
    "sampled, clipped, parallel": {"coordinates": 5, "clip_windows": 0.1, "parallel": 2, "clip": None},
    "stages": {"horizon": Staged((5, 10), patience=1)},
}
PARTS = {"all but the head": lambda name: not name.startswith("head"), "one tensor": lambda name: name == "bias_hh_l0"}


def make_network(is_frozen, hidden=4):
    torch.manual_seed(0)
    network = l2l.CoordinatewiseLSTM("moments", hidden, 1, output="tanh")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not is_frozen(name))
    return network


def make_trainer(network, **options):
    defaults = {"instances": 2, "unroll": 5, "horizon": 10, "validate_every": 2, "validation_instances": 1}
    return MetaTrainer(network, "quadratic", progress=False, **defaults | options)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", WAYS)
def test_frozen_parameters_stay(tmp_path, way, part):
    network, is_frozen = make_network(PARTS[part]), PARTS[part]
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    def check(step):
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, before[name]) == is_frozen(name), name

    options = WAYS[way] | {"checkpoint": tmp_path}
    trainer = make_trainer(network, **options)
    trainer.fit(5, on_step=check)
    # The best weights, those of a resumed run, and the averaged ones.
    assert all(torch.equal(network.get_parameter(name), before[name]) for name in before if is_frozen(name))
    make_trainer(network, **options).fit(8, on_step=check)
    flat = torch.cat([torch.full((value.numel(),), is_frozen(name)) for name, value in before.items()])
    start = torch.cat([value.view(-1) for value in before.values()])
    assert torch.equal(trainer.weights.averaged[flat], start[flat])


def test_the_norm_that_is_clipped_is_that_of_what_trains():
    network = make_network(PARTS["all but the head"])
    trainer = make_trainer(network, clip=0.01, meta_optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    before = network.flat_weights().detach()
    stream = trainer.streams.start(0.0)
    gradient = TruncatedBackpropagation(Rule(network.config, before)).prepare(stream.trajectory, 5)().gradient
    head = gradient[-5:]
    assert gradient.norm() > 1.1 * head.norm() > 0.011
    trainer = make_trainer(network, clip=0.01, meta_optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    trainer.step()
    moved = before - network.flat_weights().detach()
    torch.testing.assert_close(moved[-5:], 0.01 * head / head.norm())
    assert not moved[:-5].any()


def test_a_frozen_part_of_a_gradient_that_is_not_finite_is_no_part_of_it():
    network = make_network(lambda name: name == "head.bias")
    update = MetaUpdate(network, torch.optim.Adam, 1.0, 1)
    gradient = torch.ones_like(update.weights)
    gradient[-1] = torch.nan
    update.add(gradient)
    update.measure()
    assert update.results.isfinite().all()
    assert update.gradient[-1] == 0
    gradient[0] = torch.nan
    update.add(gradient)
    update.measure()
    assert not update.results.isfinite().all()


def test_soap_leaves_what_has_no_gradient():
    still, moving = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Soap([still, moving], lr=0.1, every=2)
    for step in range(6):
        moving.grad = torch.tensor([1.0, 2.0 + step])
        optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert (moving < 0.9).all()


# ---------------------------------------------------------------- refused by name


def test_a_network_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"network must be one with something to train, got .* all are frozen"):
        make_trainer(make_network(lambda name: True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda network: network.head.requires_grad_(False), "network's head.weight was frozen or thawed after its"),
        (lambda network: network.bias_hh_l0.requires_grad_(True), "network's bias_hh_l0 was frozen or thawed after"),
        (lambda network: setattr(network, "head", torch.nn.Linear(4, 1)), "network's head.weight was replaced after"),
        (lambda network: network.double(), r"network's weight_ih_l0 is torch.float64 on cpu by now after"),
        (
            lambda network: network.head.weight.register_hook(lambda grad: 0 * grad),
            "network's head.weight has a gradient hook, which",
        ),
        (
            lambda network: network.head.bias.register_post_accumulate_grad_hook(lambda parameter: None),
            "network's head.bias has a gradient hook, which",
        ),
    ],
)
def test_a_network_that_was_changed_is_refused(change, message):
    network = make_network(PARTS["one tensor"])
    trainer = make_trainer(network)
    change(network)
    with pytest.raises(ValueError, match=message):
        trainer.fit(3)
    assert trainer.meta_step == 0


def test_parametrized_weights_are_refused():
    network = make_network(lambda name: False)
    torch.nn.utils.parametrizations.weight_norm(network.head)
    with pytest.raises(ValueError, match=r"network's head.weight is computed, not a parameter: remove its param"):
        make_trainer(network)


def test_a_schedule_needs_a_rate():
    class Plain(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self):
            for param in self.param_groups[0]["params"]:
                param.sub_(0.01 * param.grad)

    assert len(make_trainer(make_network(PARTS["one tensor"]), meta_optimizer=Plain).fit(2).meta_losses) == 2
    with pytest.raises(ValueError, match='schedule must be "constant", without warmup, for a meta_optimizer whose'):
        make_trainer(make_network(PARTS["one tensor"]), meta_optimizer=Plain, schedule="cosine")
