"""Data sets that tasks draw minibatches from: the embedded digits and MNIST. Nothing is read before it is asked for."""

from l2l_fast.data.dataset import HALVES, Dataset, halves
from l2l_fast.data.digits import digits
from l2l_fast.data.idx import read_idx
from l2l_fast.data.mnist import mnist

__all__ = ["HALVES", "Dataset", "digits", "halves", "mnist", "read_idx"]
