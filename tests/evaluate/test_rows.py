"""Rows as data, what is kept between runs, figures against bars, and the reports."""

import dataclasses
import math
from html.parser import HTMLParser

import pytest
import torch

import l2l_fast as l2l
from l2l_fast import tasks
from l2l_fast.evaluate import compare, compare_horizons, tune, tune_horizons
from l2l_fast.evaluate.store import Store
from l2l_fast.reproduce import Run, kinds, reproduce, rows
from l2l_fast.reproduce.figures import Entry, Findings, number
from l2l_fast.reproduce.report import html, markdown
from l2l_fast.reproduce.rows import METRICS, ROWS, Case, Settings
from l2l_fast.tasks import Quadratic

TASK = Quadratic(dimension=4)
TINY = Settings(seeds=2, tuning_seeds=2, long_horizon=12)


def momentum(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.5)


# ---------------------------------------------------------------- several horizons at once


def test_shorter_horizons_are_beginnings_of_the_longest():
    both = tune_horizons(TASK, "adam", (8, 40), seeds=range(3))
    for horizon in (8, 40):
        alone = tune(TASK, "adam", horizon=horizon, seeds=range(3))
        assert (both[horizon].lr, both[horizon].lr_final) == (alone.lr, alone.lr_final)
        shared = dict(zip(both[horizon].rates, both[horizon].mean_losses, strict=True))
        assert [shared[rate] for rate in alone.rates] == pytest.approx(alone.mean_losses, rel=1e-5)


def test_comparing_at_several_horizons_is_comparing_at_each():
    options = {"seeds": 2, "tuning_seeds": 2, "baselines": ["adam", "nesterov"]}
    both = compare_horizons(TASK, momentum, (8, 40), **options)
    assert list(both) == [8, 40]
    for horizon, found in both.items():
        alone = compare(TASK, momentum, horizon=horizon, **options)
        for name, result in alone.optimizers.items():
            mine = found.optimizers[name]
            assert (mine.lr, mine.lr_final) == (result.lr, result.lr_final)
            assert mine.curve == pytest.approx(result.curve, rel=1e-5)
            assert mine.final_loss == pytest.approx(result.final_loss, rel=1e-5)


# ---------------------------------------------------------------- what is kept


def test_a_store_tells_facts_apart(tmp_path):
    store = Store(tmp_path, task="a")
    store.put({"x": torch.ones(2)}, rate=0.1)
    assert store.get(rate=0.1)["x"].tolist() == [1, 1]
    assert store.get(rate=0.10001) is None
    assert store.of(task="b").get(rate=0.1) is None
    assert Store(None).get(rate=0.1) is None
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])  # damaged
    assert store.get(rate=0.1) is None


def test_what_is_kept_is_not_run_again(tmp_path, monkeypatch, network):
    calls = []
    run = l2l.evaluate.trajectories.trajectories
    for module in ("store", "baselines"):
        watched = lambda *a, **k: calls.append(len(a[1])) or run(*a, **k)  # noqa: E731
        monkeypatch.setattr(f"l2l_fast.evaluate.{module}.trajectories", watched)
    options = {"seeds": 2, "tuning_seeds": 2, "baselines": ["adam", "sgd"], "store": Store(tmp_path, task="mine")}
    first = compare_horizons(TASK, {"net": network}, (4, 9), **options)
    assert len(calls) >= 3
    calls.clear()
    again = compare_horizons(TASK, {"other name": network}, (4, 9), **options)
    assert calls == []
    assert again[9].optimizers["other name"].curve == first[9].optimizers["net"].curve
    assert again[4].optimizers["adam"].mean_loss == first[4].optimizers["adam"].mean_loss
    with torch.no_grad():
        network.head.weight.add_(1)
    compare_horizons(TASK, {"net": network}, (4, 9), **options)
    assert calls == [1]  # other weights, the same baselines
    calls.clear()
    compare_horizons(TASK, {"net": momentum}, (4, 9), **options)
    assert calls == [1]  # who knows what a callable does


# ---------------------------------------------------------------- rows


def test_every_row_names_tasks_that_exist():
    for name, row in ROWS.items():
        for dataset in ("digits", "mnist"):
            for case in row.cases:
                assert tasks.get(case.task.format(dataset=dataset), **case.options).name
        assert all(set(bars) <= set(METRICS) for case in row.cases for bars in case.bars.values()), name
    assert list(ROWS) == rows.find("all")


def test_an_unknown_row_names_the_nearest():
    with pytest.raises(ValueError, match=r"no row 'relo'. Did you mean relu\? Known: meta-lr, .*, all"):
        rows.find("relo")


