"""What was compiled, what runs, and why not."""

from __future__ import annotations

import torch


def build_info() -> dict:
    """Facts of the compiled part."""
    return {"native": False, "cpu_isa": None, "cuda": False, "cuda_archs": [], "torch": torch.__version__,
            "reason": "this version has no compiled kernels"}  # fmt: skip
