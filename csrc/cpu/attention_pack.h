// Packing for attention: tokens by strides, any storage type, rotated on the way, into operands of attention_product.h;
// and the way back.
#pragma once
#include <utility>

#include "attention_product.h"

namespace pvdm::PVDM_ISA {
namespace {

// The tokens of one (batch, place, head): `width` numbers each, dense, a stride apart.
template <class T>
struct Tokens {
  T* data;
  int64_t stride;
  T* at(int64_t n) const { return data + n * stride; }
  Tokens from(int64_t n) const { return {at(n), stride}; }
};

// Rotation tables, rows of `padded(width)`: x becomes x cos + swap(x) sin, where swap exchanges neighbours and the sine
// carries the sign: minus at even places. Null: no rotation. The transpose is x cos + swap(x sin).
struct Rotation {
  const float *cos = nullptr, *sin = nullptr;
  int64_t stride = 0;
  Rotation from(int64_t n) const { return cos ? Rotation{cos + n * stride, sin + n * stride, stride} : Rotation{}; }
};

template <int... index>
PVDM_INLINE Vec shuffle(Vec a, Vec b, std::integer_sequence<int, index...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, Ints{index...});
#endif
}
template <int start, int... i>
constexpr auto interleaved(std::integer_sequence<int, i...>) {
  return std::integer_sequence<int, (i % 2 * lanes + start + i / 2)...>{};
}
template <int... i>
constexpr auto neighbours(std::integer_sequence<int, i...>) {
  return std::integer_sequence<int, (i ^ 1)...>{};
}
using Lanes = std::make_integer_sequence<int, lanes>;

PVDM_INLINE Vec swap_neighbours(Vec x) { return shuffle(x, x, neighbours(Lanes{})); }

// Transposes in log2(lanes) perfect shuffles.
PVDM_INLINE void transpose(Vec (&x)[lanes]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < lanes; stage *= 2) {
    Vec y[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; i++) {
      y[2 * i] = shuffle(x[i], x[i + lanes / 2], interleaved<0>(Lanes{}));
      y[2 * i + 1] = shuffle(x[i], x[i + lanes / 2], interleaved<lanes / 2>(Lanes{}));
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++) x[i] = y[i];
  }
}

// Numbers c ... c + lanes of token n, rotated.
template <class T>
PVDM_INLINE Vec piece(const Tokens<const T>& x, int64_t n, int64_t c, int64_t width, const Rotation& rotation) {
  const Vec value = load(x.at(n) + c, count_at(c, width));
  if (!rotation.cos) return value;
  const int64_t at = n * rotation.stride + c;
  return value * load(rotation.cos + at) + swap_neighbours(value) * load(rotation.sin + at);
}

PVDM_INLINE Vec unrotated(Vec x, int64_t n, int64_t c, const Rotation& rotation) {
  if (!rotation.cos) return x;
  const int64_t at = n * rotation.stride + c;
  return x * load(rotation.cos + at) + swap_neighbours(x * load(rotation.sin + at));
}

template <class Op>
constexpr int64_t words(int64_t numbers) {
  return (numbers + Op::step - 1) / Op::step;
}

// Words c ... c + lanes along the width of token n.
template <class Op, class T>
PVDM_INLINE Vec along(const Tokens<const T>& x, int64_t n, int64_t c, int64_t width, const Rotation& rotation) {
#if defined(PVDM_ISA_AVX512BF16)
  if constexpr (Op::step == 2) {
    const int64_t first = 2 * c, second = first + lanes;
    const Vec low = piece(x, n, first, width, rotation);
    const Vec high = second < width ? piece(x, n, second, width, rotation) : Vec{};
    return cast<Vec>(_mm512_cvtne2ps_pbh(cast<__m512>(high), cast<__m512>(low)));
  }
#endif
  return piece(x, n, c, width, rotation);
}

