#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pvdm {
namespace {

constexpr const char* names[] = {"plain", "avx2", "avx512", "avx512bf16"};
constexpr Isa all[] = {Isa::plain, Isa::avx2, Isa::avx512, Isa::avx512bf16};

bool usable(Isa isa) {
  switch (isa) {
    case Isa::plain:
      return true;
    case Isa::avx2:
#ifdef PVDM_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::avx512bf16:
#ifdef PVDM_HAVE_AVX512BF16
      return __builtin_cpu_supports("avx512bf16") && usable(Isa::avx512);
#else
      return false;
#endif
    case Isa::avx512:
#ifdef PVDM_HAVE_AVX512
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && usable(Isa::avx2);
#else
      return false;
#endif
  }
  return false;
}

Isa parse(const std::string& name) {
  for (Isa isa : all) {
    if (name != isa_name(isa)) continue;
    if (usable(isa)) return isa;
    throw std::invalid_argument("PVDM_FAST_CPU_ISA asks for " + name +
                                ", which this CPU does not have or this build leaves out: unset it.");
  }
  throw std::invalid_argument("Unknown instruction set '" + name + "': PVDM_FAST_CPU_ISA is plain, avx2, avx512 or avx512bf16.");
}

Isa initial() {
  if (const char* asked = std::getenv("PVDM_FAST_CPU_ISA"); asked && *asked) return parse(asked);
  for (Isa isa : {Isa::avx512bf16, Isa::avx512, Isa::avx2})
    if (usable(isa)) return isa;
  return Isa::plain;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return names[static_cast<int>(isa)]; }
Isa current_isa() { return chosen().load(std::memory_order_relaxed); }
void set_isa(const std::string& name) { chosen().store(parse(name)); }

std::vector<std::string> usable_isas() {
  std::vector<std::string> result;
  for (Isa isa : all)
    if (usable(isa)) result.push_back(isa_name(isa));
  return result;
}

}  // namespace pvdm