def test_a_compare_row(tmp_path, monkeypatch, network):
    case = Case("{dataset}-mlp", (3, 6), {6: {"ratio_mean": 0.1, "ratio_final": 100.0}}, {"init_scale": 0.01})
    monkeypatch.setitem(ROWS, "mnist", dataclasses.replace(ROWS["mnist"], cases=(case,)))
    found = reproduce("mnist", Run(tmp_path, settings=TINY), {"a": network, "b": network})
    assert [entry.label for entry in found.entries] == [
        f"digits-mlp, start std 0.01, {steps} steps" for steps in (3, 6)
    ]
    assert found.judged() == [False, True]
    written = {path.name for path in (tmp_path / "mnist").iterdir()}
    stems = [f"digits-mlp-start-std-0.01-{steps}" for steps in (3, 6)]
    assert written == {"row.json", "table.txt", *(f"{stem}.{end}" for stem in stems for end in ("json", "png"))}
    assert l2l.evaluate.Comparison.from_json(tmp_path / "mnist" / f"{stems[1]}.json").learned == ["a", "b"]
    assert "median" in (tmp_path / "mnist" / "table.txt").read_text()


def test_start_scales_have_a_picture_together(tmp_path, monkeypatch, network):
    cases = tuple(Case("{dataset}-mlp", (3,), {}, {"init_scale": scale}) for scale in (0.01, 1.0))
    monkeypatch.setitem(ROWS, "init", dataclasses.replace(ROWS["init"], cases=cases))
    found = reproduce("init", Run(tmp_path, settings=TINY), {"a": network})
    assert next(iter(found.pictures)) == "start-scales-3.png"
    assert (tmp_path / "init" / "start-scales-3.png").stat().st_size > 5000


def test_seconds_are_against_fused_adam_and_state_is_in_its_bytes(tmp_path, monkeypatch, network):
    case = Case("{dataset}-mlp", (4,), {4: {"ratio_seconds": 100.0, "bytes": 5.0}})
    monkeypatch.setitem(ROWS, "seconds", dataclasses.replace(ROWS["seconds"], cases=(case,)))
    found = reproduce("seconds", Run(tmp_path, settings=TINY), {"a": network})
    (entry,) = found.entries
    assert entry.rivals == "Adam (fused)"
    assert entry.figures["a"]["bytes"] == 2 * 16 / 8  # two layers of four units, h and c of each in bfloat16
    assert entry.met("bytes") is True
    written = l2l.evaluate.Comparison.from_json(tmp_path / "seconds" / "digits-mlp-4.json")
    rounded = compare_horizons(
        "digits-mlp", {"a": network}, (4,), seeds=2, tuning_seeds=2, baselines=["adam-fused"],
        state_dtype=torch.bfloat16,
    )[4]  # fmt: skip
    assert written.optimizers["a"].curve == rounded.optimizers["a"].curve


def test_quality_against_cost(tmp_path, monkeypatch, network):
    case = Case("{dataset}-mlp", (3,))
    monkeypatch.setitem(ROWS, "front", dataclasses.replace(ROWS["front"], cases=(case,)))
    small = l2l.CoordinatewiseLSTM("moments", 2, 1)
    small.save_pretrained(tmp_path / "small")
    found = reproduce("front", Run(tmp_path, settings=TINY), {"a": network, "b": tmp_path / "small"})
    assert [entry.label for entry in found.entries] == ["digits-mlp, 3 steps", "each coordinate and step"]
    costs = found.entries[-1].figures
    assert (costs["a"]["state"], costs["a"]["multiply_adds"]) == (64, 4 * 4 * (2 + 4) + 4 * 4 * 8 + 4)
    assert (costs["b"]["state"], costs["b"]["multiply_adds"]) == (24, 4 * 2 * (2 + 2) + 2)
    assert costs["b"]["nanoseconds"] > 0
    assert (tmp_path / "front" / "front.png").stat().st_size > 5000


def test_a_long_row(tmp_path, monkeypatch, network):
    monkeypatch.setattr(kinds, "EARLY", (4, 8))
    monkeypatch.setattr(kinds, "LATE", 3)
    cases = (dataclasses.replace(ROWS["horizon"].cases[0], task="quadratic"),)
    monkeypatch.setitem(ROWS, "horizon", dataclasses.replace(ROWS["horizon"], cases=cases))
    found = reproduce("horizon", Run(tmp_path, settings=TINY), {"a": network})
    assert [(entry.label, list(entry.bars)) for entry in found.entries] == [
        ("quadratic, 8 steps", ["diverged"]), ("quadratic, 12 steps", ["diverged", "late"]),
    ]  # fmt: skip
    assert (tmp_path / "horizon" / "quadratic-12.png").stat().st_size > 5000


def test_stability_counts_seeds_and_compares_late_with_early(monkeypatch):
    monkeypatch.setattr(kinds, "EARLY", (4, 8))
    monkeypatch.setattr(kinds, "LATE", 2)
    good, worse, bad = torch.full((3, 21), 2.0)
    good[5:9], good[-2:] = 1.0, 0.5
    worse[-2:] = 3.0  # a window of one step: above the first loss
    bad[12] = math.nan
    assert kinds.stability(good[None]) == {"diverged": 0.0, "late": 0.5}
    assert kinds.stability(torch.stack([good, worse, bad]))["diverged"] == 2
    assert kinds.stability(bad[None]) == {"diverged": 1.0, "late": 1.0}
    assert kinds.stability(good[None, :9]) == {"diverged": 0.0}


