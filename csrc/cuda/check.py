#!/usr/bin/env python3
"""Compiles every CUDA source for every GPU generation and reads from the assembler what each kernel takes.

    python csrc/cuda/check.py [--archs 8.0,9.0,10.0] [--update]

No GPU is needed, and torch may be a CPU build. The figures are held to resources.txt beside this file, which --update
writes anew; another nvcc than the one that wrote it may allocate otherwise, and then only the rule holds: the kernels
on the matrix units, at the paper's hidden size, spill no register and keep nothing in local memory. What is compiled is
kept in build/cuda-check.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import toolkit

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent
TABLE = HERE / "resources.txt"
CACHE = CSRC.parent / "build" / "cuda-check"
ARCHS = toolkit.DEFAULT_ARCHS.removesuffix("+PTX").split(";")
FAST = re.compile(r"matrix_.*[< ]5[,>]")  # of hidden size 20, the paper's: they must stay in registers


class Use(NamedTuple):
    """What one kernel takes on one architecture."""

    registers: int  # a thread
    shared: int  # bytes a block, those known when it is compiled; launchers add their dynamic ones
    stack: int  # bytes of local memory a thread
    stores: int  # bytes spilled, and
    loads: int  # read back

    def __str__(self) -> str:
        return " ".join(map(str, self))


# ---------------------------------------------------------------- compiling


def run(command: list) -> str:
    """What a compiler says; a CalledProcessError carries it when it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def kept(key: list, make) -> str:
    """The text that ``make()`` returns, or that it returned when nothing in csrc was different."""
    digest = hashlib.sha256(repr(list(map(str, key))).encode())
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp") and (path.parent == CSRC or HERE in path.parents):
            digest.update(path.read_bytes())
    place = CACHE / f"{digest.hexdigest()[:32]}.txt"
    if not place.exists():
        text = make()
        CACHE.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return place.read_text()


def assemble(cuda: toolkit.Toolkit, source: Path, arch: str) -> str:
    """The assembler's report; for the first architecture the host's part is compiled too."""
    number = arch.replace(".", "")
    command = [cuda.nvcc, "-std=c++17", *toolkit.NVCC_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}"]
    command += ["-Xptxas", "-v", "-c" if arch == ARCHS[0] else "-cubin", source, "-o", os.devnull]
    return kept([cuda.version, *command], lambda: run(command))


def compile_host(cuda: toolkit.Toolkit, source: Path) -> str:
    """Against the headers of the torch that is installed."""
    from torch.utils import cpp_extension

    includes = [cuda.home / "include", *cpp_extension.include_paths()]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", "-Wall", "-Wno-psabi"]
    command += [*(f"-isystem{folder}" for folder in includes), source]
    return kept(command, lambda: run(command))


# ---------------------------------------------------------------- reading


def readable(names: list[str], cuda: toolkit.Toolkit) -> list[str]:
    """Kernels as the sources name them: no return type, parameters or namespaces."""
    filters = [shutil.which("cu++filt", path=str(cuda.nvcc.parent)), shutil.which("c++filt")]
    program = next(filter(None, filters), None)
    if program is None:
        raise RuntimeError("neither cu++filt nor c++filt is there to make names readable")
    text = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [shorten(line) for line in text.splitlines()]


def shorten(name: str) -> str:
    name = re.sub(r"l2l::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void |\((?:int|bool|long)\)", "", name)
    name = name.replace("> >", ">>")
    depth = 0  # of angle brackets: the parameters open outside them
    for position, sign in enumerate(name):
        depth += (sign == "<") - (sign == ">")
        if sign == "(" and depth == 0:
            return name[:position]
    return name


def read(report: str) -> dict[str, Use]:
    """Mangled names, and what nvcc -Xptxas -v says of them."""
    found = {}
    for part in re.split(r"(?=Compiling entry function)", report)[1:]:
        name = re.match(r"Compiling entry function '(\w+)'", part)[1]
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part)[1]
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = Use(int(registers), int(shared[1]) if shared else 0, int(stack), int(stores), int(loads))
    return found


