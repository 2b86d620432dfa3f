#!/usr/bin/env python3
"""Counts the instructions that a warp makes for 32 coordinates on each rung, from the compiled code.

    python bench/ladder/instructions.py [--arch 90]        after make in this folder; needs cuobjdump

A rung's loops over units are found in its code by their exponentials. Their bodies count as often as they run, the rest
of the loop over coordinates once; loading the weights, which a block does once for all, does not count.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import count  # noqa: E402

# By kernel, in the order of the rungs: coordinates of a thread, how often a loop over units runs.
KERNELS = {
    "naive": (1, 20),
    "rows": (1, 20),
    "shared": (1, 20),
    "several<2>": (2, 20),
    "several<4>": (4, 20),
    "matrix": (1, 5),
}
KINDS = {"FFMA": "FFMA", "HMMA": "HMMA", "LDG": "LDG", "LDS": "LDS", "MUFU": "MUFU"}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)


def loops(code: list[tuple[int, str, str]]) -> list[range]:
    """Places from where a branch leads back to, to that branch."""
    place, found = {address: i for i, (address, _, _) in enumerate(code)}, []
    for i, (_, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and place.get(int(target[1], 16), i) < i:
            found.append(range(place[int(target[1], 16)], i + 1))
    return found


def inside(span: range, other: range) -> bool:
    return span != other and other.start <= span.start and span.stop <= other.stop


def executed(code: list[tuple[int, str, str]], each: int, trips: int) -> Counter:
    """Instructions of a warp for 32 coordinates."""
    found = loops(code)
    units = [span for span in found if sum(code[i][1].startswith("MUFU") for i in span) >= 7]
    units = [span for span in units if not any(inside(other, span) for other in found)]
    around = [span for span in found if all(inside(unit, span) for unit in units)]
    often = Counter()
    for i in around[0] if around else range(len(code)):
        often[code[i][1]] += trips if any(i in unit for unit in units) else 1
    return Counter({name: number / each for name, number in often.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90", help="80 or 90")
    arguments = parser.parse_args()
    print("| rung | all | " + " | ".join(KINDS) + " |\n|---" * 1 + "|---" * (len(KINDS) + 1) + "|")
    for path in sorted(path for path in (ROOT / "build" / "ladder").glob("[0-9]_*") if not path.suffix):
        command = [count.cuobjdump(), "-sass", "-arch", f"sm_{arguments.arch}", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
            mangled = part.split()[0]
            name = next(name for name in KERNELS if re.match(r"_Z\d+" + re.sub(r"<(\d)>", r"ILi\1E", name), mangled))
            code = [(int(address, 16), *rest) for address, *rest in INSTRUCTION.findall(part)]
            often = executed(code, *KERNELS[name])
            kinds = [sum(n for op, n in often.items() if op.startswith(kind)) for kind in KINDS.values()]
            print(f"| {path.name}: {name} | {often.total():,.0f} | " + " | ".join(f"{n:,.0f}" for n in kinds) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
