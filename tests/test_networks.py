import pytest
import torch
from torch import nn

from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "log"}, "features must be one of 'identity', 'log_sign', 'moments', 'both', got 'log'"),
        ({"hidden_size": 0}, "hidden_size must be an int from 1 to 64, got 0"),
        ({"hidden_size": 65}, "hidden_size must be an int from 1 to 64, got 65"),
        ({"hidden_size": 20.0}, "hidden_size must be an int from 1 to 64, got 20.0"),
        ({"num_layers": 0}, "num_layers must be an int from 1 to 64, got 0"),
        ({"num_layers": 65}, "num_layers must be an int from 1 to 64, got 65"),
        ({"projection": 1}, "projection must be True or False, got 1"),
        ({"linear_path": 1}, "linear_path must be True or False, got 1"),
        ({"output": "sigmoid"}, "output must be one of 'linear', 'tanh', got 'sigmoid'"),
        ({"output_scale": 0.0}, "output_scale must be a positive number, got 0.0"),
        ({"preprocess_p": -1.0}, "preprocess_p must be a number in (0, 80], got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in [0, 1), got (0.9, 1.0)"),
        ({"eps": 0.0}, "eps must be a positive number, got 0.0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        CoordinatewiseLSTM(**options)
    assert str(error.value) == message


def test_the_papers_network_by_default():
    network = CoordinatewiseLSTM()
    lstm, head = nn.LSTM(2, 20, 2), nn.Linear(20, 1)
    expected = dict(lstm.state_dict()) | {f"head.{name}": value for name, value in head.state_dict().items()}
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert network.init_state(torch.empty(3)).shape == (3, 80)


def test_options_make_the_same_network_again():
    network = CoordinatewiseLSTM(
        "moments", 7, 3, projection=True, linear_path=True, output="tanh", betas=(0.9, 0.99), eps=1e-6
    )
    assert CoordinatewiseLSTM(**network.options).config == network.config


def test_flat_weights_round_trip(network):
    other = CoordinatewiseLSTM(hidden_size=4, num_layers=2)
    other.load_flat_weights_(network.flat_weights())
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("flat", [torch.zeros(3), torch.zeros(1, 293)])
def test_flat_weights_of_another_shape_are_refused_and_nothing_changes(network, flat):
    before = network.flat_weights()
    with pytest.raises(ValueError, match=r"shape of flat must be \(293,\), got"):
        network.load_flat_weights_(flat)
    assert torch.equal(network.flat_weights(), before)


def test_weights_of_torch_func_are_those_that_are_used(network):
    grads, parameters = torch.randn(3, 5), dict(network.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(network, parameters, (grads,))[0].square().sum()

    found = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_parametrized_weights_are_used_but_not_written(network):
    grads, before = torch.randn(3, 5), network.flat_weights()
    expected, _ = network(grads)
    torch.nn.utils.parametrizations.weight_norm(network.head)
    updates, _ = network(grads)
    torch.testing.assert_close(updates, expected)
    updates.sum().backward()
    assert network.head.parametrizations.weight.original0.grad != 0
    with pytest.raises(AttributeError, match="weight"):
        network.load_flat_weights_(torch.zeros_like(before))
    torch.testing.assert_close(network.flat_weights(), before)


def test_a_fresh_network_starts_without_drift(network):
    assert not network.head.bias.any()


@pytest.mark.parametrize(
    ("lstm", "head", "options", "message"),
    [
        (nn.LSTM(2, 4, bidirectional=True), nn.Linear(4, 1), {}, "lstm.bidirectional"),
        (nn.LSTM(2, 4, bias=False), nn.Linear(4, 1), {}, "lstm.bias"),
        (nn.LSTM(2, 4, proj_size=2), nn.Linear(2, 1), {}, "lstm.proj_size"),
        (nn.LSTM(2, 4, 2, dropout=0.5), nn.Linear(4, 1), {}, "lstm.dropout"),
        (nn.LSTM(2, 4), nn.Linear(4, 1, bias=False), {}, "head.bias"),
        (nn.LSTM(2, 4), nn.Linear(4, 2), {}, "shape of head.weight"),
        (nn.LSTM(3, 4), nn.Linear(4, 1), {}, "shape of weight_ih_l0"),
        (nn.LSTM(4, 4), nn.Linear(4, 1), {"projection": True}, "projection must be False"),
        (nn.LSTM(2, 4), nn.Linear(4, 1), {"linear_path": True}, "linear_path must be False"),
    ],
)
def test_from_torch_refuses_what_it_cannot_hold(lstm, head, options, message):
    with pytest.raises(ValueError, match=message):
        CoordinatewiseLSTM.from_torch(lstm, head, **options)


@pytest.mark.parametrize("features", ["moments", "both"])
def test_a_fresh_linear_path_with_moments_steps_as_adam_does(features):
    network = CoordinatewiseLSTM(features, linear_path=True, output_scale=0.03, betas=(0.9, 0.999))
    start, scale = torch.linspace(-1, 1, 50), torch.logspace(-3, 3, 50)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    learned = LSTMOptimizer([ours], network=network, lr=1.0)
    adam = torch.optim.Adam([theirs], lr=0.03, betas=(0.9, 0.999), eps=1e-8)
    for param, optimizer in ((ours, learned), (theirs, adam)):
        for _ in range(20):
            optimizer.zero_grad()
            (scale * param.square()).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", ["identity", "log_sign"])
def test_a_fresh_linear_path_without_moments_adds_nothing(features):
    network = CoordinatewiseLSTM(features, 4, 1, linear_path=True)
    assert network.head.weight.all()
    assert network.linear.weight.shape == (1, 1 if features == "identity" else 2)
    assert not network.linear.weight.any()


def test_a_network_without_a_linear_path_is_known_as_before_there_was_one():
    plain, other = CoordinatewiseLSTM(hidden_size=4), CoordinatewiseLSTM(hidden_size=4, linear_path=True)
    assert plain.rule == (
        "Config(features='log_sign', hidden_size=4, num_layers=2, projection=False, output='linear', "
        "output_scale=0.1, preprocess_p=10.0, beta1=0.95, beta2=0.95, eps=1e-08)"
    )
    assert "linear_path=True" in other.rule
    assert "linear.weight" not in plain.state_dict()


def test_from_torch_keeps_every_digit():
    lstm, head = nn.LSTM(2, 3, 1).double(), nn.Linear(3, 1).double()
    network = CoordinatewiseLSTM.from_torch(lstm, head)
    assert torch.equal(network.weight_ih_l0, lstm.weight_ih_l0)
    assert torch.equal(network.head.weight, head.weight)


def test_forward_carries_state(network):
    grads = torch.randn(6, 5)
    whole, last = network(grads)
    first, middle = network(grads[:4])
    second, end = network(grads[4:], middle, step=5)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end, last)


def test_steps_are_numbered_whatever_the_default_dtype(network):
    expected, _ = network(torch.ones(1, 3))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, _ = network(torch.ones(1, 3, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
