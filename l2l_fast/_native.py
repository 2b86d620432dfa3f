"""Loads the compiled kernels, for the operators of :mod:`l2l_fast.ops`, and remembers why it could not.

L2L_FAST_NATIVE=0       do not load them: the reference runs instead (also: false, no, off)
L2L_FAST_CPU_ISA=NAME   instruction set of the CPU kernels: avx512, avx2 or portable; by default the fastest that
                        runs here, and with a warning where NAME does not. bf16: avx512 with the step's products in
                        bfloat16, amx_bf16 or else avx512_bf16, which can also be named
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from l2l_fast import ops


def _load():
    """The extension module, or None, and the reason for None."""
    switch = os.environ.get("L2L_FAST_NATIVE", "")
    if switch.lower() in ("0", "false", "no", "off"):
        return None, f"switched off by L2L_FAST_NATIVE={switch}"
    here, spec = Path(__file__).parent, importlib.util.find_spec("l2l_fast._C")
    found = Path(getattr(spec, "origin", None) or here / "_C")
    # An editable install of another checkout offers its own, which was built from other sources.
    if spec is None or not found.parent.samefile(here):
        reason = _not_built(here, found)
    else:
        try:
            from l2l_fast import _C
        except ImportError as error:
            reason = f"built, but cannot be loaded: {error}"
        else:
            if getattr(_C, "ops_version", None) == ops.VERSION:
                _choose_isa(_C)
                return _C, None
            # Loading it was enough to register its kernels, which would read other arguments than they are given.
            ops.replace_kernels()
            reason = f"of other sources, in {found}: build them again, with python setup.py build_ext --inplace"
    # Said here, as pip keeps a build's own warning to itself.
    warnings.warn(
        f"l2l_fast runs on plain PyTorch, many times slower. Its kernels are {reason}; "
        "or set L2L_FAST_NATIVE=0 if this is meant",
        stacklevel=3,
    )
    return None, reason


def _not_built(here: Path, found: Path) -> str:
    modules = [found, *(Path(entry, here.name, f"_C{end}") for entry in sys.path for end in EXTENSION_SUFFIXES)]
    for module in modules:
        if module.exists() and not module.parent.samefile(here):
            return (
                f"not built in {here}, which Python finds before the installed package in {module.parent}, which has "
                "them: start Python in another folder, or build them here with python setup.py build_ext --inplace"
            )
    return "not built: install with a C++ compiler and pip's --no-build-isolation"


def _choose_isa(extension) -> None:
    wanted = os.environ.get("L2L_FAST_CPU_ISA")
    try:
        if wanted:
            extension.use_cpu_isa(wanted)
    except (RuntimeError, ValueError):  # not to raise lets `l2l-fast info` say what runs
        bf16 = extension.cpu_bf16_isas()
        here = ", ".join([*extension.cpu_isas(), *bf16, *["bf16"] * bool(bf16)])
        warnings.warn(
            f"L2L_FAST_CPU_ISA={wanted} does not run here, so {extension.cpu_isa()} does; this machine can run {here}",
            stacklevel=4,
        )


extension, _reason = _load()


def build_info() -> dict:
    """What was built, what runs, and why not.

    Returns:
        ``native`` (whether compiled kernels run), ``cpu_isa`` (the instruction set in use, or None), ``cuda`` (whether
        CUDA kernels are built in), ``cuda_archs`` (those they were built for: sm_90 is machine code, compute_90 code
        that the driver compiles for later GPUs), ``cuda_version`` (of the toolkit, or None), ``cuda_reason`` (why no
        CUDA kernel can run here, or None), ``torch`` (the version they were built with, or else the one that runs),
        ``reason`` (why there are no kernels at all, or None).

    Example:
        >>> from l2l_fast._native import build_info
        >>> sorted(build_info())
        ['cpu_isa', 'cuda', 'cuda_archs', 'cuda_reason', 'cuda_version', 'native', 'reason', 'torch']
    """
    return {
        "native": extension is not None,
        "cpu_isa": extension.cpu_isa() if extension else None,
        "cuda": extension is not None and extension.no_cuda is None,
        "cuda_archs": extension.cuda_archs.split() if extension else [],
        "cuda_version": extension.cuda_version if extension else None,
        "cuda_reason": _cuda_reason(),
        "torch": extension.torch_version if extension else torch.__version__,
        "reason": _reason,
    }


def no_kernel(device_type: str) -> str | None:
    """Why no compiled kernel runs on devices of a type, such as "cuda"; or None, where one does."""
    if device_type == "cpu":
        return _reason
    return _cuda_reason() if device_type == "cuda" else "there are none"


def _cuda_reason() -> str | None:
    if extension is None:
        return _reason
    if extension.no_cuda is not None:
        return extension.no_cuda
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"
