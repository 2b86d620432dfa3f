"""Every header of the kernels that knows nothing of torch can be read by itself, as a language server does."""

import platform
import subprocess
from pathlib import Path

import pytest
from compiled import COMPILER, ROOT

CSRC = ROOT / "csrc"
OF_TORCH = {"arguments.h", "ops.h", "stable.h"}
HEADERS = [path for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("cpu/*.h")]) if path.name not in OF_TORCH]
X86 = ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: str(path.relative_to(CSRC)))
def test_a_header_includes_what_it_uses(header):
    x86 = platform.machine() == "x86_64"
    if not x86 and header.name.startswith(("vec_avx", "product_")):
        pytest.skip("of another instruction set")
    command = [COMPILER, "-std=c++17", "-fsyntax-only", *(X86 if x86 else []), "-x", "c++", str(Path(header))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
