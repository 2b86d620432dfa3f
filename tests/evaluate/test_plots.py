"""Pictures are written, say what they show, and follow no diverging curve."""

import builtins

import numpy as np
import pytest
import torch

from l2l_fast.evaluate import Comparison, Result, plot_comparison, plot_curves
from l2l_fast.evaluate.plots import _limits


def picture_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return len(content)


def comparison():
    falling, spread = [10 * 0.9**t for t in range(51)], [1.0] * 51
    exploding = [10.0**t for t in range(30)] + [float("inf")] * 21
    good = Result("LSTM", 1.0, 2.0, 0.1, 1.0, 0.1, 1e-3, falling, spread, falling)
    bad = Result("SGD", 1e3, float("inf"), float("inf"), 1e3, float("inf"), 1e-3, exploding, spread, exploding)
    flat = Result("Adam", 0.1, 5.0, 0.1, 0.1, 5.0, 1e-3, [5.0] * 51, spread, [5.0] * 51)
    return Comparison("test", 50, 4, ["learned"], {"learned": good, "sgd": bad, "adam": flat})


def test_plot_comparison_writes_a_picture(tmp_path):
    path = tmp_path / "folder" / "comparison.png"
    comparison().plot(path)
    assert picture_size(path) > 20_000
    plot_comparison(comparison(), tmp_path / "comparison.svg")
    assert "SGD (lr 1e+03), diverged" in (tmp_path / "comparison.svg").read_text()


@pytest.mark.parametrize("log", [True, False])
def test_plot_curves_writes_a_picture(tmp_path, log):
    curves = {f"{lr}": torch.rand(3, 40) + lr for lr in (0.1, 0.01)} | {"one seed": np.ones(40)}
    curves["broken"] = torch.full((2, 40), float("nan"))
    plot_curves(curves, tmp_path / "curves.png", "rates", emphasised=["0.01"], log=log)
    assert picture_size(tmp_path / "curves.png") > 20_000


def test_global_state_is_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_curves({"a": torch.rand(2, 5)}, tmp_path / "a.png", "a")
    assert dict(matplotlib.rcParams) == before


def test_limits_do_not_follow_a_diverging_curve():
    falling, exploding = np.array([10.0, 1.0, 0.1]), np.array([10.0, 1e9, np.inf])
    low, high = _limits([falling, exploding], log=True)
    assert 0.01 < low < 0.1
    assert 10 < high < 100
    low, high = _limits([falling, exploding], log=False)
    assert low < 0.1
    assert 10 < high < 20
    assert _limits([np.array([np.nan])], log=True) is None
    assert _limits([np.array([0.0, 0.0])], log=True) is None


def test_degenerate_curves_are_drawn(tmp_path):
    curves = {"one step": torch.ones(2, 1), "zeros": torch.zeros(2, 5), "nothing finite": np.full((1, 3), np.inf)}
    plot_curves(curves, tmp_path / "a.png", "a")
    assert picture_size(tmp_path / "a.png") > 5_000


def test_no_curves_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one curve"):
        plot_curves({}, tmp_path / "a.png", "a")


def test_missing_matplotlib_names_the_cure(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install l2l_fast\[plot\]"):
        plot_curves({"a": torch.rand(2, 5)}, tmp_path / "a.png", "a")