#if defined(PVDM_ISA_AVX512BF16)
// (low[i], high[i]) side by side in word i.
PVDM_INLINE Vec paired(Vec low, Vec high) {
  static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = cast<__m512i>(_mm512_cvtne2ps_pbh(cast<__m512>(high), cast<__m512>(low)));
  return cast<Vec>(_mm512_permutexvar_epi16(fetch<__m512i>(order), both));
}
#endif

// `count` <= lanes tokens, transposed: word k of token n goes to to[k * stride + n]; lanes beyond the count get zeros.
template <class Op, class T>
void pack_panel(const Tokens<const T>& x, int64_t count, int64_t width, const Rotation& rotation, float* to,
                int64_t stride) {
  const int64_t all = words<Op>(width);
  for (int64_t k = 0; k < all; k += lanes) {
    Vec square[lanes];
    if (count == lanes) {
#pragma GCC unroll 16
      for (int n = 0; n < lanes; n++) square[n] = along<Op>(x, n, k, width, rotation);
    } else {
      for (int n = 0; n < lanes; n++) square[n] = n < count ? along<Op>(x, n, k, width, rotation) : Vec{};
    }
    transpose(square);
    const int rows = count_at(k, all);
    if (rows == lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) store(to + (k + i) * stride, square[i]);
    } else {
      for (int i = 0; i < rows; i++) store(to + (k + i) * stride, square[i]);
    }
  }
}

// All tokens as panels of `lanes` tokens, one after another.
template <class Op, class T>
void pack_panels(const Tokens<const T>& x, int64_t count, int64_t width, const Rotation& rotation, float* to) {
  const int64_t panel = words<Op>(width) * lanes;
  for (int64_t n = 0; n < count; n += lanes, to += panel)
    pack_panel<Op>(x.from(n), count_at(n, count), width, rotation.from(n), to, lanes);
}

// Changes the sign of every number in `count` words.
template <class Op>
PVDM_INLINE void negate(float* data, int64_t count) {
  const uint32_t signs = Op::step == 2 ? 0x80008000u : 0x80000000u;
  for (int64_t i = 0; i < count; i += lanes) store(data + i, cast<Vec>(fetch<Words>(data + i) ^ signs));
}

// Token by token: word c of row n / step holds number c of tokens n (and n + 1). Rows of padded(width) words.
template <class Op, class T>
void pack_rows(const Tokens<const T>& x, int64_t count, int64_t width, const Rotation& rotation, float* to) {
  for (int64_t n = 0; n < count; n += Op::step)
    for (int64_t c = 0; c < width; c += lanes, to += lanes) {
#if defined(PVDM_ISA_AVX512BF16)
      if constexpr (Op::step == 2) {
        const Vec next = n + 1 < count ? piece(x, n + 1, c, width, rotation) : Vec{};
        store(to, paired(piece(x, n, c, width, rotation), next));
        continue;
      }
#endif
      store(to, piece(x, n, c, width, rotation));
    }
}

// Rows of floats -> tokens, scaled, rotated back.
template <class T>
void write_rows(const float* from, int64_t count, int64_t width, float scale, const Rotation& rotation,
                const Tokens<T>& to) {
  const int64_t padding = padded(width);
  for (int64_t n = 0; n < count; n++)
    for (int64_t c = 0; c < width; c += lanes)
      store(to.at(n) + c, unrotated(load(from + n * padding + c) * scale, n, c, rotation), count_at(c, width));
}

// `count` <= lanes columns of a transposed block (rows `stride` apart) -> tokens, each lane times its factor.
template <class T>
void write_columns(const float* from, int64_t stride, int64_t count, int64_t width, Vec factor, const Rotation& rotation,
                   const Tokens<T>& to) {
  for (int64_t c = 0; c < width; c += lanes) {
    Vec square[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++) square[i] = load(from + (c + i) * stride) * factor;
    transpose(square);
    for (int n = 0; n < count; n++) store(to.at(n) + c, unrotated(square[n], n, c, rotation), count_at(c, width));
  }
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
