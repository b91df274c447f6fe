// What Python passes to native code: a pointer, a dtype, sizes and strides. No PyTorch headers.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PVDM_BOTH __host__ __device__
#else
#define PVDM_BOTH
#endif

namespace pvdm {

enum class Dtype : int { f32, bf16, f16, f64 };

// A strided array that the caller owns. Strides count elements. `data` is null for None.
struct TensorView {
  static constexpr int max_dims = 6;
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int dims = 0;
  int64_t size[max_dims] = {};
  int64_t stride[max_dims] = {};

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Sizes of a video lattice and the token offsets of its packed triplane (xy, yt, xt).
struct Layout {
  int64_t time, height, width;
  PVDM_BOTH int64_t rows(int plane) const { return plane == 0 ? height : time; }
  PVDM_BOTH int64_t columns(int plane) const { return plane == 2 ? height : width; }
  // Of the axis that a plane lacks, along which its sequences run.
  PVDM_BOTH int64_t length(int plane) const { return plane == 0 ? time : plane == 1 ? height : width; }
  PVDM_BOTH int64_t offset(int plane) const {
    return plane == 0 ? 0 : height * width + (plane == 1 ? 0 : time * width) + (plane == 3 ? time * height : 0);
  }
  PVDM_BOTH int64_t tokens() const { return offset(3); }
};

// Any number of planes of any sizes, packed along one token axis: (rows, columns) of each. Doesn't own the sizes.
struct Planes {
  const int64_t* sizes;
  int64_t count;
  int64_t rows(int64_t plane) const { return sizes[2 * plane]; }
  int64_t columns(int64_t plane) const { return sizes[2 * plane + 1]; }
  int64_t tokens(int64_t plane) const { return rows(plane) * columns(plane); }
  int64_t offset(int64_t plane) const {
    int64_t sum = 0;
    for (int64_t p = 0; p < plane; p++) sum += tokens(p);
    return sum;
  }
};

}  // namespace pvdm
