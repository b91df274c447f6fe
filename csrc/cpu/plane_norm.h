// Shared by plane_norm's forward and backward: how tokens are cut into chunks, and the parameters.
#pragma once
#include "kernels.h"
#include "runtime/parallel.h"
#include "vec.h"

namespace pvdm::PVDM_ISA {
namespace {

constexpr int64_t chunk_tokens = 128;  // the unit of work and of summation, so results don't depend on the thread count
constexpr int64_t exact_tokens = 32;   // summed in float, then added in double
// tokens per sweep over the channels: sums are loaded and stored once per four tokens
constexpr int at_once = 4;

struct Chunk {
  int64_t plane, first, count;  // tokens counted within the plane
};

PVDM_INLINE int64_t chunks_of(int64_t tokens) { return (tokens + chunk_tokens - 1) / chunk_tokens; }

// Cuts planes into chunks. No chunk spans two planes. halved: planes at half their size.
struct Chunks {
  Planes planes;
  bool halved;
  int64_t total = 0;

  Chunks(const Planes& all, bool half) : planes(all), halved(half) {
    for (int64_t p = 0; p < planes.count; p++) total += chunks_of(tokens(p));
  }
  int64_t columns(int64_t plane) const { return halved ? planes.columns(plane) / 2 : planes.columns(plane); }
  int64_t tokens(int64_t plane) const { return halved ? planes.tokens(plane) / 4 : planes.tokens(plane); }
  int64_t start(int64_t plane) const {
    int64_t sum = 0;
    for (int64_t p = 0; p < plane; p++) sum += chunks_of(tokens(p));
    return sum;
  }
  Chunk at(int64_t index) const {
    int64_t plane = 0;
    for (; index >= chunks_of(tokens(plane)); plane++) index -= chunks_of(tokens(plane));
    const int64_t first = index * chunk_tokens, left = tokens(plane) - first;
    return {plane, first, left < chunk_tokens ? left : chunk_tokens};
  }
};

PVDM_INLINE float scale_shift_at(const PlaneNormInputs& in, int64_t b, int64_t i) {
  return in.scale_shift.data ? in.scale_shift.as<float>()[b * 2 * in.x.size[2] + i] : 0.0f;
}

// Adds `count` floats to doubles, and clears the floats.
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