def test_a_row_that_trains_its_networks_runs_from_python_too(tmp_path, monkeypatch, network):
    row = dataclasses.replace(ROWS["ablation"], cases=(Case("quadratic", (3,)),), recipes=("base",))
    monkeypatch.setitem(ROWS, "ablation", row)
    run = Run(tmp_path, settings=dataclasses.replace(TINY, meta_steps=1))
    found = reproduce("ablation", run, beside={"base": network})
    assert found.networks == ["base", "base, given"]
    monkeypatch.setattr("l2l_fast.meta.recipes.MetaTrainer", None)  # nothing is trained again
    again = reproduce("ablation", run)
    assert again.entries[0].figures["base"]["ratio_mean"] == found.entries[0].figures["base"]["ratio_mean"]


# ---------------------------------------------------------------- figures and reports


def findings(**options):
    figures = {
        "one": {"ratio_mean": 0.5, "ratio_steps": 0.4},
        "two": {"ratio_mean": 0.9, "ratio_steps": None},
        "three": {"ratio_mean": 0.7, "ratio_steps": None},
    }
    entry = Entry("a <task>, 10 steps", figures, {"ratio_mean": 0.8, "ratio_steps": 0.8}, "Adam / Nesterov")
    plain = {"row": "relu", "title": "ReLU", "question": "Well?", "dataset": "digits", "networks": list(figures)}
    return Findings(**plain | {"alike": True, "seeds": 10, "entries": [entry]} | options)


def test_the_median_is_judged_and_what_was_not_reached_counts_as_worst():
    (entry,) = findings().entries
    assert (entry.median("ratio_mean"), entry.met("ratio_mean")) == (0.7, True)
    assert (entry.median("ratio_steps"), entry.met("ratio_steps")) == (None, False)
    assert entry.met("ratio_final") is None


def test_json_has_what_the_table_shows(tmp_path):
    content = findings().to_dict()
    assert set(content) == {"row", "title", "question", "dataset", "networks", "alike", "seeds", "entries", "pictures",
                            "command", "environment", "bars", "bars_met"}  # fmt: skip
    (entry,) = content["entries"]
    assert set(entry) == {"label", "figures", "bars", "rivals", "errors", "files", "median", "met"}
    assert entry["median"] == {"ratio_mean": 0.7, "ratio_steps": None}
    assert entry["met"] == {"ratio_mean": True, "ratio_steps": False}
    assert (content["bars"], content["bars_met"]) == (2, 1)


def test_the_table():
    assert findings().table().splitlines() == [
        "relu: ReLU, 10 held-out seeds",
        "",
        "a <task>, 10 steps, against Adam / Nesterov",
        "           mean loss                steps",
        "  bar         <= 0.8               <= 0.8",
        "  one           0.50                 0.40",
        "  two           0.90          not reached",
        "  three         0.70          not reached",
        "  median    0.70 met   not reached missed",
        "",
        "1 of 2 bars met",
    ]
    alone = findings(alike=False).table()
    assert "median" not in alone


def test_figures_are_written_for_people():
    assert [number(value, "nanoseconds") for value in (0.0123, 34.21, 999, 1296)] == ["0.0123", "34.2", "999", "1,296"]
    assert number(1.005, "ratio_mean") == "1.00"
    assert (number(None, "ratio_steps"), number(None, "ratio_mean")) == ("not reached", "diverged")


def test_markdown():
    lines = markdown([findings(command="l2l-fast reproduce relu")]).splitlines()
    assert "    l2l-fast reproduce relu" in lines
    assert lines[-6:-2] == [
        "| a <task>, 10 steps | one | 0.50 | 0.40 | Adam / Nesterov |",
        "|  | two | 0.90 | not reached |  |",
        "|  | three | 0.70 | not reached |  |",
        "|  | median | 0.70 (<= 0.8, met) | not reached (<= 0.8, missed) |  |",
    ]


class Tags(HTMLParser):
    """Open tags, and what they refer to outside the page."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.outside = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith(("data:", "#"))]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_well_formed_page_with_its_pictures_inside(tmp_path):
    (tmp_path / "relu").mkdir()
    l2l.evaluate.plot_curves({"a": torch.rand(2, 9)}, tmp_path / "relu" / "a.png", "a")
    page = html([findings(pictures={"a.png": "a & b"}), findings(row="init")], tmp_path, "l2l-fast reproduce all")
    tags = Tags()
    tags.feed(page)
    assert (tags.open, tags.outside) == ([], [])
    assert (tags.seen.count("section"), tags.seen.count("img"), tags.seen.count("table")) == (2, 1, 3)
    assert "a &lt;task&gt;, 10 steps" in page
    assert "a &amp; b" in page
    assert "1 of 2 bars met" in page
    assert 'class="missed">not reached' in page
