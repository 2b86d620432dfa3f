"""Prints what a build of the module depends on: its sources' hash, Python, torch, architecture. See gpu_build.sh.

python bench/gpu_key.py 9.0
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".h", ".cuh", ".cpp", ".cu")

digest = hashlib.sha256()
for path in [ROOT / "setup.py", ROOT / "bench" / "kernels.cu", *sorted((ROOT / "csrc").rglob("*"))]:
    if path.suffix in SUFFIXES or path.name == "setup.py":
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
print(digest.hexdigest()[:32], sysconfig.get_config_var("EXT_SUFFIX"), torch.__version__, f"sm {sys.argv[1]}")
