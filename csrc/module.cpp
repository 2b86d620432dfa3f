// l2l_fast._C: facts of the build and the choice of instruction set. Loading it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of l2l_fast; importing it registers them with torch.";
  module.def("cpu_isas", &l2l::cpu_isas, "Instruction sets this machine can run in float32 arithmetic, the fastest first.");
  module.def("cpu_bf16_isas", &l2l::cpu_bf16_isas, "Those with the step's products in bfloat16, the fastest first.");
  module.def("cpu_isa", &l2l::cpu_isa, "The instruction set in use.");
  module.def("use_cpu_isa", &l2l::use_cpu_isa, "Use this instruction set from now on.", pybind11::arg("name"));
  module.def(
      "multiply_adds", &l2l::multiply_adds, pybind11::arg("rounds"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Make float32 multiply-adds on registers alone and return how many: the ceiling that benches measure.");
  module.attr("ops_version") = 7;  // VERSION in l2l_fast/ops.py: of the arguments that the kernels take
  module.attr("torch_version") = L2L_TORCH_VERSION;
#ifdef L2L_NO_CUDA
  module.attr("cuda_version") = pybind11::none();
  module.attr("cuda_archs") = "";
  module.attr("no_cuda") = L2L_NO_CUDA;
#else
  module.attr("cuda_version") = L2L_CUDA_VERSION;
  module.attr("cuda_archs") = L2L_CUDA_ARCHS;
  module.attr("no_cuda") = pybind11::none();
#endif
}
