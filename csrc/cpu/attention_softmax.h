// The element-wise half of attention: base-2 exponentials, running maxima and sums, lane by lane.
#pragma once
#include "attention_pack.h"

namespace pvdm::PVDM_ISA {
namespace {

constexpr float minus_infinity = -__builtin_inff();

// If b is NaN, the result is NaN. So NaN spreads.
PVDM_INLINE Vec max(Vec a, Vec b) {
#if defined(PVDM_ISA_AVX512)
  return bit_cast<Vec>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(PVDM_ISA_AVX2)
  return bit_cast<Vec>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

PVDM_INLINE Vec min(Vec a, Vec b) {
#if defined(PVDM_ISA_AVX512)
  return bit_cast<Vec>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(PVDM_ISA_AVX2)
  return bit_cast<Vec>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

// 2^x for x <= about 0. Below 2^-126, where denormals are slow, the result is 0. Relative error 1e-7, or 8e-5 where the
// result is rounded to bf16 anyway.
template <class Op>
PVDM_INLINE Vec exp2(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = x + magic, whole = shifted - magic, r = x - whole;
  Vec p;
  if constexpr (Op::step == 2) {
    p = splat(5.51716574e-2f);
    p = p * r + 2.42611155e-1f;
    p = p * r + 6.93260968e-1f;
    p = p * r + 9.99928057e-1f;
  } else {
    p = splat(1.32764713e-3f);
    p = p * r + 9.67554189e-3f;
    p = p * r + 5.55071346e-2f;
    p = p * r + 2.40221202e-1f;
    p = p * r + 6.93146944e-1f;
    p = p * r + 1.00000012f;
  }
#if defined(PVDM_ISA_AVX512)
  const __mmask16 seen = _mm512_cmp_ps_mask(bit_cast<__m512>(x), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // keeps NaN
  return bit_cast<Vec>(_mm512_maskz_scalef_ps(seen, bit_cast<__m512>(p), bit_cast<__m512>(whole)));
#else
  const Ints result = bit_cast<Ints>(p) + (bit_cast<Ints>(shifted) << 23), unseen = x < splat(-126.0f);
  return bit_cast<Vec>(result & ~unseen);
#endif
}

// log2 of a positive normal number, within 2e-7 (absolute or relative). NaN and infinity give NaN.
PVDM_INLINE Vec log2(Vec x) {
  const Ints bits = bit_cast<Ints>(x) - 0x3f3504f3;  // the mantissa then lies between sqrt(1/2) and sqrt(2)
  const Vec exponent = __builtin_convertvector(bits >> 23, Vec);
  const Vec m = bit_cast<Vec>((bits & 0x7fffff) + 0x3f3504f3);
  const Vec t = (m - 1.0f) / (m + 1.0f), q = t * t;
  const Vec series = (((q * (1.0f / 9) + 1.0f / 7) * q + 0.2f) * q + 1.0f / 3) * q + 1.0f;
  return exponent + t * series * (2 * log2_e) + (x - x);
}

// A probability from its recomputed logarithm. Rounding must not make it more than 1: scores of 1e9 would overflow.
template <class Op>
PVDM_INLINE Vec probability(Vec log) {
  return exp2<Op>(min(Vec{}, log));
}

// A mask with all bits set in the first `count` lanes.
PVDM_INLINE Ints first_n(int count) {
  Ints mask;
  for (int i = 0; i < lanes; i++) mask[i] = i < count ? -1 : 0;
  return mask;
}
PVDM_INLINE Vec masked(Vec x, Ints mask) { return bit_cast<Vec>(bit_cast<Ints>(x) & mask); }

PVDM_INLINE float reduce_sum(Vec x) {
  float sum = 0;
  for (int i = 0; i < lanes; i++) sum += x[i];
  return sum;
}

// The maximum to subtract from scores. Where all scores so far are -inf it is 0, because -inf - -inf is NaN.
PVDM_INLINE Vec base_of(Vec top) { return top == minus_infinity ? Vec{} : top; }

// Turns a block of scores into probabilities, in place, relative to the running maximum. The block is keys x queries in
// rows of block_queries, `vectors` vectors of queries wide. maximum (unscaled) and total: per query. factor: what
// earlier sums must be multiplied with. With bf16 pairs, row i of the result holds rows 2i and 2i + 1 side by side. The
// zeros that the next product needs follow.
//
// The difference is taken before it is scaled, so the largest score gives exactly 2^0. If the maximum were scaled
// first, it would be rounded differently from the scores. At scores of 1e6 its probability would be 1.04. bf16 would
// round that again, and a gradient that should be 0 (dP - D, where D comes from the result) would be noise.
template <class Op>
void exponentials(float* scores, int64_t keys, int64_t vectors, float scale, bool first, float* maximum, float* total,
                  float* factor) {
  for (int64_t v = 0; v < vectors; v++) {
    float* s = scores + v * lanes;
    Vec tops[4] = {splat(minus_infinity), splat(minus_infinity), splat(minus_infinity), splat(minus_infinity)};
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) tops[i] = max(tops[i], load(s + (j + i) * block_queries));
    for (; j < keys; j++) tops[0] = max(tops[0], load(s + j * block_queries));
    Vec top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    if (!first) top = max(load(maximum + v * lanes), top);
    const Vec base = base_of(top);
    Vec sums[2] = {};
    for (j = 0; j + 2 <= keys; j += 2) {
      const Vec a = exp2<Op>((load(s + j * block_queries) - base) * scale);
      const Vec b = exp2<Op>((load(s + (j + 1) * block_queries) - base) * scale);
      sums[0] += a;
      sums[1] += b;
#if defined(PVDM_ISA_AVX512BF16)
      if constexpr (Op::step == 2) {
        store(s + j / 2 * block_queries, paired(a, b));
        continue;
      }
#endif
      store(s + j * block_queries, a);
      store(s + (j + 1) * block_queries, b);
    }
    if (j < keys) {
      const Vec a = exp2<Op>((load(s + j * block_queries) - base) * scale);
      sums[0] += a;
#if defined(PVDM_ISA_AVX512BF16)
      store(s + j / Op::step * block_queries, Op::step == 2 ? paired(a, Vec{}) : a);
#else
      store(s + j * block_queries, a);
#endif
    }
    for (j = (keys + Op::step - 1) / Op::step; j < words<Op>(keys); j++) store(s + j * block_queries, Vec{});
    Vec sum = sums[0] + sums[1];
    if (!first) {
      const Vec change = exp2<Floats>((load(maximum + v * lanes) - base) * scale);
      store(factor + v * lanes, change);
      sum += load(total + v * lanes) * change;
    }
    store(maximum + v * lanes, top);
    store(total + v * lanes, sum);
  }
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
