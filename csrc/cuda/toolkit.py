"""Finds the CUDA toolkit and what it can build for; used by setup.py and by check.py. Nothing here looks for a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cached_property
from pathlib import Path

DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
NVCC_FLAGS = ["-O3", "-lineinfo", "--expt-relaxed-constexpr"]  # the last: std::min and the like on the device


class Toolkit:
    """A CUDA toolkit's folder.

    Args:
        nvcc: its compiler, or a wrapper of it.

    Raises:
        OSError: it cannot be run.
        ValueError: it does not say where it is.
    """

    def __init__(self, nvcc: str | Path) -> None:
        # A wrapper stands in another folder than the toolkit; what it starts knows its own.
        dry = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", dry.stderr + dry.stdout, re.MULTILINE)
        if top is None:
            raise ValueError(f"{nvcc} -dryrun names no toolkit folder")
        self.home = Path(top[1].strip()).resolve()
        self.nvcc = self.home / "bin" / "nvcc"

    @cached_property
    def version(self) -> str:
        """Such as "13.0"."""
        return re.search(r"release (\d+\.\d+)", self._ask("--version"))[1]

    @cached_property
    def archs(self) -> list[str]:
        """What it compiles for: "8.0", "9.0", ..."""
        return [f"{number[:-1]}.{number[-1]}" for number in re.findall(r"compute_(\d+)", self._ask("--list-gpu-arch"))]

    def _ask(self, option: str) -> str:
        return subprocess.run([self.nvcc, option], capture_output=True, text=True, check=True).stdout


def find() -> Toolkit | None:
    """The toolkit of CUDA_HOME or CUDA_PATH, else of the nvcc on PATH, else of /usr/local/cuda."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(folder) / "bin" / "nvcc" for folder in folders if folder]
    found += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in found:
        if nvcc and os.access(nvcc, os.X_OK):
            try:
                return Toolkit(nvcc)
            except (OSError, ValueError):
                continue
    return None


def gencode(archs: str) -> list[tuple[str, str]]:
    """Pairs such as ("compute_90", "sm_90") of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0+PTX".

    Raises:
        ValueError: an entry that is no number, such as torch's names of generations.
    """
    pairs = []
    for entry in archs.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {entry!r}: give numbers, such as {DEFAULT_ARCHS!r}")
        number = match[1] + match[2]
        pairs.append((f"compute_{number}", f"sm_{number}"))
        if match[3]:
            pairs.append((f"compute_{number}", f"compute_{number}"))
    return list(dict.fromkeys(pairs))


def default_archs(toolkit: Toolkit) -> str:
    """DEFAULT_ARCHS without what this toolkit is too old or too new for; PTX for whatever comes later."""
    known = [arch for arch in DEFAULT_ARCHS.removesuffix("+PTX").split(";") if arch in toolkit.archs]
    return ";".join(known or toolkit.archs[-1:]) + "+PTX"
