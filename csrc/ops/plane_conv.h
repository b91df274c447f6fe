// plane_conv: checks of its unfolded tokens.
#pragma once
#include "sizes.h"

namespace pvdm {

// tokens: (B, N, C) of the planes. unfolded: (rows, 9 C), whose row 0 is row `first` of all B N.
inline void check_unfolded(const TensorView& tokens, const TensorView& unfolded, const Planes& planes, int64_t first) {
  const int64_t batch = tokens.size[0], count = planes.offset(planes.count), channels = tokens.size[2];
  check("The packed tensor", tokens, {batch, count, channels});
  check("The unfolded matrix", unfolded, {unfolded.size[0], product({9, channels})});
  require(first >= 0 && sum(first, unfolded.size[0]) <= product({batch, count}), "There are not so many rows to unfold.");
}

inline void check_unfold(const TensorView& x, const TensorView& out, const Planes& planes, int64_t first) {
  check_unfolded(x, out, planes, first);
  check_dense("out", out);
  require(out.dtype == x.dtype && x.dtype != Dtype::f64, "x and out must share a dtype of at most 32 bits.");
}

inline void check_fold(const TensorView& unfolded, const TensorView& dx, const Planes& planes, int64_t first) {
  check_unfolded(dx, unfolded, planes, first);
  check_float("dx", dx);
  check_dense("dx", dx);
  require(unfolded.dtype == Dtype::f32 || unfolded.dtype == Dtype::bf16, "unfolded must be float32 or bfloat16.");
}

}  // namespace pvdm
