"""``l2l-fast reproduce`` with rows cut to seconds: what it writes, how it goes on, how it fails."""

import dataclasses
import io
import json
import sys

import pytest
import torch

from l2l_fast.cli import reproduce as command
from l2l_fast.meta.recipes import read, stages
from l2l_fast.reproduce.rows import ROWS, Case, Settings

SMALL = {"mnist": Case("{dataset}-mlp", (3, 6), {6: {"ratio_mean": 100.0}}), "quadratic": Case("quadratic", (5,)),
         "ablation": Case("quadratic", (4,)), "horizon": Case("{dataset}-mlp", bars={0: {"diverged": 0.0}}),
         "meta-lr": Case("quadratic", (10,))}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch, network, tmp_path):
    for name in list(ROWS):
        if name in SMALL:
            recipes = ROWS[name].recipes[:2]
            monkeypatch.setitem(ROWS, name, dataclasses.replace(ROWS[name], cases=(SMALL[name],), recipes=recipes))
        else:
            monkeypatch.delitem(ROWS, name)
    tiny = Settings(seeds=2, tuning_seeds=1, meta_seeds=1, meta_steps=2, long_horizon=6)
    monkeypatch.setattr(command, "QUICK", tiny)
    network.save_pretrained(tmp_path / "mine" / "network")


def test_a_row(run, tmp_path):
    code, out, err = run("reproduce", "mnist", "--network", "mine/network", "--quick")
    assert code == 0
    assert out.startswith("mnist: The deck's network")
    assert "digits-mlp, 6 steps, against" in out
    assert "1 of 1 bars met" in out
    assert "mine" in out
    assert "tuning Adam" in err
    folder = tmp_path / "runs" / "reproduce-digits" / "mnist"
    assert (folder / "table.txt").read_text(encoding="utf-8") == out
    content = json.loads((folder / "row.json").read_text())
    assert content["command"] == "l2l-fast reproduce mnist --network mine/network --dataset digits --quick"
    comparison = json.loads((folder / "digits-mlp-6.json").read_text())
    assert set(comparison["optimizers"]) == {"mine", "sgd", "nesterov", "rmsprop", "adam"}
    assert (folder / "digits-mlp-6.png").stat().st_size > 5000


def test_a_row_on_an_ascii_terminal(run, monkeypatch):
    contents = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(contents, encoding="ascii"))
    code, *_ = run("reproduce", "mnist", "--network", "mine/network", "--quick")
    assert code == 0
    assert b" +- " in contents.getvalue()


