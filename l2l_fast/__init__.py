"""Learned LSTM optimizers at hand-designed speed."""

__version__ = "0.1.0"  # before the imports: modules below read it

from l2l_fast import data, evaluate, meta, ops, tasks
from l2l_fast._native import build_info
from l2l_fast.evaluate import Comparison, compare
from l2l_fast.meta import MetaTrainer
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.optim import LSTMOptimizer

__all__ = [
    "Comparison",
    "CoordinatewiseLSTM",
    "LSTMOptimizer",
    "MetaTrainer",
    "build_info",
    "compare",
    "data",
    "evaluate",
    "meta",
    "ops",
    "tasks",
]
