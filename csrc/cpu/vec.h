// A vector of floats in the widest registers of the instruction set that this file is compiled for. Also its
// conversions from and to the storage types. Everything is inlined in the set's namespace, so the linker can't mix up
// the sets. Names follow Highway where they mean the same.
#pragma once
#include <cstdint>
#include <cstring>

#include "../constants.h"
#include "../tensor_view.h"
#if defined(PVDM_ISA_AMX)
#define PVDM_ISA_AVX512BF16  // includes everything of AVX-512
#endif
#if defined(PVDM_ISA_AVX512BF16)
#define PVDM_ISA_AVX512
#endif
#if defined(PVDM_ISA_AVX2) || defined(PVDM_ISA_AVX512)
#include <immintrin.h>
#endif

#define PVDM_INLINE static inline __attribute__((always_inline))

namespace pvdm::PVDM_ISA {

#if defined(PVDM_ISA_AVX512)
constexpr int lanes = 16;
#elif defined(PVDM_ISA_AVX2)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Vec __attribute__((vector_size(lanes * 4)));
typedef int32_t Ints __attribute__((vector_size(lanes * 4)));
typedef uint32_t Words __attribute__((vector_size(lanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(lanes * 2)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

PVDM_INLINE Vec splat(float x) { return x - Vec{}; }  // x + 0 would not be folded, because it changes -0

template <class To, class From>
PVDM_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class To>
PVDM_INLINE To fetch(const void* p) {
  To to;
  memcpy(&to, p, sizeof to);
  return to;
}

// float16 by bit operations, for sets without a conversion instruction. A float subtraction handles values below 2^-14.
PVDM_INLINE Vec promote(Halves h) {
  const Words w = __builtin_convertvector(h, Words), sign = (w & 0x8000u) << 16, body = w & 0x7fffu;
  const Words normal = (body << 13) + 0x38000000u, special = (body << 13) | 0x7f800000u;
  const Vec tiny = bit_cast<Vec>((body << 13) + 0x38800000u) - bit_cast<Vec>(Words{} + 0x38800000u);
  Words out = body < 0x400u ? bit_cast<Words>(tiny) : normal;
  out = body >= 0x7c00u ? special : out;
  return bit_cast<Vec>(out | sign);
}

PVDM_INLINE Halves demote(Vec x) {
  const Words u = bit_cast<Words>(x), sign = (u >> 16) & 0x8000u, body = u & 0x7fffffffu;
  const Words rounded = (body - 0x38000000u + 0xfffu + ((body >> 13) & 1u)) >> 13;
  const Vec half = bit_cast<Vec>(Words{} + 0x3f000000u);  // 0.5: its last bit is worth 2^-24, float16's smallest number
  const Words tiny = bit_cast<Words>(bit_cast<Vec>(body) + half) - 0x3f000000u;
  Words out = body < 0x38800000u ? tiny : rounded;
  out = body >= 0x477ff000u ? Words{} + 0x7c00u : out;  // rounds to infinity
  out = body > 0x7f800000u ? Words{} + 0x7e00u : out;   // NaN
  return __builtin_convertvector(out | sign, Halves);
}

PVDM_INLINE Vec load(const float* p) { return fetch<Vec>(p); }
PVDM_INLINE void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }

// Intrinsics, because GCC 12 makes three instructions of each of these conversions between 16 and 32 bits.
#if defined(PVDM_ISA_AVX512)
PVDM_INLINE Words promote_bits(const void* p) { return bit_cast<Words>(_mm512_cvtepu16_epi32(fetch<__m256i>(p))); }
PVDM_INLINE Halves demote_bits(Words w) { return bit_cast<Halves>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(w))); }
#elif defined(PVDM_ISA_AVX2)
PVDM_INLINE Words promote_bits(const void* p) { return bit_cast<Words>(_mm256_cvtepu16_epi32(fetch<__m128i>(p))); }
PVDM_INLINE Halves demote_bits(Words w) {  // w below 2^16
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(bit_cast<__m256i>(w), bit_cast<__m256i>(w)), 0x08);
  return bit_cast<Halves>(_mm256_castsi256_si128(pairs));
}
#else
PVDM_INLINE Words promote_bits(const void* p) { return __builtin_convertvector(fetch<Halves>(p), Words); }
PVDM_INLINE Halves demote_bits(Words w) { return __builtin_convertvector(w, Halves); }
#endif

