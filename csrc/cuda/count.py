#!/usr/bin/env python3
"""Counts the instructions of compiled CUDA kernels, by kind: what docs/kernels.md compares before and after a change.

    python csrc/cuda/count.py OBJECT... [--kernel REGEX]        such as --kernel 'step_by_teams<5, float'

OBJECT is an object file, an executable or a module with CUDA kernels in it. cuobjdump comes with a CUDA toolkit, and
with triton's wheel. Counts are of the program text, so a loop's body counts once. The exit status is 1 where a kernel
has an instruction that ptxas 13.0 is known to write wrongly.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import check
import toolkit

# A clamp to 0 .. n with a comparison that ptxas 13.0 has folded into it wrongly: see part() in matrix_state.cuh.
MISCOMPILED = re.compile(r"VIMNMX\.RELU R\d+, (U?P\d), \1,")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def cuobjdump() -> str:
    """The program; raises FileNotFoundError where there is none."""
    found = shutil.which("cuobjdump")
    cuda = toolkit.find()
    if found is None and cuda:
        found = shutil.which("cuobjdump", path=str(cuda.home / "bin"))
    if found is None and (triton := importlib.util.find_spec("triton")):
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        raise FileNotFoundError("cuobjdump is neither on PATH nor in the CUDA toolkit nor in a triton wheel")
    return found


def kernels(path: Path) -> dict[str, Counter]:
    """By kernel, as the sources name it: how often each instruction occurs; MISCOMPILED counts under its own name."""
    run = subprocess.run([cuobjdump(), "-sass", path], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s*Function : ", run.stdout, flags=re.MULTILINE)[1:]
    names = subprocess.run(
        ["c++filt"], input="\n".join(part.split()[0] for part in parts), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = {}
    for name, part in zip(names, parts, strict=True):
        found[check.shorten(name)] = counts = Counter(INSTRUCTION.findall(part))
        if wrong := len(MISCOMPILED.findall(part)):
            counts["MISCOMPILED"] = wrong
    return found


def summary(counts: Counter) -> str:
    """All, then the kinds that decide how long a kernel takes."""
    kinds = {
        "HMMA": "HMMA", "FFMA": "FFMA", "other float": r"F(ADD|MUL|MNMX|SEL|SETP)", "MUFU": "MUFU", "F2FP": "F2FP",
        "integer": "(I|U?IMAD|U?IADD|ISETP|LOP|U?LEA|SHF|PRMT|SEL|MOV|UMOV)", "LDG": "LDG", "STG": "STG", "LDS": "LDS",
        "STS": "STS", "LDGSTS": "LDGSTS", "SHFL": "SHFL", "local": "(LDL|STL)",
    }  # fmt: skip
    parts = [f"all {counts.total()}"]
    for name, pattern in kinds.items():
        number = sum(n for op, n in counts.items() if re.match(pattern + r"(\.|[0-9]|$|_)", op) or op == pattern)
        if number:
            parts.append(f"{name} {number}")
    return ", ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", nargs="+", type=Path, metavar="OBJECT")
    parser.add_argument("--kernel", default="", help="only those whose name this regular expression finds")
    arguments, wrong = parser.parse_args(), False
    for path in arguments.objects:
        for name, counts in sorted(kernels(path).items()):
            if re.search(arguments.kernel, name):
                print(f"{path.name}: {name}\n    {summary(counts)}")
            if counts["MISCOMPILED"]:
                print(f"{path.name}: {name} has {counts['MISCOMPILED']} clamps that are miscompiled", file=sys.stderr)
                wrong = True
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
