#include "isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace l2l {
namespace {

struct Isa {
  const char* name;
  const StepKernel<float>* step;
  const Kernels<float>* rest;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// AMX registers need Linux's leave, which then holds for every thread of the process.
bool may_use_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", &kAvx512.step, &kAvx512, has_avx512},
    {"avx2", &kAvx2.step, &kAvx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &kPortableFloat.step, &kPortableFloat, [] { return true; }},
};

// With the step's products in bfloat16: only for who asks.
const Isa kBFloat16[] = {
#if defined(__x86_64__)
    {"amx_bf16", &kAmxBf16, &kAvx512,
     [] {
       return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
              may_use_amx();
     }},
    {"avx512_bf16", &kAvx512Bf16, &kAvx512, has_avx512_bf16},
#endif
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

template <size_t N>
std::vector<std::string> that_run(const Isa (&isas)[N]) {
  std::vector<std::string> names;
  for (const Isa& isa : isas)
    if (isa.runs_here()) names.push_back(isa.name);
  return names;
}

}  // namespace

std::vector<std::string> cpu_isas() { return that_run(kIsas); }

std::vector<std::string> cpu_bf16_isas() { return that_run(kBFloat16); }

std::string cpu_isa() { return current().load()->name; }

void use_cpu_isa(const std::string& name) {
  std::string known;
  auto use = [&](const Isa& isa) {
    known += std::string(known.empty() ? "" : ", ") + isa.name;
    if (name != isa.name) return false;
    if (!isa.runs_here()) throw std::runtime_error("this machine cannot run the instruction set '" + name + "'");
    current() = &isa;
    return true;
  };
  if (name == "bf16") {
    for (const Isa& isa : kBFloat16)
      if (isa.runs_here()) return void(current() = &isa);
    throw std::runtime_error("this machine has no instructions for products in bfloat16");
  }
  for (const Isa& isa : kIsas)
    if (use(isa)) return;
  for (const Isa& isa : kBFloat16)
    if (use(isa)) return;
  throw std::invalid_argument("unknown instruction set '" + name + "'; this build has " + known);
}

int64_t multiply_adds(int64_t rounds) { return current().load()->rest->multiply_adds(rounds); }

template <>
const StepKernel<float>& current_step<float>() {
  return *current().load()->step;
}
template <>
const StepKernel<double>& current_step<double>() {
  return kPortableDouble.step;
}

template <>
const UnrollKernels<float>& current_unroll<float>() {
  return current().load()->rest->unroll;
}
template <>
const UnrollKernels<double>& current_unroll<double>() {
  return kPortableDouble.unroll;
}

}  // namespace l2l
