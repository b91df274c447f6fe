// Packing for attention: turns strided tokens of any storage type into operands of attention_product.h, rotated on the
// way. Also the way back.
#pragma once
#include <utility>

#include "attention_product.h"

namespace pvdm::PVDM_ISA {
namespace {

// The tokens of one (batch, site, head): rows of `width` dense numbers, `stride` apart.
template <class T>
struct Tokens {
  T* data;
  int64_t stride;
  T* at(int64_t n) const { return data + n * stride; }
  Tokens from(int64_t n) const { return {at(n), stride}; }
};

// Rotation tables, rows of `padded(width)`. x becomes x cos + swap(x) sin, where swap exchanges neighbours and the sine
// carries the sign (minus at even channels). The transpose is x cos + swap(x sin). Null: no rotation.
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

// Numbers c ... c + count of token n; rotated if `turned`.
template <bool turned, class T>
PVDM_INLINE Vec piece(const Tokens<const T>& x, int64_t n, int64_t c, int count, const Rotation& rotation) {
  const Vec value = load_n(x.at(n) + c, count);
  if (!turned) return value;
  const int64_t at = n * rotation.stride + c;
  return value * load(rotation.cos + at) + swap_neighbours(value) * load(rotation.sin + at);
}
template <class T>
PVDM_INLINE Vec piece(const Tokens<const T>& x, int64_t n, int64_t c, int64_t width) {
  return piece<false>(x, n, c, count_at(c, width), Rotation{});
}

template <bool turned>
PVDM_INLINE Vec unrotated(Vec x, int64_t n, int64_t c, const Rotation& rotation) {
  if (!turned) return x;
  const int64_t at = n * rotation.stride + c;
  return x * load(rotation.cos + at) + swap_neighbours(x * load(rotation.sin + at));
}

// How many words hold `numbers` numbers, padded with zeros to whole steps.
template <class Op>
constexpr int64_t words(int64_t numbers) {
  constexpr int64_t whole = Op::step * Op::depth;
  return (numbers + whole - 1) / whole * Op::depth;
}

// Words k ... k + lanes along the width of token n. whole: the width reaches at least that far.
template <class Op, bool turned, bool whole, class T>
PVDM_INLINE Vec along(const Tokens<const T>& x, int64_t n, int64_t k, int64_t width, const Rotation& rotation) {
#if defined(PVDM_ISA_AVX512BF16)
  if constexpr (Op::step == 2) {
    const int64_t first = 2 * k, second = first + lanes;
    const Vec low = piece<turned>(x, n, first, whole ? lanes : count_at(first, width), rotation);
    if (!whole && second >= width) return bit_cast<Vec>(_mm512_cvtne2ps_pbh(__m512{}, bit_cast<__m512>(low)));
    const Vec high = piece<turned>(x, n, second, whole ? lanes : count_at(second, width), rotation);
    return bit_cast<Vec>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
  }
#endif
  return piece<turned>(x, n, k, whole ? lanes : count_at(k, width), rotation);
}

#if defined(PVDM_ISA_AVX512BF16)
// Word i of the result holds low[i] and high[i].
PVDM_INLINE Vec paired(Vec low, Vec high) {
  static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
  return bit_cast<Vec>(_mm512_permutexvar_epi16(fetch<__m512i>(order), both));
}
#endif

template <class Op, bool turned, bool transposed, bool whole, class T>
PVDM_INLINE void pack_square(const Tokens<const T>& x, int64_t count, int64_t k, int64_t width, const Rotation& rotation,
                             float* to, int64_t stride) {
  Vec square[lanes];
  if (whole) {
#pragma GCC unroll 16
    for (int n = 0; n < lanes; n++) square[n] = along<Op, turned, true>(x, n, k, width, rotation);
  } else {
    for (int n = 0; n < lanes; n++) square[n] = n < count ? along<Op, turned, false>(x, n, k, width, rotation) : Vec{};
  }
  if (transposed) transpose(square);
  if (whole) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++) store(to + i * stride, square[i]);
  } else {
    for (int64_t i = 0; i < count_at(k, words<Op>(width)); i++) store(to + i * stride, square[i]);
  }
}

