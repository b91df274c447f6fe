// The products of triplane_project: operands packed whole, multiplied by the micro-kernels of attention.
//
// A right operand is cut into groups of columns, as many vectors as a micro-kernel's accumulators are wide, each dense in
// memory: a group of 384 rows lies in the first cache (or half of it at a time), and all rows of the left operand pass it.
#pragma once
#include "attention_pack.h"
#include "attention_tiles.h"

namespace pvdm::PVDM_ISA {
namespace {

template <class Op>
constexpr int group = Op::depth > 1 ? 2 : tile_vectors;  // vectors
// Words summed at once: 128 x 48 floats are 24 KB, half of a first-level cache. Tiles of AMX add in a detour by memory.
template <class Op>
constexpr int64_t run = Op::depth > 1 ? 512 : 128;

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

// to (rows x width) = or += left right, both packed; rows and columns up to whole vectors are computed.
template <class Op>
void product(int64_t rows, const float* left, int64_t summed, const float* right, int64_t width, const Rows& to,
             bool add = false) {
  const int64_t steps = words<Op>(summed);
  for (int64_t n = 0; n < width; n += group<Op> * lanes) {
    const int64_t rest = padded(width - n) / lanes, vectors = rest < group<Op> ? rest : group<Op>;
    for (int64_t k = 0; k < steps; k += run<Op>)
      multiply<Op>(rows, vectors, Panels{left + k * lanes, steps * lanes, lanes},
                   Vectors{right + k * vectors * lanes, vectors * lanes}, Into{to.data + n, to.stride, add || k > 0},
                   steps - k < run<Op> ? steps - k : run<Op>);
    right += steps * vectors * lanes;
  }
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
