"""What only a GPU can show: graphs, streams, long runs, sizes beyond 32 bits, and the optimizer on CUDA parameters."""

import copy

import pytest
import torch
from problems import PAPER, RNNPROP, make_grads, make_state, make_weights
from torch.testing import assert_close

import l2l_fast as l2l
from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer, ops, reference
from l2l_fast.arguments import codes
from l2l_fast.config import Config, state_size

pytestmark = pytest.mark.cuda

OP = torch.ops.l2l_fast
both_networks = pytest.mark.parametrize("config", [PAPER, RNNPROP], ids=["paper", "rnnprop"])


def group(config, sizes=(1000, 33, 0, 7)):
    """(params, grads, states, weights, lr, steps) on the GPU; all tensors of a group share the step."""
    params = [torch.randn(size, device="cuda") for size in sizes]
    grads = [make_grads(size, seed=size).clamp(-1, 1).cuda() for size in sizes]
    states = [ops.new_state(param, config) for param in params]
    one = torch.ones((), device="cuda")
    return params, grads, states, make_weights(config).cuda(), one.clone(), [one.clone()] * len(sizes)


@both_networks
def test_a_captured_step_is_the_eager_one(config):
    params, grads, states, weights, lr, steps = group(config)
    # In the layout of ops.new_state, which a clone has not: another kernel would step it, with other roundings.
    eager = (
        [t.clone() for t in params],
        [ops.new_state(t, config).copy_(s) for t, s in zip(params, states, strict=True)],
    )
    ops.lstm_step_(params, grads, states, weights, lr, steps, config)  # what is loaded lazily is loaded now
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.lstm_step_(params, grads, states, weights, lr, steps, config)
    for held, fresh in zip(params + states, eager[0] + eager[1], strict=True):
        held.copy_(fresh)
    for number in range(1, 6):  # lr, steps and gradients are read where they are
        steps[0].fill_(number)
        lr.fill_(0.5**number)
        for grad in grads:
            grad.neg_().mul_(0.7)
        graph.replay()
        ops.lstm_step_(eager[0], grads, eager[1], weights, lr, steps, config)
        for held, fresh in zip(params + states, eager[0] + eager[1], strict=True):
            assert torch.equal(held, fresh)


def test_a_captured_truncation_is_the_eager_one():
    grads, state, weights = make_grads(5, 1280).cuda(), make_state(1280, PAPER).cuda(), make_weights(PAPER).cuda()
    step = torch.ones((), device="cuda")

    def run():
        updates, last = OP.lstm_unroll(grads, state, weights, step, *codes(PAPER))
        return (
            updates,
            last,
            *OP.lstm_unroll_backward(updates, last, grads, state, weights, step, *codes(PAPER), True, True, True),
        )

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for scale in (0.5, 3.0):
        grads.mul_(scale)
        weights.mul_(0.9)
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


