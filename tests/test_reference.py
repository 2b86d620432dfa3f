"""The reference against things that are not ours: torch.nn.LSTM, formulas written out, plain autograd."""

import itertools
import math

import pytest
import torch
from torch import nn

from l2l_fast import CoordinatewiseLSTM, reference
from l2l_fast.config import FEATURES, OUTPUTS, has_moments, num_weights, split_weights, state_size

OPTIONS = list(itertools.product(FEATURES, (1, 2, 3), (False, True), (False, True), OUTPUTS))


def make(features="log_sign", layers=2, projection=False, output="linear", hidden=5, linear_path=False):
    """A float64 network with weights large enough that every gate matters."""
    options = {"projection": projection, "linear_path": linear_path, "output": output}
    network = CoordinatewiseLSTM(features, hidden, layers, **options).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    return network


def problem(config, steps=4, size=7):
    """Gradients of every magnitude, zeros and one that is not finite; a state that is not zero."""
    scale = torch.logspace(-8, 2, size, dtype=torch.float64)
    grads = torch.randn(steps, size, dtype=torch.float64) * scale
    grads[min(1, steps - 1), 2] = math.inf
    grads[:, 3] = 0.0
    state = 0.1 * torch.rand(size, state_size(config), dtype=torch.float64) + 0.01
    return grads, state


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_recurrence_is_torchs_own_lstm(layers):
    lstm, head = nn.LSTM(1, 6, layers).double(), nn.Linear(6, 1).double()
    network = CoordinatewiseLSTM.from_torch(lstm, head, features="identity", output_scale=0.3)
    grads = torch.randn(8, 11, dtype=torch.float64)
    updates, state = network(grads)
    expected, (h, c) = lstm(grads[:, :, None])
    torch.testing.assert_close(updates, 0.3 * head(expected)[:, :, 0])
    rows = reference.split_state(state.T, network.config)
    torch.testing.assert_close(torch.stack(rows[0::2]), h.transpose(1, 2))
    torch.testing.assert_close(torch.stack(rows[1::2]), c.transpose(1, 2))


def test_log_sign_is_the_papers_preprocessing():
    p = 10.0
    grads = torch.tensor([1.0, -0.5, math.exp(-p), math.exp(-p) * 0.999, -1e-8, 0.0, 1e30, -1e-45], dtype=torch.float64)
    first, second = reference.log_sign(grads, p)
    for grad, a, b in zip(grads.tolist(), first.tolist(), second.tolist(), strict=True):
        if abs(grad) >= math.exp(-p):
            assert (a, b) == pytest.approx((math.log(abs(grad)) / p, math.copysign(1, grad)))
        else:
            assert (a, b) == pytest.approx((-1.0, math.exp(p) * grad))


def test_moment_features_are_bias_corrected_averages():
    network = make("moments", 1, hidden=2)
    config, grads = network.config, torch.randn(6, 3, dtype=torch.float64)
    m = v = torch.zeros(3, dtype=torch.float64)
    for t, grad in enumerate(grads, start=1):
        new_m, new_v, ratios, _ = reference._moments(grad, m, v, torch.tensor(float(t)).double(), config)
        m, v = 0.95 * m + 0.05 * grad, 0.95 * v + 0.05 * grad**2
        root = (v / (1 - 0.95**t)).sqrt() + 1e-8
        torch.testing.assert_close((new_m, new_v), (m, v))
        torch.testing.assert_close(ratios, [m / (1 - 0.95**t) / root, grad / root])


