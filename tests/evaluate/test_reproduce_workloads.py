"""The report of eight workloads: its runs, what it keeps, and what it says of them."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer
from l2l_fast.reproduce import workloads
from l2l_fast.reproduce.workloads import Muon, Plan, geometric_mean, ratios, rivals, run, share_of_steps, table
from l2l_fast.schedule import warm_cosine

TINY = Plan(steps=40, seeds=2, workloads=("tabular-regression",))


def test_every_rival_has_as_many_rates():
    assert {len(rival.rates) for rival in rivals().values()} == {5}


def test_all_start_from_one_point_and_see_the_same_rows():
    found = [
        workloads.train("tabular-regression", rival.make, 1e-12, seed=3, steps=20)["curve"]
        for rival in rivals().values()
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    assert workloads.train("tabular-regression", rivals()["AdamW"].make, 1e-12, seed=4, steps=20)["curve"] != found[0]


def test_the_schedule_is_warm_up_and_cosine():
    assert [warm_cosine(1.0, 100, step) for step in (0, 4, 5)] == pytest.approx([0.2, 1, 1])
    assert warm_cosine(1.0, 100, 52) == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 47 / 95))
    assert 0 < warm_cosine(1.0, 100, 99) < 1e-3


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    matrix, kernel, bias, twin = (
        torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (5, 2, 3, 3), (7,), (7,))
    )
    twin.data.copy_(bias.data)
    for param in (matrix, kernel, bias):
        param.grad = torch.randn_like(param)
    twin.grad = bias.grad.clone()
    before = [matrix.detach().clone(), kernel.detach().clone()]
    Muon([matrix, kernel, bias], 0.1, weight_decay=0.0).step()
    for param, start in zip((matrix, kernel), before, strict=True):
        move = (param - start).detach().flatten(1)
        assert move.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=1e-4)
        values = torch.linalg.svdvals(move)
        assert values.max() < 2 * values.min()
        assert (move * param.grad.flatten(1)).sum() < 0
    torch.optim.AdamW([twin], 0.1, weight_decay=0.0).step()
    torch.testing.assert_close(bias, twin)


def test_sized_muon_steps_as_far_as_its_momentum_agrees():
    generator, like = torch.Generator().manual_seed(0), CoordinatewiseLSTM.from_pretrained("l2l-base")
    matrix = torch.nn.Parameter(torch.zeros(9, 7))
    optimizer = Muon([matrix], 0.1, sized_like=like)
    m, v, sizes = torch.zeros(9, 7), 0.0, []
    for step in range(1, 61):
        matrix.grad = torch.randn(9, 7, generator=generator)
        before = matrix.detach().clone()
        optimizer.step()
        sizes.append((matrix - before).square().mean().sqrt().item() / 0.1)
        m = 0.95 * m + 0.05 * matrix.grad
        v = 0.999 * v + 0.001 * matrix.grad.square().mean().item()
        agreement = m.square().mean().sqrt().item() / (1 - 0.95**step) / math.sqrt(v / (1 - 0.999**step))
        assert sizes[-1] == pytest.approx(min(1.0, 0.2 * math.sqrt(1.95 / 0.05) * agreement), rel=1e-3)
    assert sizes[0] == pytest.approx(1, rel=1e-3)
    assert 0.15 < sizes[-1] < 0.3  # of noise 0.2


def test_the_control_is_adams_direction_in_the_same_rule():
    control = workloads.nothing_learned(CoordinatewiseLSTM.from_pretrained("l2l-base"))
    theta, twin = torch.nn.Parameter(torch.zeros(9)), torch.nn.Parameter(torch.zeros(9))
    ours = LSTMOptimizer([theta], control, 0.1, orthogonalize=False)
    adam = torch.optim.Adam([twin], 1.0, betas=(0.95, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        start, twin_start = theta.detach().clone(), twin.detach().clone()
        theta.grad = torch.randn(9, generator=generator)
        twin.grad = theta.grad.clone()
        ours.step()
        adam.step()
        move, other = theta.detach() - start, twin.detach() - twin_start
        size = move.square().mean().sqrt()
        torch.testing.assert_close(move, size * other / other.square().mean().sqrt(), rtol=1e-3, atol=1e-6)
        assert 0.1 * 0.1 < size < 0.1 * 1.001  # lr times what the rule gives, as l2l-base has it


def test_a_report_is_kept_run_by_run_and_goes_on(tmp_path, monkeypatch):
    plan = Plan(steps=40, seeds=2, workloads=("tabular-regression",), rivals=("AdamW", "learned"))
    said = []
    whole = run(plan, tmp_path, progress=lambda *words: said.append(words))
    assert said[0] == ("tuning", 1, 10)
    assert said[-1][0] == "seeds"
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]) + '\n{"job": {"workload"')  # killed while it wrote
    made = []
    train = workloads.train
    monkeypatch.setattr(workloads, "train", lambda *args: made.append(args) or train(*args))
    again = run(plan, tmp_path)
    assert len(made) == len(lines) - 4
    made.clear()
    run(plan, tmp_path)  # the line that was cut short has not swallowed the next
    assert not made
    for label, row in whole["found"]["tabular-regression"].items():
        other = again["found"]["tabular-regression"][label]
        assert other["lr"] == row["lr"]
        for one, two in zip(row["seeds"], other["seeds"], strict=True):
            assert {**one, "seconds": 0} == {**two, "seconds": 0}
    rows = whole["found"]["tabular-regression"]
    assert list(rows) == ["AdamW", "learned", "learned, at AdamW's rate"]
    assert rows["learned, at AdamW's rate"]["lr"] == rows["AdamW"]["lr"]
    best = min(rows["learned"]["tuning"], key=rows["learned"]["tuning"].get)
    assert rows["learned"]["lr"] == best
    assert len(rows["learned"]["seeds"]) == 2
    workloads.write(whole, tmp_path)
    assert json.loads((tmp_path / "workloads.json").read_text())["plan"]["steps"] == 40
    assert (tmp_path / "workloads.png").stat().st_size > 5000
    assert (tmp_path / "table.txt").read_text() == table(whole) + "\n"


def test_a_run_that_diverges_counts_as_infinite_and_is_not_chosen(tmp_path, monkeypatch):
    def train(workload, make, lr, seed, steps):
        bad = lr > 0.02
        value = math.nan if bad else 1.0 / lr
        return {"mean": value, "last": value, "validation": value, "seconds": 1.0, "curve": [value] * 20,
                "held_out": [value] * (3 if bad else 20)}  # fmt: skip

    monkeypatch.setattr(workloads, "train", train)
    found = run(TINY, tmp_path)
    for label, row in found["found"]["tabular-regression"].items():
        assert row["lr"] == 0.01, label
    workloads.write(found, tmp_path)


def test_a_network_whose_steps_have_a_size_of_their_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="network must have update_rms"):
        run(Plan(network="l2l-base-v1"), tmp_path)


def test_a_network_without_moments_is_not_orthogonalized(tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "_do", lambda job: {**{name: 1.0 for name in workloads.METRICS}, "seconds": 1.0})
    CoordinatewiseLSTM("log_sign", 3, 1, update_rms=0.2).save_pretrained(tmp_path / "network")
    found = run(Plan(workloads=("deep-mlp",), network=str(tmp_path / "network")), tmp_path)["found"]["deep-mlp"]
    assert list(found) == [
        "AdamW",
        "Nesterov",
        "Muon",
        "learned, coordinatewise",
        "learned, coordinatewise, at AdamW's rate",
    ]


def made_up(**rows):
    """A report of two workloads whose figures are known."""

    def seeds(curve, factor):
        return [{"mean": np.mean(curve) * factor * scale, "last": curve[-1] * factor * scale,
                 "validation": 2 * curve[-1] * factor * scale, "seconds": 3.0 * factor,
                 "curve": [value * factor * scale for value in curve],
                 "held_out": [value * factor * scale for value in curve]} for scale in (0.9, 1.1)]  # fmt: skip

    curve = list(np.linspace(2.0, 1.0, 20))
    return {
        name: {row: {"lr": 0.01, "tuning": {}, "seeds": seeds(curve, factor)} for row, factor in rows.items()}
        for name in ("one", "two")
    }


def test_ratios_are_of_means_with_the_error_of_pairs():
    found = made_up(AdamW=1.0, ours=0.5)
    for metric in workloads.METRICS:
        for value, error in ratios(found, "ours", metric).values():
            assert value == pytest.approx(0.5)
            assert error == pytest.approx(0, abs=1e-12)
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


def test_the_share_of_steps_is_where_a_curve_stays_below_the_rivals_last_loss():
    found = made_up(AdamW=1.0, quick=0.5, slow=1.5)["one"]
    assert share_of_steps(found, "AdamW") == pytest.approx(1.0)
    assert share_of_steps(found, "quick") == pytest.approx(1 / 20)  # from its first twentieth on
    assert share_of_steps(found, "slow") > 1
    lowered = made_up(AdamW=1.0, ours=2 / 3)["one"]  # which is there where the curve is 1.5, in the middle
    assert share_of_steps(lowered, "ours") == pytest.approx(0.5, abs=0.03)


def test_bars_are_of_the_learned_rule_against_each_rival():
    found = made_up(**{"AdamW": 1.0, "Muon": 0.5, "control": 0.8, "learned": 0.6, "learned, at AdamW's rate": 0.95})
    judged = {bar.what: bar for bar in workloads.bars(found)}
    figures = {what: (round(bar.found, 6), bar.met) for what, bar in judged.items()}
    assert figures["at AdamW's tuned rate, mean loss in AdamW's"] == (0.95, False)
    assert figures["the same: share of workloads with a higher last loss"] == (0, True)
    assert figures["tuned alike, validation loss in AdamW's"] == (0.6, True)
    assert figures["last loss in Muon's"] == (1.2, False)
    assert figures["mean loss in the control's"] == (0.75, True)
    assert len(judged) == 6


def test_a_table_fits_and_names_every_row():
    rows = {"AdamW": 1.0, "learned": 0.5, "learned, at AdamW's rate": 0.5}
    report = {"found": made_up(**rows), "plan": {"steps": 40}}
    text = table(report)
    assert "learned" in text
    assert "0.500" in text
    assert max(map(len, text.splitlines())) <= 130
    lines = workloads.markdown(report).splitlines()
    assert lines[0] == "| 40 steps | AdamW | learned | learned, at AdamW's rate |"
    assert lines[2] == "| one | .01: 1.500 / 1.000, 2.000 | .01: .750 / .500, 1.000 | .01: .750 / .500, 1.000 |"
    assert lines[-1] == "| in AdamW's, geometric mean | 1.00 / 1.00 / 1.00 | 0.50 / 0.50 / 0.50 | 0.50 / 0.50 / 0.50 |"


def test_long_runs_are_held_to_bars_of_their_own():
    rows = {"AdamW": 1.0, "learned": 0.96, "learned, at AdamW's rate": 1.1}
    (at_3000,) = workloads.bars(made_up(**rows), 3000)
    assert (round(at_3000.found, 6), at_3000.most, at_3000.met) == (0.96, 0.95, False)
    found = made_up(**rows)
    found["two"]["learned"]["seeds"][1]["last"] = None  # as a run that diverged is read
    diverged, higher = workloads.bars(found, 10_000)
    assert (diverged.found, diverged.met) == (1, False)
    assert (higher.found, higher.met) == (1.0, False)


def test_rates_of_another_report_take_the_place_of_tuning(tmp_path):
    plan = Plan(steps=20, seeds=1, workloads=("tabular-regression",), rivals=("learned",))
    report = {"found": {"tabular-regression": {"AdamW": {"lr": 0.004}, "learned": {"lr": 0.005}}}}
    (tmp_path / "other.json").write_text(json.dumps(report))
    found = run(dataclasses.replace(plan, rates_from=str(tmp_path / "other.json")), tmp_path / "out")
    rows = found["found"]["tabular-regression"]
    assert {name: row["lr"] for name, row in rows.items()} == {
        "AdamW": 0.004, "learned": 0.005, "learned, at AdamW's rate": 0.004,
    }  # fmt: skip
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 3
    more = dataclasses.replace(plan, rivals=("Muon",), rates_from=str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match=r"rates_from must have all that is asked for: .*other.json has no 'Muon'"):
        run(more, tmp_path / "out")
    for text in ("{", '{"found": {"tabular-regression": {"AdamW": 3}}}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"rates_from must be a workloads.json of this command, which"):
            run(more, tmp_path / "out")


def test_a_network_of_one_size_has_no_sizes_to_give(tmp_path):
    network = CoordinatewiseLSTM(features="both", hidden_size=2, num_layers=1, update_rms=0.2)
    network.save_pretrained(tmp_path / "network")
    plan = dataclasses.replace(TINY, network=str(tmp_path / "network"), rivals=("Muon, sized",))
    with pytest.raises(ValueError, match="max_update_rms"):
        run(plan, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
