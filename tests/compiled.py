"""What tests compile is made once: it stays in build/tests under the hash of all that it is made of."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "tests"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
_SOURCES = (".c", ".cpp", ".cu", ".cuh", ".h")


def compiled(name: str, sources: list[Path], *flags: str, link: list[str]) -> Path:
    """A program or library of these sources, compiled side by side and linked; ``link`` has the linker's options."""
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    facts = [version, torch.__version__, str(ROOT), *map(str, sources), *flags, "--", *link]
    digest = hashlib.sha256("\0".join(facts).encode())
    for folder in (ROOT / "csrc", ROOT / "tests", ROOT / "bench"):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
            digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    out = KEPT / f"{name}-{digest.hexdigest()[:16]}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of tests in two processes one compiles and the other waits for it
        if not out.exists():
            for old in KEPT.glob(f"{name}-{'?' * 16}"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=KEPT) as place:
                os.replace(_build(Path(place), sources, flags, link), out)
    return out


def _build(place: Path, sources: list[Path], flags: tuple[str, ...], link: list[str]) -> Path:
    jobs = {}
    for source in sources:
        target = place / f"{source.name}.o"
        command = [COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        jobs[target] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    failures = [job.communicate()[1] for job in jobs.values()]
    assert not any(job.returncode for job in jobs.values()), "\n".join(failures)
    linking = [flag for flag in flags if flag.startswith("-f")]
    subprocess.run([COMPILER, *linking, *map(str, jobs), "-o", str(place / "out"), *link], check=True)
    return place / "out"
