// Instruction sets: every csrc/cpu/*.cpp is compiled once for each, into a namespace of that name; for amx only what
// multiplies by tiles is, and the rest is borrowed from avx512bf16.
#pragma once
#include <string>
#include <vector>

namespace pvdm {

enum class Isa { plain, avx2, avx512, avx512bf16, amx };

// The set in use: PVDM_FAST_CPU_ISA, else the best that was built and this CPU has, but amx.
// Throws std::invalid_argument where the variable names a set that is unknown, not built, or not in this CPU.
Isa current_isa();
void set_isa(const std::string& name);
const char* isa_name(Isa isa);
std::vector<std::string> usable_isas();

}  // namespace pvdm

// Declares a kernel for every instruction set that was built, and choose_<name>() which returns the right one.
#ifdef PVDM_HAVE_AVX2
#define PVDM_DECLARE_AVX2(name, args) \
  namespace pvdm::avx2 {              \
  void name args;                     \
  }
#define PVDM_CASE_AVX2(name) \
  case Isa::avx2:            \
    return avx2::name;
#else
#define PVDM_DECLARE_AVX2(name, args)
#define PVDM_CASE_AVX2(name)
#endif
#ifdef PVDM_HAVE_AVX512
#define PVDM_DECLARE_AVX512(name, args) \
  namespace pvdm::avx512 {              \
  void name args;                       \
  }
#define PVDM_CASE_AVX512(name) \
  case Isa::avx512:            \
    return avx512::name;
#else
#define PVDM_DECLARE_AVX512(name, args)
#define PVDM_CASE_AVX512(name)
#endif
#ifdef PVDM_HAVE_AVX512BF16
#define PVDM_DECLARE_AVX512BF16(name, args) \
  namespace pvdm::avx512bf16 {              \
  void name args;                           \
  }
#define PVDM_CASE_AVX512BF16(name) \
  case Isa::avx512bf16:            \
    return avx512bf16::name;
#else
#define PVDM_DECLARE_AVX512BF16(name, args)
#define PVDM_CASE_AVX512BF16(name)
#endif
#ifdef PVDM_HAVE_AMX
#define PVDM_DECLARE_AMX(name, args) \
  namespace pvdm::amx {              \
  void name args;                    \
  }
#define PVDM_BORROW_AMX(name) \
  namespace pvdm::amx {       \
  using avx512bf16::name;     \
  }
#define PVDM_CASE_AMX(name) \
  case Isa::amx:            \
    return amx::name;
#else
#define PVDM_DECLARE_AMX(name, args)
#define PVDM_BORROW_AMX(name)
#define PVDM_CASE_AMX(name)
#endif
#define PVDM_DECLARE(name, args)      \
  namespace pvdm::plain {             \
  void name args;                     \
  }                                   \
  PVDM_DECLARE_AVX2(name, args)       \
  PVDM_DECLARE_AVX512(name, args)     \
  PVDM_DECLARE_AVX512BF16(name, args)
#define PVDM_CHOOSE(name, args)        \
  namespace pvdm {                     \
  inline auto choose_##name() -> void(*) args { \
    switch (current_isa()) {           \
      PVDM_CASE_AVX2(name)             \
      PVDM_CASE_AVX512(name)           \
      PVDM_CASE_AVX512BF16(name)       \
      PVDM_CASE_AMX(name)              \
      default:                         \
        return plain::name;            \
    }                                  \
  }                                    \
  }
#define PVDM_CPU_KERNEL(name, args) \
  PVDM_DECLARE(name, args)          \
  PVDM_BORROW_AMX(name)             \
  PVDM_CHOOSE(name, args)
#define PVDM_CPU_TILE_KERNEL(name, args) \
  PVDM_DECLARE(name, args)               \
  PVDM_DECLARE_AMX(name, args)           \
  PVDM_CHOOSE(name, args)
