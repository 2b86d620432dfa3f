"""What training loops do around an optimizer with torch alone."""

import pytest
import torch
from same import copied, same
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import l2l_fast as l2l


class Small(nn.Module):
    """A vector, matrices and an embedding whose weight is the output layer's as well."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.norm(F.gelu(self.hidden(self.embedding(ids)))))


def make_small():
    torch.manual_seed(0)
    return Small()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(12, (16,), generator=generator) for _ in range(count)]


def loss_of(model, ids):
    return F.cross_entropy(model(ids).float(), (ids + 1) % 12)


def warmup_and_cosine(optimizer):
    parts = [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, 6)]
    return SequentialLR(optimizer, parts, milestones=[2])


def everything(model, optimizer):
    return copied({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


# ---------------------------------------------------------------- accumulation


def test_accumulated_gradients_are_one_gradient(make_optimizer):
    """Four backwards and a step do what a step on their sum does."""
    model, twin = make_small(), make_small()
    optimizer, other = make_optimizer(model.parameters()), make_optimizer(twin.parameters())
    for step in range(3):
        parts = batches(12)[4 * step : 4 * step + 4]
        for part in parts:
            (loss_of(model, part) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        sums = [torch.zeros_like(param) for param in twin.parameters()]
        for part in parts:
            for total, grad in zip(
                sums, torch.autograd.grad(loss_of(twin, part) / 4, list(twin.parameters())), strict=True
            ):
                total += grad
        for param, total in zip(twin.parameters(), sums, strict=True):
            param.grad = total
        other.step()
    assert same(everything(model, optimizer), everything(twin, other))


def test_accumulation_is_a_large_batch_but_for_rounding(make_optimizer, record_property):
    """The sum of four means is not rounded as one mean is, so no optimizer gives the same bits here, AdamW included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer, other = make_optimizer(model.parameters()), make_optimizer(twin.parameters())
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    for _ in range(20):
        x = torch.randn(64, 10)
        y = x.sum(1, keepdim=True).sin()
        for part in range(4):
            rows = slice(16 * part, 16 * part + 16)
            (F.mse_loss(model(x[rows]), y[rows]) / 4).backward()
        F.mse_loss(twin(x), y).backward()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    difference = after - nn.utils.parameters_to_vector(twin.parameters()).detach()
    relative = (difference.norm() / (after - before).norm()).item()
    record_property("difference", relative)
    print(f"difference over 20 steps, of the way moved: {relative:.2g}")
    assert relative < 1e-3


# ---------------------------------------------------------------- mixed precision


def scaled_step(model, optimizer, scaler, ids, dtype=torch.float16):
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(model, ids)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def set_scale(scaler, scale):
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale})


@pytest.mark.parametrize("skipped", [0, 2])
def test_a_skipped_step_leaves_parameters_and_state_as_they_were(make_optimizer, skipped):
    """A loss scale too large for float16 overflows; the step is skipped, and the run is the one without that batch."""
    model, twin = make_small(), make_small()
    optimizer, other = make_optimizer(model.parameters()), make_optimizer(twin.parameters())
    scaler, calm = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    for number, ids in enumerate(batches(5)):
        if number == skipped:
            set_scale(scaler, 2.0**40)
            before = copied([optimizer.state_dict(), list(model.parameters())])
            scaled_step(model, optimizer, scaler, ids)
            assert same([optimizer.state_dict(), list(model.parameters())], before)
            assert len(optimizer.state) == (5 if skipped else 0)
            assert scaler.get_scale() == 2.0**39
            set_scale(scaler, 2.0**10)
        else:
            loss = scaled_step(model, optimizer, scaler, ids)
            assert torch.equal(loss, scaled_step(twin, other, calm, ids))
    assert same(list(model.parameters()), list(twin.parameters()))
    assert same(optimizer.state_dict(), other.state_dict())


def test_a_scaled_run_goes_on_from_its_checkpoint(make_optimizer, tmp_path):
    model = make_small()
    optimizer, scaler = make_optimizer(model.parameters()), torch.amp.GradScaler("cpu", growth_interval=2)
    losses = []
    for number, ids in enumerate(batches(6)):
        losses.append(scaled_step(model, optimizer, scaler, ids))
        if number == 2:
            parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
            torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "run.pt")
    twin = make_small()
    other, calm = make_optimizer(twin.parameters()), torch.amp.GradScaler("cpu", growth_interval=2)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    for name, part in {"model": twin, "optimizer": other, "scaler": calm}.items():
        part.load_state_dict(saved[name])
    assert same([scaled_step(twin, other, calm, ids) for ids in batches(6)[3:]], losses[3:])
    assert same(everything(twin, other), everything(model, optimizer))