def measure(cuda: toolkit.Toolkit, archs: list[str], jobs: int) -> dict[tuple[str, str], Use]:
    """By (source: kernel, architecture), all sources compiled; raises RuntimeError with what a compiler says."""
    sources = sorted(HERE.glob("*.cu"))
    pairs = [(source, arch) for source in sources for arch in archs]
    found = {}
    with ThreadPoolExecutor(jobs) as pool:
        hosts = pool.map(lambda source: compile_host(cuda, source), sorted(HERE.glob("*.cpp")))
        reports = pool.map(lambda pair: assemble(cuda, *pair), pairs)
        for (source, arch), report in zip(pairs, reports, strict=True):
            uses = read(report)
            names = readable(list(uses), cuda) if uses else []
            for name, use in zip(names, uses.values(), strict=True):
                found[f"{source.name}: {name}", f"sm_{arch.replace('.', '')}"] = use
        list(hosts)
    return found


# ---------------------------------------------------------------- the table


def write_table(found: dict[tuple[str, str], Use], version: str) -> str:
    archs = sorted({arch for _, arch in found}, key=lambda arch: int(arch[3:]))
    lines = [["registers, shared, stack, spill stores, spill loads", *archs]]
    for kernel in sorted({kernel for kernel, _ in found}):
        lines.append([kernel, *(str(found.get((kernel, arch), "-")) for arch in archs)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"# nvcc {version}; written by python csrc/cuda/check.py --update", *rows]) + "\n"


def read_table(text: str) -> tuple[str, dict[tuple[str, str], Use]]:
    """The nvcc that wrote it, and its figures."""
    first, header, *rows = text.splitlines()
    archs = re.findall(r"sm_\d+", header)
    found = {}
    for row in rows:
        kernel, *cells = re.split(r"  +", row)
        for arch, cell in zip(archs, cells, strict=True):
            if cell != "-":
                found[kernel, arch] = Use(*map(int, cell.split()))
    return re.search(r"nvcc ([\d.]+)", first)[1], found


def problems(found: dict, held: dict | None) -> list[str]:
    """What breaks the rule, and what differs from the table where there is one to hold to."""
    said = []
    for (kernel, arch), use in found.items():
        if FAST.match(kernel) and (use.stack or use.stores or use.loads):
            said.append(f"{kernel} on {arch}: {use.stack} bytes of stack, {use.stores} spilled, {use.loads} read back")
    if held is None:
        return said
    archs = {arch for _, arch in found}
    for key in dict.fromkeys([*held, *found]):
        if key[1] in archs and held.get(key) != found.get(key):
            said.append(f"{key[0]} on {key[1]}: {held.get(key, 'not')} in the table, now {found.get(key, 'gone')}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default=",".join(ARCHS), help="which, separated by commas (default: all)")
    parser.add_argument("--update", action="store_true", help="write the table anew")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    arguments = parser.parse_args()
    cuda = toolkit.find()
    if cuda is None:
        print("no CUDA toolkit: nvcc is neither in CUDA_HOME nor on PATH", file=sys.stderr)
        return 2
    archs = arguments.archs.split(",")
    missing = [arch for arch in archs if arch not in cuda.archs]
    archs = [arch for arch in archs if arch not in missing]
    if missing:
        print(f"nvcc {cuda.version} cannot compile for {', '.join(missing)}", file=sys.stderr)
    try:
        found = measure(cuda, archs, arguments.jobs)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    table = write_table(found, cuda.version)
    print(table, end="")
    if arguments.update:
        TABLE.write_text(table)
    version, held = read_table(TABLE.read_text()) if TABLE.exists() else (None, {})
    if version != cuda.version:
        print(f"{TABLE.name} was written by nvcc {version}: only the rule is checked", file=sys.stderr)
        held = None
    said = problems(found, held)
    print("\n".join(said), file=sys.stderr, end="\n" if said else "")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
