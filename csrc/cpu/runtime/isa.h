// Instruction sets. Every csrc/cpu/*.cpp is compiled once for each set, into a namespace of that name. For amx only the
// files that multiply with tiles are compiled, and avx512bf16 serves the rest.
//
// The build passes the lists, best set last. PVDM_ISAS(X, ...) is X(plain, ...) X(avx2, ...) and so on for all sets
// that are built. PVDM_WHOLE_ISAS are those with every file, PVDM_TILE_ISAS the rest: amx or none.
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

// The set in use: PVDM_FAST_CPU_ISA, or else the best one that was built and that CPU and system support. Throws
// std::invalid_argument if the variable names an unknown, unbuilt or unsupported set.
Isa current_isa();
void set_isa(const std::string& name);
const char* isa_name(Isa isa);
std::vector<std::string> usable_isas();

namespace avx512bf16 {}
namespace amx {
using namespace avx512bf16;
}

}  // namespace pvdm

// Declares a kernel for every instruction set that was built, and choose_<name>(), which returns the one to use.
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
