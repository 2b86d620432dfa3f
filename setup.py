"""Builds the compiled kernels, l2l_fast._C; everything else about the package is in pyproject.toml.

Install with ``pip install --no-build-isolation .``, so that the kernels are built against the torch that is there.

    L2L_FAST_REQUIRE_EXT=1   fail when the kernels cannot be built; without it the package is installed without them
"""

import os
import warnings
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
SOURCES = ["csrc/module.cpp", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))]


class OptionalBuildExtension(BuildExtension):
    """Goes on without the kernels when they cannot be built, with one clear warning."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("L2L_FAST_REQUIRE_EXT") == "1":
                raise
            self.extensions = []  # nothing for the steps that follow to copy
            warnings.warn(
                "l2l_fast's compiled kernels were not built, so it will run on plain PyTorch, many times slower: "
                f"{error}\nSet L2L_FAST_REQUIRE_EXT=1 to make this an error.",
                stacklevel=1,
            )


setup(
    ext_modules=[
        CppExtension(
            "l2l_fast._C",
            SOURCES,
            # The intrinsics' own headers trip the two warnings.
            extra_compile_args=[
                "-O3",
                "-Wno-maybe-uninitialized",
                "-Wno-psabi",
                f'-DL2L_TORCH_VERSION="{torch.__version__}"',
            ],
        )
    ],
    cmdclass={"build_ext": OptionalBuildExtension},
)
