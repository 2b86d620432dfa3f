"""Where a run was made: a number without this is not a benchmark."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from l2l_fast import build_info


def describe(arguments: list[str]) -> dict:
    """Facts of the machine and the run; no host name and no folder of this machine."""
    info = build_info()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernels": f"native {info['cpu_isa']}" if info["native"] else "reference",
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m pytest", *map(_plain, arguments)]),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _plain(argument: str) -> str:
    """The argument, a folder outside the checkout left out."""
    option, separator, value = argument.rpartition("=")
    value = Path(value).name if os.path.isabs(value) else value
    return option + separator + value
