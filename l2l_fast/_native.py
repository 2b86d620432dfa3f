"""Loads the compiled kernels and remembers why it could not.

Import it after :mod:`l2l_fast.ops`, which defines the operators that the kernels are registered for.

    L2L_FAST_NATIVE=0       do not load them: the reference runs instead
    L2L_FAST_CPU_ISA=NAME   instruction set of the CPU kernels: avx512, avx2 or portable; by default the fastest that
                            runs here. bf16: avx512 with the step's products in bfloat16, amx_bf16 or else
                            avx512_bf16, which can also be named
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch


def _load():
    """The extension module, or None, and the reason for None."""
    if os.environ.get("L2L_FAST_NATIVE") == "0":
        return None, "switched off by L2L_FAST_NATIVE=0"
    if importlib.util.find_spec("l2l_fast._C") is None:
        return None, "not built: install with a C++ compiler and pip's --no-build-isolation"
    try:
        from l2l_fast import _C
    except ImportError as error:
        reason = f"built, but cannot be loaded: {error}"
        warnings.warn(f"l2l_fast runs on plain PyTorch, many times slower. Its kernels are {reason}", stacklevel=3)
        return None, reason
    if "L2L_FAST_CPU_ISA" in os.environ:
        _C.use_cpu_isa(os.environ["L2L_FAST_CPU_ISA"])
    return _C, None


extension, _reason = _load()


def build_info() -> dict:
    """What was built, what runs, and why not.

    Returns:
        ``native`` (whether compiled kernels run), ``cpu_isa`` (the instruction set in use, or None), ``cuda`` (whether
        there are CUDA kernels), ``cuda_archs`` (those they were built for), ``torch`` (the version they were built
        with, or else the one that runs), ``reason`` (why there are none, or None).

    Example:
        >>> from l2l_fast._native import build_info
        >>> sorted(build_info())
        ['cpu_isa', 'cuda', 'cuda_archs', 'native', 'reason', 'torch']
    """
    return {
        "native": extension is not None,
        "cpu_isa": extension.cpu_isa() if extension else None,
        "cuda": False,
        "cuda_archs": [],
        "torch": extension.torch_version if extension else torch.__version__,
        "reason": _reason,
    }