// A single token as a panel: filling one lane needs no transpose.
template <class Op, bool turned, class T>
PVDM_INLINE void pack_lane(const Tokens<const T>& x, int64_t k, int64_t width, const Rotation& rotation, float* to,
                           int64_t stride) {
  float numbers[lanes];
  store(numbers, along<Op, turned, false>(x, 0, k, width, rotation));
  for (int64_t i = 0; i < count_at(k, words<Op>(width)); i++) {
    store(to + i * stride, Vec{});
    to[i * stride] = numbers[i];
  }
}

template <class Op, bool turned, bool transposed, class T>
__attribute__((noinline)) void pack_squares(const Tokens<const T>& x, int64_t count, int64_t width,
                                            const Rotation& rotation, float* to, int64_t stride) {
  int64_t k = 0;
  if (count == lanes)
    for (; (k + lanes) * Op::step <= width; k += lanes)
      pack_square<Op, turned, transposed, true>(x, count, k, width, rotation, to + k * stride, stride);
  for (; k < words<Op>(width); k += lanes)
    if (transposed && count == 1)
      pack_lane<Op, turned>(x, k, width, rotation, to + k * stride, stride);
    else
      pack_square<Op, turned, transposed, false>(x, count, k, width, rotation, to + k * stride, stride);
}

// Packs `count` <= lanes tokens. transposed: word k of token n goes to to[k * stride + n], and lanes beyond the count
// get zeros. Otherwise each square of lanes x lanes words keeps one token per row.
template <class Op, bool transposed = true, class T>
PVDM_INLINE void pack_panel(const Tokens<const T>& x, int64_t count, int64_t width, const Rotation& rotation, float* to,
                            int64_t stride) {
  if (rotation.cos)
    pack_squares<Op, true, transposed>(x, count, width, rotation, to, stride);
  else
    pack_squares<Op, false, transposed>(x, count, width, rotation, to, stride);
}

// A left operand: all tokens as panels of `lanes` tokens.
template <class Op, class T>
PVDM_INLINE void pack_panels(const Tokens<const T>& x, int64_t count, int64_t width, const Rotation& rotation, float* to) {
  const int64_t panel = words<Op>(width) * lanes;
  for (int64_t n = 0; n < count; n += lanes, to += panel)
    pack_panel<Op, Op::depth == 1>(x.from(n), count_at(n, count), width, rotation.from(n), to, lanes);
}

// Flips the sign of every number in `count` words.
template <class Op>
PVDM_INLINE void negate(float* data, int64_t count) {
  const uint32_t signs = Op::step == 2 ? 0x80008000u : 0x80000000u;
  for (int64_t i = 0; i < count; i += lanes) store(data + i, bit_cast<Vec>(fetch<Words>(data + i) ^ signs));
}

template <class Op, bool turned, class T>
PVDM_INLINE void pack_row(const Tokens<const T>& x, int64_t n, bool pair, int64_t c, int width, const Rotation& rotation,
                          float* to) {
  const Vec low = piece<turned>(x, n, c, width, rotation);
#if defined(PVDM_ISA_AVX512BF16)
  if constexpr (Op::step == 2) {
    store(to, paired(low, pair ? piece<turned>(x, n + 1, c, width, rotation) : Vec{}));
    return;
  }
#endif
  (void)pair;
  store(to, low);
}

