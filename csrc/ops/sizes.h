// Sizes from Python may be any whole numbers, so their sums and products are checked for overflow.
#pragma once
#include <initializer_list>
#include <vector>

#include "../tensor_checks.h"

namespace pvdm {

inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (int64_t factor : factors)
    require(!__builtin_mul_overflow(result, factor, &result), "The sizes multiply to more than 2^63 - 1.");
  return result;
}

inline int64_t sum(int64_t a, int64_t b) {
  int64_t result;
  require(!__builtin_add_overflow(a, b, &result), "The sizes add up to more than 2^63 - 1.");
  return result;
}

// (..., C) as (rows, C), and (...) as (rows) where `kept` is 0: the axes before the last `kept` must lie at one stride.
inline TensorView rows_of(const char* name, const TensorView& t, int kept = 1) {
  if (!t.data || t.dims == kept + 1) return t;
  TensorView rows = t;
  rows.dims = kept + 1;
  rows.size[0] = 1;
  rows.stride[0] = t.dims > kept && kept ? t.size[t.dims - 1] : 1;
  bool first = true;
  for (int i = t.dims - 1 - kept; i >= 0; i--) {
    if (t.size[i] == 1) continue;
    require(first || t.stride[i] == rows.stride[0] * rows.size[0], name, " has rows that do not lie at one stride.");
    if (first) rows.stride[0] = t.stride[i];
    first = false;
    rows.size[0] *= t.size[i];
  }
  if (kept) {
    rows.size[1] = t.dims ? t.size[t.dims - 1] : 1;
    rows.stride[1] = t.dims ? t.stride[t.dims - 1] : 1;
  }
  return rows;
}

// A video lattice. The check keeps every count derived from its planes below 2^63.
inline Layout layout_of(int64_t time, int64_t height, int64_t width) {
  require(time > 0 && height > 0 && width > 0, "The layout's sizes must be positive.");
  product({3, time, height, width});
  return {time, height, width};
}

// sizes: (rows, columns, rows, columns, ...). The caller keeps them alive. All tokens, also of doubled sides, stay
// below 2^63.
inline Planes planes_of(const std::vector<int64_t>& sizes) {
  require(!sizes.empty() && sizes.size() % 2 == 0, "planes must be (rows, columns, rows, columns, ...).");
  int64_t tokens = 0;
  for (size_t i = 0; i < sizes.size(); i += 2) {
    require(sizes[i] > 0 && sizes[i + 1] > 0, "The planes' sizes must be positive.");
    tokens = sum(tokens, product({4, sizes[i], sizes[i + 1]}));
  }
  return {sizes.data(), static_cast<int64_t>(sizes.size() / 2)};
}

}  // namespace pvdm