def test_autocast_leaves_the_optimizer_in_its_own_precision(make_optimizer):
    """Steps inside and outside of autocast are the same, and parameters stay float32."""
    runs = []
    for inside in (False, True):
        model = make_small()
        optimizer = make_optimizer(model.parameters())
        for ids in batches(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, ids)
                if inside:
                    loss.backward()
                    optimizer.step()
            if not inside:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
        assert all(param.dtype == torch.float32 for param in model.parameters())
        runs.append(everything(model, optimizer))
    assert same(*runs)


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize("network", ["l2l-base", "l2l-base-v1"])
def test_a_compiled_step_with_a_schedule_is_not_compiled_again(network):
    """One graph, and one more when the rate first changes; then none, whatever the schedule does."""
    model, twin = make_small(), make_small()
    optimizer, other = (
        l2l.LSTMOptimizer(each.parameters(), network, lr=0.01, weight_decay=0.1) for each in (model, twin)
    )
    torch._dynamo.reset()
    counters, graphs = torch._dynamo.utils.counters["stats"], []
    before = counters["unique_graphs"]
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    optimizer._opt_called = True  # schedulers would warn, not seeing the compiled one
    schedules = warmup_and_cosine(optimizer), warmup_and_cosine(other)
    for ids in batches(8):
        for each in (model, twin):
            each.zero_grad()
            loss_of(each, ids).backward()
        step()
        other.step()
        for schedule in schedules:
            schedule.step()
        graphs.append(counters["unique_graphs"] - before)
    assert graphs[1] <= 2
    assert graphs[-1] == graphs[1]
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


# ---------------------------------------------------------------- averages


AVERAGES = {
    "SWA": {},
    "EMA": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.75)},
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_weights_go_on_from_a_checkpoint(make_optimizer, kind, tmp_path):
    def start():
        model = make_small()
        optimizer = make_optimizer(model.parameters())
        averaged = swa_utils.AveragedModel(model, **AVERAGES[kind])
        return model, optimizer, swa_utils.SWALR(optimizer, swa_lr=1e-3, anneal_epochs=4), averaged

    def train(parts, found):
        model, optimizer, schedule, averaged = parts
        for ids in found:
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            averaged.update_parameters(model)
            path.append(model.hidden.weight.detach().clone())

    path, parts = [], start()
    train(parts, batches(6)[:3])
    torch.save([part.state_dict() for part in parts], tmp_path / "run.pt")
    train(parts, batches(6)[3:])
    expected = path[0]
    for number, weight in enumerate(path[1:6], 2):
        expected = expected + (weight - expected) * (1 / number if kind == "SWA" else 0.25)
    torch.testing.assert_close(parts[3].module.hidden.weight.detach(), expected)
    again = start()
    for part, saved in zip(again, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(saved)
    train(again, batches(6)[3:])
    assert same([part.state_dict() for part in again], [part.state_dict() for part in parts])
    swa_utils.update_bn([(ids,) for ids in batches(2)], parts[3])
    assert loss_of(parts[3].eval(), batches(1)[0]).isfinite()


# ---------------------------------------------------------------- steps in backward


def test_stepping_in_backward_is_stepping_afterwards(make_optimizer):
    """One optimizer a parameter, with its schedule, and no gradient outlives backward."""
    model, twin = make_small(), make_small()
    optimizer = make_optimizer(model.parameters())
    schedule = warmup_and_cosine(optimizer)
    others = {param: make_optimizer([param]) for param in twin.parameters()}
    schedules = {param: warmup_and_cosine(other) for param, other in others.items()}

    def step(param):
        others[param].step()
        others[param].zero_grad()
        schedules[param].step()

    for param in others:
        param.register_post_accumulate_grad_hook(step)
    for ids in batches(5):
        loss, same_loss = loss_of(model, ids), loss_of(twin, ids)
        assert torch.equal(loss, same_loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        same_loss.backward()
        assert all(param.grad is None for param in others)
    assert same(list(model.parameters()), list(twin.parameters()))
    for param, other in zip(model.parameters(), others, strict=True):
        assert same(optimizer.state[param], others[other].state[other])


# ---------------------------------------------------------------- tied and frozen weights


def test_tied_weights_are_one_parameter(make_optimizer):
    """The gradients of both places add up, and the tensor is stepped once, with one state."""
    model = make_small()
    optimizer = make_optimizer(model.parameters())
    weight = model.embedding.weight
    alone = nn.Parameter(weight.detach().clone())
    other = make_optimizer([alone])
    for ids in batches(3):
        loss_of(model, ids).backward()
        alone.grad = weight.grad.clone()
        for each in (optimizer, other):
            each.step()
        optimizer.zero_grad()
    assert model.head.weight is model.embedding.weight
    assert len(optimizer.state) == len(list(model.parameters())) == 5
    assert same(weight, alone)
    assert same(optimizer.state[weight], other.state[alone])


def test_frozen_weights_stay_until_they_are_freed(make_optimizer, tmp_path):
    """Weight decay included; nothing is kept for them, and a checkpoint from before they are freed goes on."""

    def train(model, optimizer, found):
        for ids in found:
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()

    def start():
        model = make_small()
        model.hidden.requires_grad_(False)
        return model, make_optimizer(model.parameters())

    model, optimizer = start()
    before = copied(model.hidden.state_dict())
    train(model, optimizer, batches(5)[:3])
    assert same(model.hidden.state_dict(), before)
    assert len(optimizer.state) == 3
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
    again = start()
    for part, saved in zip(again, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(saved)
    for each in ((model, optimizer), again):
        each[0].hidden.requires_grad_(True)
        train(*each, batches(5)[3:])
    assert not same(model.hidden.state_dict(), before)
    assert optimizer.state[model.hidden.weight]["step"] == 2
    assert same(everything(*again), everything(model, optimizer))
