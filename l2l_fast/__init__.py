"""Learned LSTM optimizers at hand-designed speed."""

from l2l_fast import ops, tasks
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.optim import LSTMOptimizer

__all__ = ["CoordinatewiseLSTM", "LSTMOptimizer", "ops", "tasks"]
