// AMX tile instructions, in assembly. GCC has intrinsics only from 11 on, and those of GCC 12 don't tell the optimiser
// that loading a tile reads memory.
#pragma once
#include <cstdint>

namespace pvdm::PVDM_ISA {
namespace {

// The operand of LDTILECFG: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

inline void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void release_tiles() { asm volatile("tilerelease"); }

template <int tile>
void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// 16 rows of 16 words, `stride` words apart.
template <int tile>
void load_tile(const float* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(stride * 4) : "memory");
}
template <int tile>
void store_tile(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(stride * 4) : "memory");
}
// sum[m][n] += sum over words k of low(a[m][k]) low(b[k][n]) + high(a[m][k]) high(b[k][n]).
template <int sum, int a, int b>
void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
