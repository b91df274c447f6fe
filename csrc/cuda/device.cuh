// A warp's matrix instructions, asynchronous copies and fast exponential: inline PTX on a device, csrc/emulation on the
// host.
#pragma once
#include "launch.cuh"

namespace pvdm::cuda {

constexpr unsigned whole_warp = 0xffffffffu;

// Row and column of a lane's value i of a 16 x 8 result of mma, the n-th to the right: `half` is i / 2.
__device__ __forceinline__ int lane_row(int half) { return static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half; }
__device__ __forceinline__ int lane_column(int n, int i) { return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }

#ifdef PVDM_EMULATE
inline float emulated_bf16(uint16_t bits) { return __bfloat162float({bits}); }
inline float emulated_f16(uint16_t bits) {
  __half h;
  memcpy(&h, &bits, 2);
  return __half2float(h);
}
#else
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Loads four 8 x 8 matrices of 16-bit values from shared memory. Lane 8 m + r passes the address of row r of matrix m.
// Register m gets row lane / 4 of matrix m, elements 2 (lane % 4) and the next one. `transposed` swaps column and row.
template <bool transposed = false>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
#ifdef PVDM_EMULATE
  emulation::ldmatrix(to, row, 4, transposed);
#else
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// c (16 x 8) += a (16 x 16, row-major) b (16 x 8, column-major), in float. Fragments as in the PTX manual, m16n8k16.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#ifdef PVDM_EMULATE
template <>
inline void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulation::mma<emulated_bf16>(c, a, b, "mma (bf16)");
}
template <>
inline void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulation::mma<emulated_f16>(c, a, b, "mma (f16)");
}
#else
#define PVDM_MMA(type)                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                               \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                           uint32_t b1) {
  PVDM_MMA("bf16");
}
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  PVDM_MMA("f16");
}
#undef PVDM_MMA
#endif

// Copies 16 bytes from global to shared memory, bypassing registers. Writes zeros if not `valid`. Both addresses must
// be 16-byte aligned.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
#ifdef PVDM_EMULATE
  emulation::copy_async(to, from, valid);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifdef PVDM_EMULATE
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most the `pending` newest groups of this thread are in flight. To see other threads' copies, add a
// barrier.
template <int pending>
__device__ __forceinline__ void wait_copies() {
#ifdef PVDM_EMULATE
  emulation::wait_copies(pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// 2^x, within 2 ulp. -infinity gives 0.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef PVDM_EMULATE
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 2^x for x of at most 0: a probability from its logarithm. Rounding must not make it more than 1. NaN stays NaN.
__device__ __forceinline__ float probability(float x) { return fast_exp2(x > 0.0f ? 0.0f : x); }

// 1 / x, within 1 ulp; without the branches for the smallest and largest numbers.
__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef PVDM_EMULATE
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The standard normal distribution function. Abramowitz and Stegun 7.1.26, within 2.8e-7, as in kernels/math.py.
__device__ __forceinline__ float normal_cdf(float x) {
  const float t = fast_reciprocal(1.0f + 0.23164188821f * fabsf(x));
  float tail = 0.5307027145f * t - 0.7265760135f;
  tail = tail * t + 0.7107068705f;
  tail = tail * t - 0.142248368f;
  tail = (tail * t + 0.127414796f) * t * fast_exp2(-0.7213475204444817f * x * x);
  return x < 0.0f ? tail : 1.0f - tail;
}

// A score times its scale, rounded by itself. Fused with the subtraction of the (rounded) maximum, the largest score's
// probability would not be 1: at scores of 1e6 it would be 1.04.
__device__ __forceinline__ float scaled(float score, float scale) {
#ifdef PVDM_EMULATE
  const volatile float product = score * scale;
  return product;
#else
  return __fmul_rn(score, scale);
#endif
}

// The maximum to subtract from scores. Where all scores so far are -inf it is 0, because -inf - -inf is NaN.
__device__ __forceinline__ float base_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// Packs two values into one register of 16-bit halves, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  T pair[2];
  narrow(low, pair[0]);
  narrow(high, pair[1]);
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

}  // namespace pvdm::cuda
