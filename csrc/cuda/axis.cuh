// An axis of the lattice as sequences.
#pragma once
#include "launch.cuh"

namespace pvdm::cuda {

// Where sequences lie: element i of x[b, site] is row b * tokens + row(site, i).
struct Axis {
  int64_t length, sites, step, inner, inner_stride, outer_stride, tokens;
  __device__ int64_t row(int64_t site, int64_t i) const {
    return site / inner * outer_stride + site % inner * inner_stride + i * step;
  }
};

inline Axis axis_of(int plane, const Layout& l) {
  const int64_t t = l.time, h = l.height, w = l.width, all = t * h * w;
  if (plane == 0) return {t, h * w, h * w, h * w, 1, 0, all};
  if (plane == 1) return {h, t * w, w, w, 1, h * w, all};
  return {w, t * h, 1, t * h, w, 0, all};
}

}  // namespace pvdm::cuda