@pytest.mark.parametrize(("features", "layers", "projection", "linear_path", "output"), OPTIONS)
def test_hand_written_backward_is_autograd(features, layers, projection, linear_path, output):
    network = make(features, layers, projection, output, linear_path=linear_path)
    config, weights = network.config, network.flat_weights().detach().requires_grad_()
    grads, state = problem(config)
    grads.requires_grad_()
    state.requires_grad_()
    step = torch.tensor(3.0)
    updates, last = reference.lstm_unroll(grads, state, weights, step, *config)
    d_updates, d_last = torch.randn_like(updates), torch.randn_like(last)
    expected = torch.autograd.grad([updates, last], [grads, state, weights], [d_updates, d_last])
    with torch.no_grad():
        found = reference.lstm_unroll_backward(
            d_updates, d_last, grads, state, weights, step, *config, True, True, True
        )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_linear_path_adds_its_features_to_the_output(projection, output):
    """By hand, from the updates of the same network without it."""
    network = make("both", 1, projection, output, linear_path=True)
    config, grads = network.config, torch.randn(1, 9, dtype=torch.float64)
    state, step = 0.1 + torch.rand(9, state_size(config), dtype=torch.float64), torch.tensor(3.0)
    plain = config._replace(linear_path=False, output="linear")
    alone, last = reference.lstm_unroll(grads, state, network.flat_weights()[:-4], step, *plain)
    *_, ratios, _ = reference._moments(grads[0], state[:, 0], state[:, 1], step.double(), config)
    features = torch.stack(ratios + reference.log_sign(grads[0], config.preprocess_p))
    y = alone / config.output_scale + network.linear.weight @ features
    updates, with_path = reference.lstm_unroll(grads, state, network.flat_weights(), step, *config)
    torch.testing.assert_close(updates, config.output_scale * (y.tanh() if output == "tanh" else y))
    assert torch.equal(last, with_path)


@pytest.mark.parametrize("linear_path", [False, True])
def test_tiles_do_not_show(monkeypatch, linear_path):
    network = make("both", 2, linear_path=linear_path)
    grads, state = problem(network.config, steps=3, size=23)
    args = (grads, state, network.flat_weights().detach(), torch.tensor(1.0), *network.config)
    d_updates = torch.randn_like(grads)
    whole = (
        reference.lstm_unroll_forward(*args),
        reference.lstm_unroll_backward(d_updates, None, *args, True, True, True),
    )
    monkeypatch.setattr(reference, "TILE", 5)
    tiled = (
        reference.lstm_unroll_forward(*args),
        reference.lstm_unroll_backward(d_updates, None, *args, True, True, True),
    )
    torch.testing.assert_close(tiled, whole)


@pytest.mark.parametrize("features", FEATURES)
def test_a_gradient_that_is_not_finite_leaves_the_coordinate_alone(features):
    network = make(features)
    grads, state = problem(network.config, steps=1)
    updates, last = reference.lstm_unroll(grads, state, network.flat_weights(), torch.tensor(1.0), *network.config)
    assert updates[0, 2] == 0
    assert torch.equal(last[2], state[2])
    assert updates.isfinite().all()
    assert last.isfinite().all()


@pytest.mark.parametrize("features", FEATURES)
def test_a_coordinate_without_any_gradient_yet_stays_where_it_is(features):
    """With moments, which show it; its state goes on, and its first gradient moves it."""
    network = make(features)
    config, grads = network.config, torch.zeros(5, 3, dtype=torch.float64)
    grads[2, 1] = 1e-9
    updates, state = network(grads)
    assert updates[2:, 1].all()
    still = torch.ones_like(updates, dtype=torch.bool)
    still[2:, 1] = False
    moments = has_moments(config)
    assert updates[still].eq(0).all() if moments else updates[still].all()
    assert state[0, 2 * moments :].all()
    args = (grads, torch.zeros_like(state), network.flat_weights().detach(), torch.ones(()), *config, True, True, True)
    d_grads, _, d_weights = reference.lstm_unroll_backward(torch.ones_like(grads), None, *args)
    alone = reference.lstm_unroll_backward(torch.where(still, 0.0, 1.0).double(), None, *args)[2]
    assert torch.allclose(d_weights, alone) == moments
    assert d_grads[:, 0].eq(0).all() == moments


def test_weights_split_into_torchs_names_and_shapes():
    network = make("moments", 2, projection=True, linear_path=True)
    named = split_weights(network.flat_weights(), network.config)
    assert num_weights(network.config) == sum(parameter.numel() for parameter in network.parameters())
    assert list(named)[-3:] == ["head.weight", "head.bias", "linear.weight"]
    assert set(named) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        assert torch.equal(named[name], parameter)