def test_a_step_neither_waits_nor_allocates():
    arguments = group(PAPER)
    ops.lstm_step_(*arguments, PAPER)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        ops.lstm_step_(*arguments, PAPER)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_step_is_queued_on_the_current_stream():
    params, grads, states, weights, lr, steps = group(PAPER, (100_000,))
    expected = params[0].clone()
    ops.lstm_step_([expected], grads, [s.clone() for s in states], weights, lr, steps, PAPER)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        params[0].add_(1)  # wrong unless the step comes after both
        params[0].sub_(1)
        ops.lstm_step_(params, grads, states, weights, lr, steps, PAPER)
    side.synchronize()
    assert_close(params[0], expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    params, grads, states, weights, lr, steps = ([t.to("cuda:1") for t in part] if isinstance(part, list)
                                                 else part.to("cuda:1") for part in group(PAPER))  # fmt: skip
    ops.lstm_step_(params, grads, states, weights, lr, steps, PAPER)
    assert torch.cuda.current_device() == 0
    assert all(param.isfinite().all() for param in params)


@both_networks
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_steps(config, state_dtype):
    """The state is a fading memory, so errors do not pile up: the run stays with that in float64."""
    curvature, theta64 = torch.logspace(-2, 1, 50).double(), torch.linspace(-1, 1, 50).double()
    theta = theta64.float().cuda()
    state = ops.new_state(theta, config, state_dtype)
    state64, weights = torch.zeros(50, state_size(config)).double(), make_weights(config)
    lr, weights_there = torch.tensor(0.01, device="cuda"), weights.cuda()
    for number in range(1, 1001):
        # Both get the gradient of the float64 run: two chaotic runs would part however small the errors.
        grad, step = (curvature * theta64).float(), torch.tensor(float(number))
        ops.lstm_step_([theta], [grad.cuda()], [state], weights_there, lr, [step.cuda()], config)
        reference.lstm_step_(
            [theta64], [grad.double()], [state64], weights.double(), torch.tensor(0.01).double(), [step], *config,
            0.0, False,
        )  # fmt: skip
    tolerance = 1e-4 if state_dtype is torch.float32 else 2e-2
    assert_close(theta.cpu().double(), theta64, rtol=tolerance, atol=tolerance)
    if state_dtype is torch.float32:
        assert_close(state.cpu().double(), state64, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_many_coordinates_is_the_same_in_every_run(state_dtype):
    """To the last bit: the emulator runs blocks one by one, so a race between them would show itself here alone."""
    torch.manual_seed(0)
    start, grad = torch.randn(4_000_001, device="cuda"), torch.randn(4_000_001, device="cuda")
    weights, one, first = make_weights(PAPER).cuda(), torch.ones((), device="cuda"), None
    for _ in range(5):
        theta, state = start.clone(), ops.new_state(start, PAPER, state_dtype)
        for _ in range(3):
            ops.lstm_step_([theta], [grad], [state], weights, one, [one], PAPER)
        first = first or (theta, state)
        assert torch.equal(theta, first[0])
        assert torch.equal(state, first[1])


@pytest.mark.slow
def test_more_coordinates_than_32_bits_count():
    config, count = Config("identity", 1, 1, False, "linear", 0.1, 10.0, 0.95, 0.95, 1e-8), 2**31 + 100
    if torch.cuda.mem_get_info()[0] < 12 * count:
        pytest.skip("needs 26 GB of GPU memory")
    param = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    grad = torch.ones_like(param)
    state, one = ops.new_state(param, config, torch.bfloat16), torch.ones((), device="cuda")
    weights = make_weights(config).cuda()
    ops.lstm_step_([param], [grad], [state], weights, one, [one], config)
    assert param[0] != 0
    assert (param == param[0]).all()
    assert torch.equal(state[-1], state[0])
    updates, last = ops.lstm_unroll(grad[None, : 2**16].float(), state[: 2**16], weights, config)
    assert updates.isfinite().all()
    assert last.isfinite().all()


def test_errors_name_the_tensor_on_another_device():
    params, grads, states, weights, lr, steps = group(PAPER)
    with pytest.raises(RuntimeError, match="lr must be on the device of the weights, GPU 0"):
        ops.lstm_step_(params, grads, states, weights, lr.cpu(), steps, PAPER)
    with pytest.raises(RuntimeError, match="a step must be on the device"):
        ops.lstm_step_(params, grads, states, weights, lr, [step.cpu() for step in steps], PAPER)


# ---------------------------------------------------------------- the optimizer


def train(optimizer, model, steps=5):
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(8, 6, generator=generator).to(next(model.parameters()).device)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def models():
    """One model on the CPU and its copy on the GPU."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize("features", ["log_sign", "moments"])
def test_the_optimizer_does_on_a_gpu_what_it_does_on_the_cpu(features):
    network = CoordinatewiseLSTM(features, hidden_size=8)
    here, there = models()
    for model in (here, there):
        train(LSTMOptimizer(model.parameters(), network, lr=0.5, weight_decay=0.01), model)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert_close(b.cpu(), a, rtol=1e-3, atol=1e-4)


def test_a_state_dict_goes_to_the_gpu_and_back():
    network = CoordinatewiseLSTM(hidden_size=8)
    here, there = models()
    on_cpu, on_gpu = (LSTMOptimizer(model.parameters(), network) for model in (here, there))
    train(on_cpu, here)
    there.load_state_dict(here.state_dict())
    on_gpu.load_state_dict(on_cpu.state_dict())
    for param in there.parameters():
        assert on_gpu.state[param]["lstm"].device == on_gpu.state[param]["step"].device == param.device
    train(on_gpu, there)
    train(on_cpu, here)
    back, _ = models()
    back.load_state_dict(there.state_dict())
    again = LSTMOptimizer(back.parameters(), network)
    again.load_state_dict(on_gpu.state_dict())
    for a, b in zip(again.state_dict()["state"].values(), on_cpu.state_dict()["state"].values(), strict=True):
        assert_close(a["lstm"], b["lstm"], rtol=1e-3, atol=1e-3)
        assert torch.equal(a["step"], b["step"])


def test_params_on_both_devices_in_one_group():
    network = CoordinatewiseLSTM(hidden_size=8)
    here, there = models()
    optimizer = LSTMOptimizer([*here.parameters(), *there.parameters()], network)
    for model in (here, there):
        model(torch.ones(2, 6, device=next(model.parameters()).device)).sum().backward()
    optimizer.step()
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert_close(b.cpu(), a, rtol=1e-4, atol=1e-6)


def test_a_gpu_network_can_be_trained():
    network = CoordinatewiseLSTM(hidden_size=4).cuda()
    state = l2l.ops.new_state(torch.empty(9, device="cuda"), network.config)
    updates, _ = l2l.ops.lstm_unroll(torch.randn(3, 9, device="cuda"), state, network.flat_weights(), network.config)
    updates.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def scaled_optimizers(devices, max_update_rms=None, **options):
    """The same tensors and gradients on each device, under a network whose update is scaled over each tensor."""
    torch.manual_seed(0)
    network, found = CoordinatewiseLSTM("both", 16, 1, update_rms=0.6, max_update_rms=max_update_rms), []
    starts = [torch.randn(shape) for shape in ((300, 70), (33,), (8, 4, 3, 3), (0, 3), ())]
    grads = [torch.randn_like(start) for start in starts]
    grads[0][5, 7] = float("nan")
    for device in devices:
        params = [torch.nn.Parameter(start.to(device, copy=True)) for start in starts]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(device, copy=True)
        found.append((params, LSTMOptimizer(params, network, weight_decay=0.1, **options)))
    return found


@pytest.mark.parametrize("max_update_rms", [None, 1.5])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_an_update_scaled_over_each_tensor_is_the_cpus(orthogonalize, max_update_rms):
    options = {"lr": 0.1, "orthogonalize": orthogonalize, "max_update_rms": max_update_rms}
    (ours, on_gpu), (theirs, on_cpu) = scaled_optimizers(["cuda", "cpu"], **options)
    starts = [param.detach().clone() for param in theirs]
    for _ in range(3):
        on_gpu.step()
        on_cpu.step()
    # Where matrices are orthogonalized in products of bfloat16, by parts of the whole move.
    share = 0.05 if orthogonalize else 1e-3
    for one, other, start in zip(ours, theirs, starts, strict=True):
        assert (one.detach().cpu() - other.detach()).norm() <= share * (other.detach() - start).norm()
    assert ours[0][5, 7].item() == starts[0][5, 7].item()


@pytest.mark.parametrize("max_update_rms", [None, 1.5])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_a_captured_step_scales_over_each_tensor(orthogonalize, max_update_rms):
    options = {"lr": torch.tensor(0.1, device="cuda"), "orthogonalize": orthogonalize}
    options["max_update_rms"] = max_update_rms
    (ours, captured), (theirs, eager) = scaled_optimizers(["cuda", "cuda"], **options)
    for optimizer in (captured, eager):
        optimizer.step()  # makes the state, and loads what is loaded lazily
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
        eager.step()
        options["lr"].mul_(0.5)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one.detach(), other.detach(), rtol=1e-4, atol=1e-5)
