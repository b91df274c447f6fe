// Attention's products with AMX tiles: bf16 pairs, 16 rows x 16 lanes x 16 words per instruction.
#pragma once
#if defined(PVDM_ISA_AMX)
#include <utility>

#include "attention_product.h"
#include "tiles.h"

namespace pvdm::PVDM_ISA {
namespace {

// Calls body(0), body(1), ... with constants: tiles have numbers, not addresses.
template <class F, int... i>
PVDM_INLINE void for_each(std::integer_sequence<int, i...>, const F& body) {
  (body(std::integral_constant<int, i>{}), ...);
}
template <int count, class F>
PVDM_INLINE void unrolled(const F& body) {
  for_each(std::make_integer_sequence<int, count>{}, body);
}

// Distances in a left operand: to the tile of the next 16 rows, to that of the next 16 words, and between rows of a
// tile.
struct TileSteps {
  int64_t rows, words, stride;
};

// At most four tiles of the result, rows x vectors. An instruction can start every 16 cycles and takes 52 (Intel's
// optimisation manual), so four independent sums hide the latency. Tiles 0-3 are sums, 4 and 5 left operands, 6 and 7
// right ones.
template <int rows, int vectors>
__attribute__((noinline)) void tile_block(const float* a, TileSteps at, const float* b, int64_t step_b, Into to,
                                          int64_t steps) {
  static_assert(rows * vectors <= 4 && vectors <= 2);
  unrolled<rows * vectors>([](auto i) PVDM_BODY { clear_tile<i>(); });
  for (int64_t k = 0; k < steps; k += lanes, a += at.words, b += lanes * step_b) {
    unrolled<vectors>([&](auto v) PVDM_BODY { load_tile<6 + v>(b + v * lanes, step_b); });
    unrolled<rows>([&](auto r) PVDM_BODY {
      constexpr int left = 4 + r % 2, sums = r * vectors;
      load_tile<left>(a + r * at.rows, at.stride);
      unrolled<vectors>([&](auto v) PVDM_BODY { multiply_tiles<sums + v, left, 6 + v>(); });
    });
  }
  if (!to.add) {
    unrolled<rows * vectors>([&](auto i) PVDM_BODY {
      store_tile<i>(to.data + i / vectors * lanes * to.stride + i % vectors * lanes, to.stride);
    });
    return;
  }
  alignas(64) float sums[rows * vectors][lanes * lanes];
  unrolled<rows * vectors>([&](auto i) PVDM_BODY { store_tile<i>(sums[i], lanes); });
  for (int v = 0; v < vectors; v++) {
    const Vec factor = to.factor ? load(to.factor + v * lanes) : splat(1.0f);
    for (int r = 0; r < rows * lanes; r++) {
      float* p = to.data + r * to.stride + v * lanes;
      store(p, load(p) * factor + load(sums[r / lanes * vectors + v] + r % lanes * lanes));
    }
  }
}

// Computes as many blocks of `tiles` tiles as fit from row r on. Returns the row behind them.
template <int tiles, int vectors>
PVDM_INLINE int64_t tile_blocks(int64_t r, int64_t rows, const float* a, TileSteps at, const float* b, int64_t step_b,
                                const Into& to, int64_t steps) {
  for (; r + (tiles - 1) * lanes < rows; r += tiles * lanes) {
    const Into part{to.data + r * to.stride, to.stride, to.add, to.factor};
    tile_block<tiles, vectors>(a + r / lanes * at.rows, at, b, step_b, part, steps);
  }
  return r;
}

// One word is two bf16, as in Pairs.
struct Tiles {
  static constexpr int step = 2, depth = 16;
  static_assert(depth == lanes);

  // Tiles are released at the end. Otherwise every context switch would save 8 KB more for this thread.
  struct Session {
    Session() { configure_tiles(TileConfig{}); }
    ~Session() { release_tiles(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  static TileSteps steps_of(const Panels& a) { return {a.panel, lanes * a.step, a.step}; }
  template <int row>
  static TileSteps steps_of(const Lines<row>&) {
    return {lanes * row, lanes, row};
  }

  template <class Left>
  static void multiply(int64_t rows, int64_t vectors, const Left& left, const Vectors& right, Into to, int64_t steps) {
    const TileSteps at = steps_of(left);
    const float *a = left.data, *b = right.data;
    const int64_t step_b = right.step;
    for (; vectors > 1; vectors -= 2, b += 2 * lanes, to.data += 2 * lanes) {
      const int64_t r = tile_blocks<2, 2>(0, rows, a, at, b, step_b, to, steps);
      tile_blocks<1, 2>(r, rows, a, at, b, step_b, to, steps);
      if (to.factor) to.factor += 2 * lanes;
    }
    if (!vectors) return;
    const int64_t r = tile_blocks<4, 1>(0, rows, a, at, b, step_b, to, steps);
    tile_blocks<1, 1>(r, rows, a, at, b, step_b, to, steps);
  }
};

}  // namespace
}  // namespace pvdm::PVDM_ISA
#endif