template <class Op, bool turned, class T>
__attribute__((noinline)) void pack_all_rows(const Tokens<const T>& x, int64_t count, int64_t width,
                                             const Rotation& rotation, float* to) {
  for (int64_t n = 0; n < count; n += Op::step) {
    int64_t c = 0;
    for (; c + lanes <= width; c += lanes, to += lanes)
      pack_row<Op, turned>(x, n, n + 1 < count, c, lanes, rotation, to);
    if (c == width) continue;
    pack_row<Op, turned>(x, n, n + 1 < count, c, count_at(c, width), rotation, to);
    to += lanes;
  }
  const int64_t zeros = words<Op>(count) - (count + Op::step - 1) / Op::step;
  for (int64_t i = 0; i < zeros * padded(width); i += lanes, to += lanes) store(to, Vec{});
}

// A right operand, token by token. Word c of row n / step holds number c of token n (of pairs: and of token n + 1).
// Rows have padded(width) words.
template <class Op, class T>
PVDM_INLINE void pack_rows(const Tokens<const T>& x, int64_t count, int64_t width, const Rotation& rotation, float* to) {
  if (rotation.cos)
    pack_all_rows<Op, true>(x, count, width, rotation, to);
  else
    pack_all_rows<Op, false>(x, count, width, rotation, to);
}

// The same tokens as a left operand.
template <class Op, class T>
PVDM_INLINE void pack_left_rows(const Tokens<const T>& x, int64_t count, int64_t width, const Rotation& rotation,
                                float* to) {
  pack_rows<Op>(x, count, width, rotation, to);
  if constexpr (Op::depth == 1) return;
  const int64_t stride = padded(width);
  for (int64_t n = 0; n < words<Op>(count); n += lanes)
    for (int64_t c = 0; c < stride; c += lanes) {
      float* corner = to + n * stride + c;
      Vec square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) square[i] = load(corner + i * stride);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) store(corner + i * stride, square[i]);
    }
}

template <bool turned, class T>
PVDM_INLINE void write_all_rows(const float* from, int64_t count, int64_t width, float scale, const Rotation& rotation,
                                const Tokens<T>& to) {
  for (int64_t n = 0; n < count; n++) {
    int64_t c = 0;
    for (; c + lanes <= width; c += lanes, from += lanes)
      store(to.at(n) + c, unrotated<turned>(load(from) * scale, n, c, rotation));
    if (c == width) continue;
    store_n(to.at(n) + c, unrotated<turned>(load(from) * scale, n, c, rotation), count_at(c, width));
    from += lanes;
  }
}

// Writes rows of floats to tokens: scaled, and rotated back.
template <class T>
void write_rows(const float* from, int64_t count, int64_t width, float scale, const Rotation& rotation,
                const Tokens<T>& to) {
  if (rotation.cos)
    write_all_rows<true>(from, count, width, scale, rotation, to);
  else
    write_all_rows<false>(from, count, width, scale, rotation, to);
}

template <bool turned, class T>
PVDM_INLINE void write_all_columns(const float* from, int64_t stride, int64_t count, int64_t width, Vec factor,
                                   const Rotation& rotation, const Tokens<T>& to) {
  for (int64_t c = 0; c < width; c += lanes) {
    Vec square[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++) square[i] = load(from + (c + i) * stride) * factor;
    transpose(square);
    if (count == lanes && c + lanes <= width) {
#pragma GCC unroll 16
      for (int n = 0; n < lanes; n++) store(to.at(n) + c, unrotated<turned>(square[n], n, c, rotation));
    } else {
      for (int n = 0; n < count; n++) store_n(to.at(n) + c, unrotated<turned>(square[n], n, c, rotation), count_at(c, width));
    }
  }
}

// Writes `count` <= lanes columns of a transposed block (rows `stride` apart) to tokens. Each lane has its own factor.
template <class T>
void write_columns(const float* from, int64_t stride, int64_t count, int64_t width, Vec factor, const Rotation& rotation,
                   const Tokens<T>& to) {
  if (rotation.cos)
    write_all_columns<true>(from, stride, count, width, factor, rotation, to);
  else
    write_all_columns<false>(from, stride, count, width, factor, rotation, to);
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
