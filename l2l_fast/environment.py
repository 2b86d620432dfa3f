"""What a figure depends on besides the code: the machine and the versions."""

from __future__ import annotations

import datetime
import platform
import re
from pathlib import Path

import torch

from l2l_fast._version import __version__


def environment(device: torch.device | str) -> dict:
    """Facts of a measurement on a device, fit for JSON: versions, CPU, threads, device, date."""
    device = torch.device(device)
    return {
        "l2l_fast": __version__,
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The CPU's name, such as "AMD EPYC 9454"."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)  # which some architectures lack
    return found[1] if found else platform.processor() or platform.machine()
