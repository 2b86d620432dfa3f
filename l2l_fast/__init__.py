"""Learned LSTM optimizers at hand-designed speed."""

from l2l_fast import meta, ops, tasks
from l2l_fast._native import build_info
from l2l_fast.meta import MetaTrainer
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.optim import LSTMOptimizer

__all__ = ["CoordinatewiseLSTM", "LSTMOptimizer", "MetaTrainer", "build_info", "meta", "ops", "tasks"]
