"""Data sets that tasks draw minibatches from: the embedded digits and MNIST. Nothing is read before it is asked for."""

from .dataset import HALVES, Dataset, halves
from .digits import digits
from .idx import read_idx
from .mnist import mnist

__all__ = ["HALVES", "Dataset", "digits", "halves", "mnist", "read_idx"]
