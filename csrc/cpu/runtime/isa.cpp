#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#if defined(PVDM_HAVE_AMX) && !defined(PVDM_AMX_STAND_IN)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pvdm {
namespace {

constexpr const char* names[] = {"plain", "avx2", "avx512", "avx512bf16", "amx"};
constexpr Isa all[] = {Isa::plain, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx};

#ifdef PVDM_HAVE_AMX
#ifdef PVDM_AMX_STAND_IN
bool have_tiles() { return true; }
#else
// Whether the CPU has tiles and the kernel lets this process use them: Linux keeps their 8 KB a thread back until asked
// (ARCH_REQ_XCOMP_PERM, for the state of number 18).
bool have_tiles() {
#ifdef __linux__
  static const bool have = [] {
    unsigned a, b, c, d = 0;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile) &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return have;
#else
  return false;
#endif
}
#endif
#endif

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
    case Isa::amx:
#ifdef PVDM_HAVE_AMX
      return usable(Isa::avx512bf16) && have_tiles();
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
                                ", which this CPU or its system does not have or this build leaves out: unset it.");
  }
  throw std::invalid_argument("Unknown instruction set '" + name +
                              "': PVDM_FAST_CPU_ISA is plain, avx2, avx512, avx512bf16 or amx.");
}

Isa initial() {
  if (const char* asked = std::getenv("PVDM_FAST_CPU_ISA"); asked && *asked) return parse(asked);
  // amx has to be asked for: no CPU with it has run it yet.
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
