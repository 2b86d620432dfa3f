// Every torch header the extension uses: the LibTorch stable ABI alone, so that one build serves torch 2.11 and later.
#pragma once

// Here and not on the command line: torch 2.11's own pybind11 does not compile under it.
#define TORCH_TARGET_VERSION (((2ULL) << 56) | ((11ULL) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
