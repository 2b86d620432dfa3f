"""Sweeps and searches over options of meta-training, by workers that share a database."""

from l2l_fast.studies.sweeps import Point, Range, Sweep, Swept, sweep

__all__ = ["Point", "Range", "Sweep", "Swept", "sweep"]
