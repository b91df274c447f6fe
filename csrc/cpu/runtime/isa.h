// Instruction sets: every csrc/cpu/*.cpp is compiled once for each, into a namespace of that name; for amx only what
// multiplies by tiles is, and the rest is borrowed from avx512bf16.
//
// The build lists them, the best last: PVDM_ISAS(X, ...) is X(plain, ...) X(avx2, ...) and so on for all that are built,
// PVDM_WHOLE_ISAS those of every file, PVDM_TILE_ISAS the rest: amx or none.
#pragma once
#include <string>
#include <vector>

#define PVDM_ENUMERATOR(isa, ...) isa,
#define PVDM_DECLARE(isa, name, args) \
  namespace pvdm::isa {               \
  void name args;                     \
  }
#define PVDM_ENTRY(isa, name) isa::name,

namespace pvdm {

enum class Isa { PVDM_ISAS(PVDM_ENUMERATOR) };

// The set in use: PVDM_FAST_CPU_ISA, else the best that was built and that this CPU and its system let a process use.
// Throws std::invalid_argument where the variable names a set that is unknown, not built, or not in this CPU.
Isa current_isa();
void set_isa(const std::string& name);
const char* isa_name(Isa isa);
std::vector<std::string> usable_isas();

namespace avx512bf16 {}
namespace amx {
using namespace avx512bf16;
}

}  // namespace pvdm

// Declares a kernel for every instruction set that was built, and choose_<name>() which returns the right one.
#define PVDM_CPU_KERNEL(name, args)                                            \
  PVDM_WHOLE_ISAS(PVDM_DECLARE, name, args)                                    \
  namespace pvdm {                                                             \
  inline auto choose_##name() -> void(*) args {                                \
    static constexpr void(*const kernels[]) args = {PVDM_ISAS(PVDM_ENTRY, name)}; \
    return kernels[static_cast<int>(current_isa())];                           \
  }                                                                            \
  }
#define PVDM_CPU_TILE_KERNEL(name, args)   \
  PVDM_TILE_ISAS(PVDM_DECLARE, name, args) \
  PVDM_CPU_KERNEL(name, args)
