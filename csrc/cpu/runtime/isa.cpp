#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pvdm {
namespace {

#define PVDM_QUOTED(isa, ...) #isa,
#define PVDM_MEMBER(isa, ...) Isa::isa,
constexpr const char* names[] = {PVDM_ISAS(PVDM_QUOTED)};
constexpr Isa all[] = {PVDM_ISAS(PVDM_MEMBER)};

#if defined(__x86_64__)
// Whether the CPU has AMX tiles and the kernel lets this process use them. Linux (from 5.16 on) withholds their 8 KB of
// state per thread until a process asks: ARCH_REQ_XCOMP_PERM, state number 18. Forked children inherit the permission.
bool have_tiles() {
#if defined(PVDM_AMX_STAND_IN)
  return true;
#elif defined(__linux__)
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

// A set that includes others needs all of them.
bool usable(const std::string& isa) {
  if (isa == "plain") return true;
  if (isa == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx512")
    return usable("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx512bf16") return usable("avx512") && __builtin_cpu_supports("avx512bf16");
  return isa == "amx" && usable("avx512bf16") && have_tiles();
}
#else
bool usable(const std::string& isa) { return isa == "plain"; }
#endif

Isa parse(const std::string& name) {
  for (Isa isa : all)
    if (name == isa_name(isa) && usable(name)) return isa;
  for (const char* known : {"plain", "avx2", "avx512", "avx512bf16", "amx"})
    if (name == known)
      throw std::invalid_argument("PVDM_FAST_CPU_ISA asks for " + name +
                                  ", which this CPU or its system does not have or this build leaves out: unset it.");
  throw std::invalid_argument("Unknown instruction set '" + name +
                              "': PVDM_FAST_CPU_ISA is plain, avx2, avx512, avx512bf16 or amx.");
}

Isa initial() {
  if (const char* asked = std::getenv("PVDM_FAST_CPU_ISA"); asked && *asked) return parse(asked);
  Isa best = Isa::plain;
  for (Isa isa : all)
    if (usable(isa_name(isa))) best = isa;
  return best;
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
    if (usable(isa_name(isa))) result.push_back(isa_name(isa));
  return result;
}

}  // namespace pvdm
