"""Where a run was made: a number without this is not a benchmark."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import cases
from l2l_fast import build_info
from l2l_fast.environment import cpu_model


def describe(arguments: list[str]) -> dict:
    """Facts of the machine and the run; no host name and no folder of this machine."""
    info = build_info()
    if cases.device.type == "cuda":
        return {**_gpu(info), **_host(arguments), "kernels": _cuda_kernels(info)}
    return {**_host(arguments), "kernels": f"native {info['cpu_isa']}" if info["native"] else "reference"}


def _cuda_kernels(info: dict) -> str:
    major, minor = torch.cuda.get_device_capability(cases.device)
    return f"cuda sm_{major}{minor}" if info["cuda"] else "reference"


def _gpu(info: dict) -> dict:
    facts = torch.cuda.get_device_properties(cases.device)
    return {
        "gpu": facts.name,
        "gpu_memory_gib": round(facts.total_memory / 2**30, 1),
        "gpu_multiprocessors": facts.multi_processor_count,
        "gpu_capability": f"sm_{facts.major}{facts.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cuda_archs": info["cuda_archs"],
        "nvcc": info["cuda_version"],
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _host(arguments: list[str]) -> dict:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m pytest", *map(_plain, arguments)]),
    }


def _plain(argument: str) -> str:
    """The argument, a folder outside the checkout left out."""
    option, separator, value = argument.rpartition("=")
    value = Path(value).name if os.path.isabs(value) else value
    return option + separator + value
