"""``l2l-fast info``: what is installed, what was compiled, what runs."""

from __future__ import annotations

import os

import torch

from l2l_fast._native import build_info
from l2l_fast._version import __version__
from l2l_fast.checkpoint import shipped
from l2l_fast.cli.options import Json, report
from l2l_fast.networks import CoordinatewiseLSTM


def info(as_json: Json = False) -> None:
    """Say what was built, what runs, and why not.

    \b
    Examples:
        l2l-fast info
        l2l-fast info --json
    """
    facts = {
        "l2l_fast": __version__,
        **build_info(),
        "threads": torch.get_num_threads(),
        "cuda_device": _cuda_device(),
        "shipped_networks": shipped(),
        "their_steps": {name: _rule(CoordinatewiseLSTM.from_pretrained(name)) for name in shipped()},
        "data_folder": os.environ.get("L2L_FAST_DATA"),
    }
    width = max(map(len, facts))
    report(facts, "\n".join(f"{name:<{width}}  {_plain(value)}" for name, value in facts.items()), as_json)


def _rule(network: CoordinatewiseLSTM) -> str:
    """How a network's lr is meant, such as "update_rms 0.2 to 1, lr 0.001 unless given"."""
    size = "steps of its own size" if network.update_rms is None else f"update_rms {network.update_rms:g}"
    if network.max_update_rms is not None:
        size += f" to {network.max_update_rms:g}"
    path = ", with a linear path" if network.config.linear_path else ""
    return f"{size}, lr {network.default_lr:g} unless given{path}"


def _cuda_device() -> str | None:
    """Such as "NVIDIA H100 (sm_90)"."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {what}" for name, what in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
