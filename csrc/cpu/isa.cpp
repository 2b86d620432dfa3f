#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace l2l {
namespace {

struct Isa {
  const char* name;
  const Kernels<float>* kernels;
  bool (*runs_here)();
};

const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", &kAvx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &kPortableFloat, [] { return true; }},
};

const Isa* fastest() {
  const Isa* isa = kIsas;
  while (!isa->runs_here()) ++isa;
  return isa;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{fastest()};
  return isa;
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.runs_here()) names.push_back(isa.name);
  return names;
}

std::string cpu_isa() { return current().load()->name; }

void use_cpu_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : kIsas) {
    if (name == isa.name) {
      if (!isa.runs_here()) throw std::runtime_error("this machine cannot run the instruction set '" + name + "'");
      current() = &isa;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; this build has " + known);
}

template <>
const Kernels<float>& current_kernels<float>() {
  return *current().load()->kernels;
}

template <>
const Kernels<double>& current_kernels<double>() {
  return kPortableDouble;
}

}  // namespace l2l
