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
  const Kernels<float>* kernels;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

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
    {"avx512", &kAvx512, has_avx512},
    {"avx2", &kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &kPortableFloat, [] { return true; }},
};

// In bfloat16: only for who asks by name.
const Isa kOptIn[] = {
#if defined(__x86_64__)
    {"amx_bf16", &kAmxBf16,
     [] {
       return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
              __builtin_cpu_supports("amx-bf16") && may_use_amx();
     }},
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
  auto use = [&](const Isa& isa) {
    known += std::string(known.empty() ? "" : ", ") + isa.name;
    if (name != isa.name) return false;
    if (!isa.runs_here()) throw std::runtime_error("this machine cannot run the instruction set '" + name + "'");
    current() = &isa;
    return true;
  };
  for (const Isa& isa : kIsas)
    if (use(isa)) return;
  for (const Isa& isa : kOptIn)
    if (use(isa)) return;
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
