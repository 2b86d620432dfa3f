from l2l_fast.evaluate.baselines import BASELINES, USUAL, Baseline, Tuned, tune, tune_horizons
from l2l_fast.evaluate.compare import compare, compare_horizons
from l2l_fast.evaluate.comparison import Comparison, Result
from l2l_fast.evaluate.pictures import plot_comparison
from l2l_fast.evaluate.plots import plot_curves

__all__ = [
    "BASELINES",
    "USUAL",
    "Baseline",
    "Comparison",
    "Result",
    "Tuned",
    "compare",
    "compare_horizons",
    "plot_comparison",
    "plot_curves",
    "tune",
    "tune_horizons",
]
