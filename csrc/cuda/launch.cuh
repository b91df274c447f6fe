// Every .cu file needs this: storage types, 16-byte accesses, checked launches. It also builds with g++ against the
// host stand-in of csrc/emulation (PVDM_EMULATE), which is how the kernels are tested without a GPU.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../tensor_view.h"

#ifdef PVDM_EMULATE
#include "../emulation/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define PVDM_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  (kernel)<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// Shared memory: a static array, and the dynamic memory of the launch.
#define PVDM_SHARED(T, name, count) __shared__ T name[count]
#define PVDM_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(128) unsigned char pvdm_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(pvdm_dynamic_shared)
#endif

namespace pvdm::cuda {

// Where a launch goes: the device of the tensors and PyTorch's current stream on it.
struct LaunchTarget {
  int device;
  void* stream;
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": CUDA reports '" + cudaGetErrorString(error) + "'.");
}

// Makes a device current, and restores the previous one at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// A kernel must ask for more than 48 KiB of shared memory.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 << 10) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "asking for shared memory");
}

// A one-dimensional grid of `blocks` blocks.
inline dim3 grid_of(int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::invalid_argument("The tensors are too large for one launch (" + std::to_string(blocks) + " blocks).");
  return dim3(static_cast<unsigned>(blocks));
}

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half(x); }

// A pack: the elements of one 16-byte access.
template <class T>
constexpr int pack = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack {
  T at[pack<T>];
};

// `aligned`: p is 16-byte aligned and the pack is whole. Otherwise only `count` elements are accessed, and the others
// load as zero.
template <bool aligned, class T>
__device__ __forceinline__ void load_pack(const T* p, int64_t count, float (&out)[pack<T>]) {
  if (aligned) {
    const Pack<T> packed = *reinterpret_cast<const Pack<T>*>(p);
#pragma unroll
    for (int i = 0; i < pack<T>; i++) out[i] = widen(packed.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < pack<T>; i++) out[i] = i < count ? widen(p[i]) : 0.0f;
  }
}

template <bool aligned, class T>
__device__ __forceinline__ void store_pack(T* p, int64_t count, const float (&values)[pack<T>]) {
  if (aligned) {
    Pack<T> packed;
#pragma unroll
    for (int i = 0; i < pack<T>; i++) narrow(values[i], packed.at[i]);
    *reinterpret_cast<Pack<T>*>(p) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < pack<T>; i++)
      if (i < count) narrow(values[i], p[i]);
  }
}

// `count` (a multiple of four) floats at a 16-byte aligned address.
template <int count>
__device__ __forceinline__ void load_floats(const float* p, float (&out)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(p + i);
    out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
  }
}
template <int count>
__device__ __forceinline__ void store_floats(float* p, const float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 4)
    *reinterpret_cast<float4*>(p + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
}

// Whether every row of a tensor can be accessed in 16-byte packs.
template <class T>
bool rows_aligned(const TensorView& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.size[t.dims - 1] % pack<T> == 0;
  for (int i = 0; i < t.dims - 1; i++) aligned = aligned && (t.size[i] <= 1 || t.stride[i] % pack<T> == 0);
  return aligned;
}

#define PVDM_WITH_TYPE(dtype, T, ...) \
  switch (dtype) {                    \
    case Dtype::f32: {                \
      using T = float;                \
      __VA_ARGS__;                    \
      break;                          \
    }                                 \
    case Dtype::bf16: {               \
      using T = __nv_bfloat16;        \
      __VA_ARGS__;                    \
      break;                          \
    }                                 \
    default: {                        \
      using T = __half;               \
      __VA_ARGS__;                    \
      break;                          \
    }                                 \
  }

}  // namespace pvdm::cuda
