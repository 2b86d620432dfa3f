"""The row ``proposal``: its figures are those of the losses, and it is paired."""

import dataclasses
import importlib
import json

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.reproduce import reproduce
from l2l_fast.reproduce.rows import ROWS, Case, Settings
from l2l_fast.reproduce.run import Run

module = importlib.import_module("l2l_fast.reproduce.proposal")  # of which the package holds the function


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """Untrained ones in the places of those that come with the package."""
    torch.manual_seed(0)
    folder = tmp_path / "networks"
    network = l2l.AdaptiveMLP(lstm=l2l.CoordinatewiseLSTM("moments", 4, 1, output="tanh", output_scale=0.01))
    l2l.CoordinatewiseLSTM("moments", 4, 1).save_pretrained(folder / "offline")
    for kind in ("networks", "quadratic"):
        network.save_pretrained(folder / f"online-{kind}")
        l2l.CoordinatewiseMLP().save_pretrained(folder / f"mlp-{kind}")
    monkeypatch.setattr(module, "FOLDER", folder)
    cases = (
        Case("meta-quadratic", (2,), {2: {"ratio_steps": 0.8}}),
        Case("{dataset}-mlp", (3,)),
        Case("quadratic", (3,)),
    )
    monkeypatch.setitem(ROWS, "proposal", dataclasses.replace(ROWS["proposal"], cases=cases))
    return network


def test_both_readings_are_run_and_judged(networks, tmp_path):
    run = Run(tmp_path / "out", settings=Settings(seeds=2, tuning_seeds=2))
    found = reproduce("proposal", run)
    offline, digits, quadratic, behind = found.entries
    assert offline.bars == {"ratio_steps": 0.8}
    assert {"ratio_mean", "ratio_final", "ratio_seconds"} < set(offline.figures["LSTM"])
    for entry in (digits, quadratic):
        assert list(entry.figures) == ["online", "an MLP trained alone", "SGD on phi", "Adam"]
        for figures in entry.figures.values():
            assert set(figures) == {"ratio_frozen", "ratio_frozen_final", "wins"}
    is_behind = digits.figures["online"]["ratio_frozen"] >= 1  # the quadratics are no network
    assert behind.figures == {"online": {"behind": float(is_behind)}}
    assert json.loads((run.folder / "proposal" / "row.json").read_text())["bars"] == 2
    assert (run.folder / "proposal" / "online-quadratic.png").stat().st_size > 5000

    task = l2l.tasks.Quadratic()
    seeds = module.held_out_seeds(0, 2)
    means = {}
    for name, network in (("online", networks), ("frozen", networks.mlp)):
        means[name] = []
        for seed in seeds:
            instances = l2l.tasks.Instances(task, [seed])
            x = instances.start()[0].clone().requires_grad_()
            optimizer, losses = l2l.MLPOptimizer([x], network), []
            for _ in range(4):
                loss = task.loss({"x": x}, [leaf[0] for leaf in instances.draw()])
                x.grad = torch.autograd.grad(loss, x)[0]
                optimizer.step()
                losses.append(loss.item())
            means[name].append(sum(losses[1:]) / 3)
    ratio = sum(means["online"]) / sum(means["frozen"])
    assert quadratic.figures["online"]["ratio_frozen"] == pytest.approx(ratio, rel=1e-5)
    wins = sum(one < other for one, other in zip(*means.values(), strict=True))
    assert quadratic.figures["online"]["wins"] == wins


def test_a_folder_of_ones_own_stands_in_for_what_it_has(networks, tmp_path):
    mine = l2l.AdaptiveMLP(lstm=l2l.CoordinatewiseLSTM("moments", 4, 1, output_scale=1e-9))
    mine.save_pretrained(tmp_path / "mine" / "online-networks")
    run = Run(tmp_path / "out", settings=Settings(seeds=1, tuning_seeds=1))
    _, digits, quadratic, _ = reproduce("proposal", run, {"mine": tmp_path / "mine"}).entries
    assert digits.figures["online"]["ratio_frozen"] == pytest.approx(1, abs=1e-5)  # phi stays where it was
    assert quadratic.figures["online"]["ratio_frozen"] != pytest.approx(1, abs=1e-5)
    with pytest.raises(FileNotFoundError, match="has none of mlp-networks, "):
        reproduce("proposal", run, {"mine": tmp_path})


def test_what_was_measured_is_not_measured_again(networks, tmp_path, monkeypatch):
    run = Run(tmp_path / "out", settings=Settings(seeds=2, tuning_seeds=2))
    first = reproduce("proposal", run)
    monkeypatch.setattr("l2l_fast.evaluate.store.trajectories", None)
    second = reproduce("proposal", run)
    assert [entry.figures for entry in second.entries[1:]] == [entry.figures for entry in first.entries[1:]]


def test_the_figures_of_one_reading():
    frozen = torch.tensor([[9.0, 2.0, 2.0], [9.0, 4.0, 4.0]])
    figures, errors = module._against(torch.tensor([[9.0, 1.0, 1.0], [9.0, 4.0, 5.0]]), frozen, 2)
    assert figures == {"ratio_frozen": pytest.approx(2.75 / 3), "ratio_frozen_final": 1.0, "wins": 1.0}
    assert errors["ratio_frozen"] == pytest.approx(0.75 / 3)  # -1 and 0.5, paired
    figures, _ = module._against(torch.full((2, 3), float("nan")), frozen, 2)
    assert figures == {"ratio_frozen": None, "ratio_frozen_final": None, "wins": 0.0}