PVDM_INLINE Vec load(const bf16* p) { return bit_cast<Vec>(promote_bits(p) << 16); }
PVDM_INLINE void store(bf16* p, Vec x) {
  const Words u = bit_cast<Words>(x), nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Halves h = demote_bits((u & 0x7fffffffu) > 0x7f800000u ? Words{} + 0x7fc0u : nearest);
  memcpy(p, &h, sizeof h);
}

#if defined(PVDM_ISA_AVX512)
PVDM_INLINE Vec load(const f16* p) { return bit_cast<Vec>(_mm512_cvtph_ps(fetch<__m256i>(p))); }
PVDM_INLINE void store(f16* p, Vec x) {
  const __m256i h = _mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &h, sizeof h);
}
#elif defined(PVDM_ISA_AVX2)
PVDM_INLINE Vec load(const f16* p) { return bit_cast<Vec>(_mm256_cvtph_ps(fetch<__m128i>(p))); }
PVDM_INLINE void store(f16* p, Vec x) {
  const __m128i h = _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &h, sizeof h);
}
#else
PVDM_INLINE Vec load(const f16* p) { return promote(fetch<Halves>(p)); }
PVDM_INLINE void store(f16* p, Vec x) {
  const Halves h = demote(x);
  memcpy(p, &h, sizeof h);
}
#endif

#if defined(PVDM_ISA_AVX512)
// AVX-512 versions of the general functions below, whose detour through memory costs about 20 cycles.
PVDM_INLINE Vec load_n(const float* p, int count) {
  if (count >= lanes) return load(p);
  return bit_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
}
PVDM_INLINE void store_n(float* p, Vec x, int count) {
  if (count >= lanes) return store(p, x);
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), bit_cast<__m512>(x));
}
PVDM_INLINE Vec load_n(const bf16* p, int count) {
  if (count >= lanes) return load(p);
  const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return bit_cast<Vec>(__builtin_convertvector(bit_cast<Halves>(halves), Words) << 16);
}
PVDM_INLINE void store_n(bf16* p, Vec x, int count) {
  if (count >= lanes) return store(p, x);
  bf16 whole[lanes];
  store(whole, x);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), fetch<__m256i>(whole));
}
#endif

// Only the first `count` lanes. The others load as zero, and their memory is not touched.
template <class T>
PVDM_INLINE Vec load_n(const T* p, int count) {
  if (count >= lanes) return load(p);
  T part[lanes] = {};
  for (int i = 0; i < count; i++) part[i] = p[i];
  return load(part);
}
template <class T>
PVDM_INLINE void store_n(T* p, Vec x, int count) {
  if (count >= lanes) return store(p, x);
  T part[lanes];
  store(part, x);
  for (int i = 0; i < count; i++) p[i] = part[i];
}

// exp, within 2 ulp on [-87, 88] and clamped outside. NaN stays NaN. exp(x) = 2^n p(r), r in [-ln 2 / 2, ln 2 / 2].
PVDM_INLINE Vec exp(Vec x) {
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = x * log2_e + magic, n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bit_cast<Vec>((bit_cast<Ints>(shifted) - 0x4b400000 + 127) << 23);
}
PVDM_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

PVDM_INLINE int64_t padded(int64_t channels) { return (channels + lanes - 1) / lanes * lanes; }
PVDM_INLINE int count_at(int64_t c, int64_t channels) {
  return channels - c < lanes ? static_cast<int>(channels - c) : lanes;
}

// Calls body(c, count) for every register of a row. The count is a constant except in the last call. So the loop
// doesn't test it, and the compiler keeps constants in registers. Mark the body with PVDM_BODY.
#define PVDM_BODY __attribute__((always_inline))
template <class F>
PVDM_INLINE void for_registers(int64_t channels, const F& body) {
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) body(c, lanes);
  if (c < channels) body(c, static_cast<int>(channels - c));
}

// Runs the code with T as the storage type of a dtype.
#define PVDM_WITH_TYPE(dtype, T, ...)   \
  switch (dtype) {                      \
    case Dtype::f32: {                  \
      using T = float;                  \
      __VA_ARGS__;                      \
      break;                            \
    }                                   \
    case Dtype::bf16: {                 \
      using T = bf16;                   \
      __VA_ARGS__;                      \
      break;                            \
    }                                   \
    default: {                          \
      using T = f16;                    \
      __VA_ARGS__;                      \
      break;                            \
    }                                   \
  }

}  // namespace pvdm::PVDM_ISA
