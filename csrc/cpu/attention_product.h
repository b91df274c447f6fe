// The products inside attention: small matrix products of packed operands that stay in the cache.
//
// Scores are stored transposed, keys x queries, with queries in the vector lanes. Then every product is "rows x
// vectors": broadcast one word of the left operand and multiply a vector of the right. Row maxima and sums of the
// softmax are per lane, an odd number of keys costs nothing, and only queries are padded to whole vectors.
#pragma once
#include "vec.h"

namespace pvdm::PVDM_ISA {
namespace {

// AVX-512 has 32 registers, enough for 8 x 3 accumulators. The others have 16, enough for 4 x 3. Each step feeds 24
// (12) multiply-adds with 11 (7) loads.
constexpr int tile_rows = lanes == 16 ? 8 : 4;
constexpr int tile_vectors = 3;
constexpr int few_rows = 4;        // for leftovers: 17 keys are a tile of 16 rows and one of these
#if defined(PVDM_ISA_AMX)
// 32 pairs; 48 queries would fill one and a half AMX tiles where sums run over queries
constexpr int block_queries = 64;
#else
constexpr int block_queries = 48;  // a multiple of every vector width
#endif
// The scores of a block take 24 KB, or 12 KB where the L1 cache is usually 32 KB instead of 48. With AVX-512, 128 keys
// beat 64 by 2-4 % in fp32.
constexpr int block_keys = lanes == 16 ? 128 : 64;

// An Op says how words are multiplied. A word holds `step` numbers of the summed index. An instruction sums `depth`
// words, and operands are zero-padded to a multiple of it. A Session must exist while a thread multiplies.
struct NoSession {};

// One word is one float.
struct Floats {
  static constexpr int step = 1, depth = 1;
  using Session = NoSession;
  PVDM_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(PVDM_ISA_AVX512BF16)
// One word is two bf16, neighbours in the summed index. One instruction multiplies and adds both.
struct Pairs {
  static constexpr int step = 2, depth = 1;
  using Session = NoSession;
  PVDM_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
};
#endif

PVDM_INLINE Vec broadcast(const float* p) {
#if defined(PVDM_ISA_AVX512)
  return bit_cast<Vec>(_mm512_set1_ps(*p));
#elif defined(PVDM_ISA_AVX2)
  return bit_cast<Vec>(_mm256_set1_ps(*p));
#else
  return splat(*p);
#endif
}

// How a product is written: overwrite, accumulate, or rescale (lane by lane) and accumulate.
struct Into {
  float* data;
  int64_t stride;  // between rows
  bool add = false;
  const float* factor = nullptr;
};

// A left operand, packed in panels of `lanes` rows, `panel` words apart. Within a panel, every step has its rows side
// by side. Where Op::depth > 1, each square of lanes x lanes words is transposed instead.
struct Panels {
  static constexpr int row = 1;  // words between two rows
  const float* data;
  int64_t panel, step;
  const float* from(int64_t r) const { return data + r / lanes * panel + r % lanes; }
};
// A left operand in rows of `words` words: the scores of a block.
template <int words>
struct Lines {
  static constexpr int row = words;
  static constexpr int64_t step = 1;
  const float* data;
  const float* from(int64_t r) const { return data + r * words; }
};
// A right operand: rows of vectors, `step` words apart.
struct Vectors {
  const float* data;
  int64_t step;
};

// result[r][v] = sum over k of a[r * row + k * step_a] * b[k * step_b + v * lanes ...]. The sum starts from zero and is
// added to the old result at the end. Sums over many blocks of keys lose fewer digits this way.
template <class Op, int rows, int vectors, int row>
__attribute__((noinline)) void tile(const float* a, int64_t step_a, const float* b, int64_t step_b, Into to, int64_t steps) {
  Vec sum[rows][vectors] = {};
  for (int64_t k = 0; k < steps; k++, a += step_a, b += step_b) {
    Vec right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) right[v] = load(b + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      const Vec left = broadcast(a + r * row);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) sum[r][v] = Op::multiply_add(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; v++) {
    const Vec factor = to.factor ? load(to.factor + v * lanes) : splat(1.0f);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      float* p = to.data + r * to.stride + v * lanes;
      store(p, to.add ? load(p) * factor + sum[r][v] : sum[r][v]);
    }
  }
}

template <class Op, int rows, int vectors, class Left>
PVDM_INLINE void tiles(int64_t all_rows, const Left& a, const Vectors& b, Into to, int64_t steps) {
  float* const start = to.data;
  for (int64_t r = 0; r < all_rows;) {
    to.data = start + r * to.stride;
    if (all_rows - r <= few_rows && few_rows < rows) {
      tile<Op, few_rows, vectors, Left::row>(a.from(r), a.step, b.data, b.step, to, steps);
      r += few_rows;
    } else {
      tile<Op, rows, vectors, Left::row>(a.from(r), a.step, b.data, b.step, to, steps);
      r += rows;
    }
  }
}

template <class Op, class Left>
void multiply_in_registers(int64_t rows, int64_t vectors, const Left& a, Vectors b, Into to, int64_t steps) {
  while (vectors > 0) {
    int done = tile_vectors;
    if (vectors == 1) {
      tiles<Op, lanes, 1>(rows, a, b, to, steps);
      done = 1;
    } else if (vectors == 2 || vectors == 4) {  // 4 = 2 + 2 is faster than 3 + 1
      tiles<Op, tile_rows, 2>(rows, a, b, to, steps);
      done = 2;
    } else {
      tiles<Op, tile_rows, 3>(rows, a, b, to, steps);
    }
    vectors -= done;
    b.data += done * lanes;
    to.data += done * lanes;
    if (to.factor) to.factor += done * lanes;
  }
}

// A (rows x vectors * lanes) product, summed over `steps`. Rows are computed up to the next multiple of `lanes`, so all
// buffers must be padded to whole panels.
template <class Op, class Left>
void multiply(int64_t rows, int64_t vectors, const Left& a, const Vectors& b, const Into& to, int64_t steps) {
  if constexpr (Op::depth > 1)
    Op::multiply(rows, vectors, a, b, to, steps);
  else
    multiply_in_registers<Op>(rows, vectors, a, b, to, steps);
}

// One row, for a single query: the sum of a[k] b[k * step_b ...].
PVDM_INLINE void multiply_row(int64_t vectors, const float* a, const float* b, int64_t step_b, float* to, int64_t steps) {
  for (; vectors >= 4; vectors -= 4, b += 4 * lanes, to += 4 * lanes)
    tile<Floats, 1, 4, 1>(a, 1, b, step_b, {to, 0}, steps);
  for (; vectors > 0; vectors--, b += lanes, to += lanes) tile<Floats, 1, 1, 1>(a, 1, b, step_b, {to, 0}, steps);
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
