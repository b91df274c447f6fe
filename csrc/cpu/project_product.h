// The products of triplane_project: operands packed whole, multiplied by the micro-kernels of attention.
//
// A right operand is cut into groups of columns, as many vectors as a micro-kernel's accumulators are wide, each dense in
// memory. All rows of the left operand pass a run of a group's words, which lies in the first cache.
#pragma once
#include "attention_pack.h"
#include "attention_tiles.h"

namespace pvdm::PVDM_ISA {
namespace {

template <class Op>
constexpr int group = Op::depth > 1 ? 2 : tile_vectors;  // vectors
// Words summed at once: 128 x 48 floats are 24 KB, half of a first-level cache; with AMX 128 x 32 words, 16 KB, beside as
// much of the left operand.
constexpr int64_t run = 128;

// Of a packed operand, left or right: `summed` numbers are summed over, `width` are not. In floats.
template <class Op>
PVDM_INLINE int64_t operand_size(int64_t summed, int64_t width) {
  return words<Op>(summed) * padded(width);
}

// x: `width` rows of `summed` numbers -> a right operand: multiplies with the transpose of x.
template <class Op, class T>
void pack_across(const Tokens<const T>& x, int64_t width, int64_t summed, float* to) {
  for (int64_t n = 0; n < width; n += group<Op> * lanes) {
    const int64_t rest = padded(width - n) / lanes, vectors = rest < group<Op> ? rest : group<Op>;
    for (int64_t v = 0; v < vectors; v++)
      pack_panel<Op>(x.from(n + v * lanes), count_at(n + v * lanes, width), summed, Rotation{}, to + v * lanes,
                     vectors * lanes);
    to += words<Op>(summed) * vectors * lanes;
  }
}

// x: `summed` rows of `width` numbers -> a right operand: multiplies with x.
template <class Op, class T>
void pack_along(const Tokens<const T>& x, int64_t width, int64_t summed, float* to) {
  for (int64_t n = 0; n < width; n += group<Op> * lanes) {
    const int64_t part = width - n < group<Op> * lanes ? width - n : group<Op> * lanes;
    pack_rows<Op>(Tokens<const T>{x.data + n, x.stride}, summed, part, Rotation{}, to);
    to += words<Op>(summed) * padded(part);
  }
}

// x: `summed` rows of `width` numbers -> a left operand with the transpose's rows.
template <class Op>
void pack_left_across(const Tokens<const float>& x, int64_t width, int64_t summed, float* to) {
  for (int64_t n = 0; n < width; n += lanes, to += words<Op>(summed) * lanes)
    pack_left_rows<Op>(Tokens<const float>{x.data + n, x.stride}, summed, count_at(n, width), Rotation{}, to);
}

// A matrix (rows x columns) of floats whose rows are padded to whole vectors, and their number to whole panels.
struct Rows {
  float* data;
  int64_t stride;
  float* at(int64_t r) const { return data + r * stride; }
  Tokens<const float> tokens() const { return {data, stride}; }
};

#if defined(PVDM_ISA_AMX)
// rows x 2 tiles of a result, added to what is there or not: in the tiles themselves, not as attention's by memory. The
// next block's lines are asked for meanwhile: they lie in the third cache, or another one's.
template <int rows, int vectors>
__attribute__((noinline)) void sum_tiles(const float* a, int64_t panel, const float* b, const Rows& to, bool add,
                                         int64_t steps) {
  constexpr int64_t step_b = vectors * lanes;
  for (int r = 0; r < rows * lanes; r++)
    for (int v = 0; v < vectors; v++) __builtin_prefetch(to.at(rows * lanes + r) + v * lanes, 1);
  unrolled<rows * vectors>([&](auto i) PVDM_BODY {
    if (add)
      load_tile<i>(to.data + i / vectors * lanes * to.stride + i % vectors * lanes, to.stride);
    else
      clear_tile<i>();
  });
  for (int64_t k = 0; k < steps; k += lanes, a += lanes * lanes, b += lanes * step_b) {
    unrolled<vectors>([&](auto v) PVDM_BODY { load_tile<6 + v>(b + v * lanes, step_b); });
    unrolled<rows>([&](auto r) PVDM_BODY {
      load_tile<4 + r>(a + r * panel, lanes);
      unrolled<vectors>([&](auto v) PVDM_BODY { multiply_tiles<r * vectors + v, 4 + r, 6 + v>(); });
    });
  }
  unrolled<rows * vectors>([&](auto i) PVDM_BODY {
    store_tile<i>(to.data + i / vectors * lanes * to.stride + i % vectors * lanes, to.stride);
  });
}

template <int vectors>
void sum_all_tiles(int64_t rows, const float* a, int64_t panel, const float* b, const Rows& to, bool add, int64_t steps) {
  int64_t r = 0;
  for (; r + lanes < rows; r += 2 * lanes)
    sum_tiles<2, vectors>(a + r / lanes * panel, panel, b, {to.at(r), to.stride}, add, steps);
  if (r < rows) sum_tiles<1, vectors>(a + r / lanes * panel, panel, b, {to.at(r), to.stride}, add, steps);
}
#endif

// A group of columns of `product`, of so many words of the sum.
template <class Op>
PVDM_INLINE void product_part(int64_t rows, const float* left, int64_t panel, const float* right, int64_t vectors,
                              const Rows& to, bool add, int64_t steps) {
#if defined(PVDM_ISA_AMX)
  if (vectors == 2)
    sum_all_tiles<2>(rows, left, panel, right, to, add, steps);
  else
    sum_all_tiles<1>(rows, left, panel, right, to, add, steps);
#else
  multiply<Op>(rows, vectors, Panels{left, panel, lanes}, Vectors{right, vectors * lanes}, Into{to.data, to.stride, add},
               steps);
#endif
}

// to (rows x width) = or += left right, both packed; rows and columns up to whole vectors are computed.
template <class Op>
void product(int64_t rows, const float* left, int64_t summed, const float* right, int64_t width, const Rows& to,
             bool add = false) {
  const int64_t steps = words<Op>(summed);
  for (int64_t n = 0; n < width; n += group<Op> * lanes) {
    const int64_t rest = padded(width - n) / lanes, vectors = rest < group<Op> ? rest : group<Op>;
    for (int64_t k = 0; k < steps; k += run)
      product_part<Op>(rows, left + k * lanes, steps * lanes, right + k * vectors * lanes, vectors,
                       {to.data + n, to.stride}, add || k > 0, steps - k < run ? steps - k : run);
    right += steps * vectors * lanes;
  }
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
