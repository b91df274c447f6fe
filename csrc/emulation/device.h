// A host stand-in for a CUDA device: the vocabulary of the .cu files in C++, so that g++ builds them and tests run
// them.
//
// tests/backends/cuda/test_emulation.py plants each fault that it catches:
// - reads of shared memory that nothing wrote, or that a pending cp.async will write: NaN
// - missing barriers: schedules disagree, and ThreadSanitizer reports a race
// - barriers and warp operations that not all threads reach, wrong masks, copies never waited for: errors
// - wrong addresses: AddressSanitizer
// - missing atomics: ThreadSanitizer
//
// It doesn't show speed, nor a tensor core's rounding.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "warp.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define PVDM_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ::pvdm::emulation::launch(grid, block, bytes, [&] { (kernel)(__VA_ARGS__); })
#define PVDM_SHARED(T, name, count)                                                 \
  static const char name##_key = 0;                                                 \
  T* const name = reinterpret_cast<T*>(::pvdm::emulation::static_shared(&name##_key, sizeof(T) * (count)))
#define PVDM_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(::pvdm::emulation::dynamic_shared())
#define threadIdx (::pvdm::emulation::thread_index())
#define blockIdx (::pvdm::emulation::block_index())
#define gridDim (::pvdm::emulation::grid_size())
#define PVDM_TEXT_(x) #x
#define PVDM_TEXT(x) PVDM_TEXT_(x)
#define __syncthreads() ::pvdm::emulation::barrier("the barrier in " __FILE__ ":" PVDM_TEXT(__LINE__))
#define __syncwarp() ((void)::pvdm::emulation::ballot(0xffffffffu, true))

namespace pvdm::emulation {
inline Index thread_index() {
  const Bookkeeping quiet;
  return block().running->thread;
}
inline Index block_index() {
  const Bookkeeping quiet;
  return block().index;
}
inline Index grid_size() {
  const Bookkeeping quiet;
  return block().grid_size;
}
inline unsigned char* dynamic_shared() {
  const Bookkeeping quiet;
  return block().dynamic;
}
}  // namespace pvdm::emulation

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  operator pvdm::emulation::Index() const { return {x, y, z}; }
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t u = uint32_t{v.bits} << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return {static_cast<uint16_t>(f != f ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
using __half = _Float16;
inline float __half2float(__half v) { return v; }
inline __half __float2half(float f) { return static_cast<__half>(f); }

enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// For values of any 32-bit type.
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return pvdm::emulation::shuffle(mask, value, from % 32, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  return pvdm::emulation::shuffle(mask, value, pvdm::emulation::lane() ^ offset, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  const int from = pvdm::emulation::lane() + offset;
  return pvdm::emulation::shuffle(mask, value, from < 32 ? from : -1, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, int value) { return pvdm::emulation::ballot(mask, value != 0); }
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }

inline float atomicAdd(float* to, float value) {
  auto* bits = reinterpret_cast<uint32_t*>(to);
  uint32_t old = __atomic_load_n(bits, __ATOMIC_RELAXED), next;
  float was;
  do {
    memcpy(&was, &old, 4);
    const float sum = was + value;
    memcpy(&next, &sum, 4);
  } while (!__atomic_compare_exchange_n(bits, &old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return was;
}
inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