def test_all_rows(run, tmp_path):
    pytest.importorskip("optuna", reason="the row meta-lr needs Optuna")
    arguments = ("reproduce", "all", "--network", "mine/network", "--quadratic-network", "mine/network", "--quick")
    code, out, err = run(*arguments, "--out", "found", "--json")
    assert code == 0, err
    content = json.loads(out)
    assert list(content) == list(ROWS)
    assert content["ablation"]["networks"] == ["base", "moments", "mine"]
    assert content["meta-lr"]["networks"] == ["0.1", "0.03", "0.01", "0.003", "0.001"]
    assert content["meta-lr"]["entries"][0]["figures"]["0.1"]["meta_loss"] > 0
    page = (tmp_path / "found" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == sum(len(row["pictures"]) for row in content.values())
    assert all(f"### {row['title']}" in (tmp_path / "found" / "results.md").read_text() for row in content.values())
    # Again: nothing is trained, tuned or run twice.
    code, again, err = run(*arguments, "--out", "found", "--json")
    assert code == 0
    assert "tuning" not in err
    assert "recipe" not in err
    figures = [json.loads(text)["ablation"]["entries"][0]["figures"]["base"]["ratio_mean"] for text in (out, again)]
    assert figures[0] == figures[1]


def test_jobs_change_no_figure(run, tmp_path, monkeypatch):
    """Nothing is left to this process that others can measure, and all that is kept is the same to the last bit."""
    pytest.importorskip("optuna", reason="the row meta-lr needs Optuna")
    arguments = ("reproduce", "all", "--network", "mine/network", "--quadratic-network", "mine/network", "--quick")
    code, alone, err = run(*arguments, "--out", "alone", "--json")
    assert code == 0, err
    monkeypatch.setattr("l2l_fast.evaluate.store.trajectories", _interrupt)
    monkeypatch.setattr("l2l_fast.evaluate.store.tune_horizons", _interrupt)
    monkeypatch.setattr("l2l_fast.meta.recipes.train", _interrupt)
    code, spread, err = run(*arguments, "--out", "spread", "--json", "--jobs", 2)
    assert code == 0, err
    assert "measured ahead by 2 processes" in err
    kept = {path.name: torch.load(path)["value"] for path in (tmp_path / "alone" / "store").iterdir()}
    for name, value in kept.items():
        torch.testing.assert_close(
            torch.load(tmp_path / "spread" / "store" / name)["value"], value, rtol=0, atol=0, equal_nan=True
        )
    assert len(kept) == len(list((tmp_path / "spread" / "store").iterdir()))
    for name, row in json.loads(alone).items():
        for entry, other in zip(row["entries"], json.loads(spread)[name]["entries"], strict=True):
            for network, figures in entry["figures"].items():
                timed = {"ratio_seconds", "nanoseconds"}
                assert {metric: value for metric, value in figures.items() if metric not in timed} == {
                    metric: value for metric, value in other["figures"][network].items() if metric not in timed
                }
    # Again: there is nothing to spread.
    monkeypatch.setattr("l2l_fast.reproduce.ahead.spread", _interrupt)
    assert run(*arguments, "--out", "spread", "--json", "--jobs", 2)[0] == 0


def test_a_killed_run_goes_on(run, monkeypatch):
    arguments = ("reproduce", "mnist", "--network", "mine/network", "--quick", "--out", "found")
    with monkeypatch.context() as patch:
        patch.setattr("l2l_fast.evaluate.store.trajectories", _interrupt)
        assert run(*arguments)[0] == 130
    code, _, err = run(*arguments)
    assert code == 0
    assert "tuning" not in err
    assert "comparing" in err


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_several_networks_are_told_apart(run, network):
    network.save_pretrained("other/network")
    code, out, _ = run("reproduce", "quadratic", "--network", "mine/network", "--network", "other/network", "--quick")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[4:]] == ["mine", "other", "median"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mnits"], "Did you mean mnist?"),
        (["mnist", "--dataset", "cifar"], "--dataset must be one of digits, mnist"),
        (["mnist"], "the row mnist judges l2l-base-v1"),
        (["quadratic"], "then give --quadratic-network runs/mine/network"),
        (["all", "--network", "mine/network"], "the row quadratic judges l2l-quadratic"),
        (["mnist", "--network", "no-such"], "no network 'no-such'"),
        (["mnist", "--network", "mine/network", "--network", "mine/network"], "twice"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(run, monkeypatch, arguments, words):
    monkeypatch.setattr("l2l_fast.checkpoint.shipped", list)
    code, out, err = run("reproduce", *arguments, "--quick")
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_recipe_files_say_what_differs():
    base = read("base")
    changed = read("moments")
    assert changed["network"] == base["network"] | {"features": "moments"}
    assert (changed["training"], changed["tasks"]) == (base["training"], base["tasks"])
    assert read("no-scaling")["training"]["scaling"] == 0


def test_a_recipe_like_another_has_its_later_stages_or_its_own(tmp_path):
    first = {"tasks": ["a"], "network": {}, "training": {"unroll": 5}, "meta_steps": 4}
    then = [{"tasks": ["b"], "training": {"meta_lr": 1}, "meta_steps": 6}, {"training": {"unroll": 9}, "meta_steps": 7}]
    files = {
        "three": first | {"then": then},
        "longer": {"like": str(tmp_path / "three.json"), "meta_steps": 5},
        "other": {"like": str(tmp_path / "three.json"), "then": [{"meta_steps": 8}]},
        "short": {"like": str(tmp_path / "three.json"), "then": []},
        "tasks": first | {"then": [{"tasks": str(tmp_path / "three.json")}]},
    }
    for name, recipe in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(recipe))
    three, longer, other, short, tasks = (stages(read(str(tmp_path / f"{name}.json"))) for name in files)
    second = first | {"tasks": ["b"], "training": {"unroll": 5, "meta_lr": 1}, "meta_steps": 6}
    third = second | {"training": {"unroll": 9, "meta_lr": 1}, "meta_steps": 7}
    assert three == [first, second, third]
    assert longer == [first | {"meta_steps": 5}, second, third]
    assert other == [first, first | {"meta_steps": 8}]
    assert short == [first]
    assert tasks == [first, first | {"tasks": ["b"]}]
    assert [part["meta_steps"] for part in stages(first | {"then": then}, 5)] == [4, 5, 5]


def test_workloads(run, tmp_path):
    arguments = (
        "reproduce",
        "workloads",
        "--quick",
        "--steps",
        "20",
        "--seeds",
        "1",
        "--workload",
        "tabular-regression",
    )
    code, out, err = run(*arguments, "--out", "found")
    assert code == 0, err
    assert "validation loss" in out
    assert "learned, coordinatewise, at AdamW's rate" in out
    assert json.loads((tmp_path / "found" / "workloads.json").read_text())["plan"]["steps"] == 20
    assert (tmp_path / "found" / "workloads.png").stat().st_size > 5000
    code, again, _ = run(*arguments, "--out", "found", "--json")
    assert code == 0
    assert json.loads(again)["found"]["tabular-regression"]["AdamW"]["lr"] in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@pytest.mark.parametrize(("words", "said"), [
    (("workloads", "--workload", "cifar"), "--workload 'cifar': give one of transformer-lm"),
    (("workloads", "--network", "l2l-base-v1"), "network must have update_rms"),
    (("workloads", "--network", "l2l-base", "--network", "l2l-small"), "--network of the row workloads is one"),
    (("workloads", "--seed", "3"), "--seed does not go with the row workloads: leave it out"),
    (("workloads", "--dataset", "mnist"), "--dataset does not go with the row workloads"),
    (("mnist", "--steps", "50"), "--steps goes with the row workloads"),
])  # fmt: skip
def test_what_workloads_refuses(run, words, said):
    code, _, err = run("reproduce", *words)
    assert code != 0
    assert said in " ".join(err.replace("\u2502", " ").split())
