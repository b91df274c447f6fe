// What plane_norm's two directions share: the cut of the tokens into chunks, and per-channel parameters.
#pragma once
#include "kernels.h"
#include "runtime/parallel.h"
#include "vec.h"

namespace pvdm::PVDM_ISA {
namespace {

constexpr int64_t chunk_tokens = 128;  // a unit of work and of summation: results don't depend on the thread count
constexpr int64_t exact_tokens = 32;   // summed in float before they are added in double
constexpr int at_once = 4;             // tokens per sweep over the channels: sums are loaded and stored once for four

struct Chunk {
  int plane;
  int64_t first, count;  // tokens of that plane
};

// Cuts the three planes, of `rows x columns` tokens each, into chunks; none holds tokens of two planes.
struct Chunks {
  int64_t rows[3], columns[3], start[4];

  // halved: of the planes at half their size.
  Chunks(const Layout& layout, bool halved) {
    start[0] = 0;
    for (int p = 0; p < 3; p++) {
      rows[p] = halved ? layout.rows(p) / 2 : layout.rows(p);
      columns[p] = halved ? layout.columns(p) / 2 : layout.columns(p);
      start[p + 1] = start[p] + (rows[p] * columns[p] + chunk_tokens - 1) / chunk_tokens;
    }
  }
  int64_t total() const { return start[3]; }
  Chunk at(int64_t index) const {
    const int plane = index >= start[2] ? 2 : index >= start[1] ? 1 : 0;
    const int64_t first = (index - start[plane]) * chunk_tokens, left = rows[plane] * columns[plane] - first;
    return {plane, first, left < chunk_tokens ? left : chunk_tokens};
  }
};

// The chunks whose tokens share statistics.
struct Span {
  int64_t first, last, tokens;
};
PVDM_INLINE Span span_of(const Chunks& chunks, int span, bool joint) {
  const int from = joint ? 0 : span, to = joint ? 3 : span + 1;
  int64_t tokens = 0;
  for (int p = from; p < to; p++) tokens += chunks.rows[p] * chunks.columns[p];
  return {chunks.start[from], chunks.start[to], tokens};
}

PVDM_INLINE float element(const TensorView& t, int64_t i) { return t.as<float>()[i * t.stride[t.dims - 1]]; }
PVDM_INLINE float film_at(const TensorView& film, int64_t b, int64_t i) {
  return film.data ? film.as<float>()[b * film.stride[0] + i] : 0.0f;
}

// Adds `count` floats to doubles and clears them.
PVDM_INLINE void flush(float* from, double* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    to[i] += from[i];
    from[i] = 0;
  }
}

template <bool activation>
PVDM_INLINE Vec activated(Vec z) {
  return activation ? z * sigmoid(z) : z;
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
