from l2l_fast.meta.adaptive import AdaptiveTrainer
from l2l_fast.meta.curricula import Horizon, LogUniform, Staged
from l2l_fast.meta.recipes import Trained, train
from l2l_fast.meta.run import History
from l2l_fast.meta.trainer import MetaTrainer

__all__ = ["AdaptiveTrainer", "History", "Horizon", "LogUniform", "MetaTrainer", "Staged", "Trained", "train"]
