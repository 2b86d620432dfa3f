"""Learned LSTM optimizers at hand-designed speed."""

from l2l_fast import data, evaluate, meta, ops, tasks
from l2l_fast._native import build_info
from l2l_fast._version import __version__
from l2l_fast.adaptive import AdaptiveMLP, CoordinatewiseMLP
from l2l_fast.evaluate import Comparison, compare
from l2l_fast.meta import AdaptiveTrainer, MetaTrainer, train
from l2l_fast.mlp_optim import MLPOptimizer
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.optim import LSTMOptimizer

__all__ = [
    "AdaptiveMLP",
    "AdaptiveTrainer",
    "Comparison",
    "CoordinatewiseLSTM",
    "CoordinatewiseMLP",
    "LSTMOptimizer",
    "MLPOptimizer",
    "MetaTrainer",
    "__version__",
    "build_info",
    "compare",
    "data",
    "evaluate",
    "meta",
    "ops",
    "tasks",
    "train",
]
