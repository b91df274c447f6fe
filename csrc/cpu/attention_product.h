// The products inside attention: small matrix products from packed, cache-resident operands.
//
// Scores are kept transposed, keys x queries with queries in the vector lanes. Every product then is "rows x vectors":
// broadcast one word of the left operand, multiply a vector of the right. Row maxima and sums of the softmax are per lane,
// odd numbers of keys cost nothing, and only queries are padded to whole vectors.
#pragma once
#include "vec.h"

namespace pvdm::PVDM_ISA {
namespace {

// AVX-512 has 32 registers: 8 x 3 accumulators; otherwise 16: 4 x 3. Per step 11 (7) loads feed 24 (12) multiply-adds.
constexpr int tile_rows = lanes == 16 ? 8 : 4;
constexpr int tile_vectors = 3;
constexpr int few_rows = 4;        // what is left over; 17 keys are a tile of 16 rows and one of these
#if defined(PVDM_ISA_AMX)
constexpr int block_queries = 64;  // 32 pairs: where queries are summed over, 48 would fill one and a half AMX tiles
#else
constexpr int block_queries = 48;  // a whole number of tiles for every width of vectors
#endif
// Scores of a block: 24 KB (12 KB where the first-level cache tends to be 32 KB, not 48). 128 against 64: 2-4 % in fp32.
constexpr int block_keys = lanes == 16 ? 128 : 64;

// An Op: `step` numbers of the summed index lie in a word; `depth` words are summed at once, and operands are padded with
// zeros to a multiple of that; a Session lasts as long as a thread multiplies.
struct NoSession {};

// One word holds one float.
struct Floats {
  static constexpr int step = 1, depth = 1;
  using Session = NoSession;
  PVDM_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(PVDM_ISA_AVX512BF16)
// One word holds two bf16 that are neighbours in the summed index: one instruction multiplies and adds both.
struct Pairs {
  static constexpr int step = 2, depth = 1;
  using Session = NoSession;
  PVDM_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
    return cast<Vec>(_mm512_dpbf16_ps(cast<__m512>(sum), cast<__m512bh>(a), cast<__m512bh>(b)));
  }
};
#endif

PVDM_INLINE Vec broadcast(const float* p) {
#if defined(PVDM_ISA_AVX512)
  return cast<Vec>(_mm512_set1_ps(*p));
#elif defined(PVDM_ISA_AVX2)
  return cast<Vec>(_mm256_set1_ps(*p));
#else
  return splat(*p);
#endif
}

// What happens to the result that is there: replaced, added to, or multiplied lane by lane and added to.
struct Into {
  float* data;
  int64_t stride;  // between rows
  bool add = false;
  const float* factor = nullptr;
};

// Left operands. Panels of `lanes` rows, `panel` words apart, each with its rows side by side at every step: packed numbers.
// Where Op::depth > 1, every square of lanes x lanes words is transposed in its place.
struct Panels {
  static constexpr int row = 1;  // words between two rows
  const float* data;
  int64_t panel, step;
  const float* from(int64_t r) const { return data + r / lanes * panel + r % lanes; }
};
// Rows of `words` words: scores of a block.
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
// added at the end: sums over many blocks of keys thereby lose fewer digits.
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
    } else if (vectors == 2 || vectors == 4) {  // four are two and two, not three and one
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

// A (rows x vectors * lanes) product, summed over `steps`. All buffers are padded to whole panels of rows: rows up to the
// next multiple of `lanes` are computed.
template <class Op, class Left>
void multiply(int64_t rows, int64_t vectors, const Left& a, const Vectors& b, const Into& to, int64_t steps) {
  if constexpr (Op::depth > 1)
    Op::multiply(rows, vectors, a, b, to, steps);
  else
    multiply_in_registers<Op>(rows, vectors, a, b, to, steps);
}

// One row: a[k] b[k * step_b ...], for a single query.
PVDM_INLINE void multiply_row(int64_t vectors, const float* a, const float* b, int64_t step_b, float* to, int64_t steps) {
  for (; vectors >= 4; vectors -= 4, b += 4 * lanes, to += 4 * lanes)
    tile<Floats, 1, 4, 1>(a, 1, b, step_b, {to, 0}, steps);
  for (; vectors > 0; vectors--, b += lanes, to += lanes) tile<Floats, 1, 1, 1>(a, 1, b, step_b, {to, 0}, steps);
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
