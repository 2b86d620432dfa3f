"""What a build leaves behind: compiled modules of its own sources, or none."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here")


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_build_that_fails_leaves_no_module_of_an_earlier_one(tmp_path, inplace, required):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    earlier = [tmp_path / "lib" / "l2l_fast" / module, tmp_path / "l2l_fast" / module]
    for path in earlier:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"of other sources")
        os.utime(path, (2**31, 2**31))  # newer than every source
    (tmp_path / "l2l_fast" / "__init__.py").touch()
    (tmp_path / "l2l_fast" / "_version.py").write_text('__version__ = "0"\n')
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    run = subprocess.run(
        [*command, "--inplace"] if inplace else command,
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"CXX": "/bin/false", "CC": "/bin/false", "FORCE_ONLY_CPU": "1",
                          "L2L_FAST_REQUIRE_EXT": str(int(required))},
    )  # fmt: skip
    assert (run.returncode != 0) == required, run.stderr
    assert not earlier[0].exists()
    assert earlier[1].exists() != inplace
    if not required:
        assert "compiled kernels were not built, so it will run on plain PyTorch" in run.stderr


def test_commits_are_checked_with_the_versions_of_the_test_suite():
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    (pinned,) = (each for each in tests if each.startswith("ruff=="))
    found = re.findall(r'"(ruff[^"]*)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert found == [pinned, pinned]
