"""Builds the compiled kernels, l2l_fast._C; everything else about the package is in pyproject.toml.

Install with ``pip install --no-build-isolation .``, so that the kernels are built against the torch that is there. CUDA
kernels are built in where torch is a CUDA build and there is a CUDA toolkit; a GPU is not needed.

    L2L_FAST_REQUIRE_EXT=1   fail when kernels cannot be built; without it the package is installed without them
    FORCE_CUDA=1             build the CUDA kernels or fail, whatever torch was built for
    FORCE_ONLY_CPU=1         build the CPU kernels alone
    TORCH_CUDA_ARCH_LIST     GPUs to build for, such as "8.0;9.0+PTX"; default: Ampere, Hopper, Blackwell and PTX
    CUDA_HOME                the CUDA toolkit; default: that of the nvcc on PATH
    MAX_JOBS                 files compiled at a time
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import toolkit  # noqa: E402

REQUIRED = os.environ.get("L2L_FAST_REQUIRE_EXT") == "1"
FORCE_CUDA = os.environ.get("FORCE_CUDA") == "1"
FORCE_ONLY_CPU = os.environ.get("FORCE_ONLY_CPU") == "1"


def sources(folder: str, *endings: str) -> list[str]:
    found = [path for ending in endings for path in (ROOT / "csrc" / folder).glob(f"*{ending}")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def choose_cuda() -> tuple[toolkit.Toolkit | None, str | None]:
    """The toolkit to build CUDA kernels with; or None, and why there will be none."""
    if FORCE_ONLY_CPU:
        if FORCE_CUDA:
            sys.exit("FORCE_CUDA=1 and FORCE_ONLY_CPU=1 contradict each other")
        return None, "built with FORCE_ONLY_CPU=1"
    wanted, found = torch.version.cuda, toolkit.find()
    if wanted is None and not FORCE_CUDA:
        return None, f"built where torch, {torch.__version__}, has no CUDA"
    if found is None:
        reason = "built without a CUDA toolkit: nvcc was neither in CUDA_HOME nor on PATH"
        unmet = FORCE_CUDA
    elif wanted and wanted.split(".")[0] != found.version.split(".")[0]:
        reason = f"torch is built for CUDA {wanted} and the toolkit is CUDA {found.version}: the majors must agree"
        unmet = FORCE_CUDA or REQUIRED
    else:
        return found, None
    if unmet:
        sys.exit(f"l2l_fast's CUDA kernels cannot be built: {reason}\nFORCE_ONLY_CPU=1 builds the CPU kernels alone.")
    warnings.warn(f"l2l_fast gets no CUDA kernels: {reason}", stacklevel=1)
    return None, reason


def extension(cuda: toolkit.Toolkit | None, cuda_reason: str | None) -> Extension:
    """The module, with CUDA kernels in it or not."""
    cxx = ["-O3", "-Wno-maybe-uninitialized", "-Wno-psabi"]  # the intrinsics' own headers trip the two warnings
    cxx.append(f'-DL2L_TORCH_VERSION="{torch.__version__}"')
    files = ["csrc/module.cpp", *sources("cpu", ".cpp")]
    if cuda is None:
        cxx.append(f'-DL2L_NO_CUDA="{cuda_reason}"')
        return cpp_extension.CppExtension("l2l_fast._C", files, extra_compile_args={"cxx": cxx})
    pairs = toolkit.gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or toolkit.default_archs(cuda))
    cxx += [f'-DL2L_CUDA_VERSION="{cuda.version}"', f'-DL2L_CUDA_ARCHS="{" ".join(code for _, code in pairs)}"']
    threads = min(len(pairs), os.cpu_count() or 1)  # architectures of one file at a time
    nvcc = [*toolkit.NVCC_FLAGS, f"--threads={threads}"]
    nvcc += [f"-gencode=arch={virtual},code={code}" for virtual, code in pairs]
    cpp_extension.CUDA_HOME = str(cuda.home)  # torch looks on PATH, where a wrapper would mislead it
    # Not CUDAExtension: that links libtorch_cuda and libcudart, without which the CPU kernels would not load either
    # under a torch without CUDA. The runtime is linked in; csrc/cuda/stream.cpp finds what is needed of torch's.
    return cpp_extension.CppExtension(
        "l2l_fast._C",
        [*files, *sources("cuda", ".cpp", ".cu")],
        include_dirs=[str(cuda.home / "include")],
        library_dirs=[str(cuda.home / folder) for folder in ("lib64", "lib")],  # the second in a toolkit from pip
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
    )


class OptionalBuildExtension(cpp_extension.BuildExtension):
    """Goes on without the CUDA kernels, then without any, when they cannot be built, with one clear warning."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # setuptools knows neither the headers nor the options that what is there was built from

    def discard(self, inplace: bool) -> None:
        """Remove the modules of earlier builds, which are not of these sources and would be packed all the same."""
        for self.inplace in {False, bool(inplace)}:
            for module in self.extensions:
                Path(self.get_ext_fullpath(module.name)).unlink(missing_ok=True)

    def run(self) -> None:
        inplace = self.inplace
        try:
            super().run()
            return
        except Exception as error:
            self.discard(inplace)
            if REQUIRED or (CUDA and FORCE_CUDA):
                raise
            failure = error
        if CUDA:
            reason = "the CUDA kernels did not compile"
            warnings.warn(f"l2l_fast gets its CPU kernels alone, because {reason}: {failure}", stacklevel=1)
            self.inplace, self.compiler = inplace, None  # the first run has left its own there
            for module in self.extensions:
                plain = extension(None, reason)
                for name in ("sources", "include_dirs", "library_dirs", "libraries", "extra_compile_args"):
                    setattr(module, name, getattr(plain, name))
            try:
                super().run()
                return
            except Exception as error:
                failure = error
        self.extensions = []  # nothing for the steps that follow to copy
        warnings.warn(
            "l2l_fast's compiled kernels were not built, so it will run on plain PyTorch, many times slower: "
            f"{failure}\nSet L2L_FAST_REQUIRE_EXT=1 to make this an error.",
            stacklevel=1,
        )


CUDA, CUDA_REASON = choose_cuda()
setup(ext_modules=[extension(CUDA, CUDA_REASON)], cmdclass={"build_ext": OptionalBuildExtension})
