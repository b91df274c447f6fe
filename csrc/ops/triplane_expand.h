// triplane_expand: checks of both native backends.
#pragma once
#include "sizes.h"

namespace pvdm {

// planes (B, N, D), weight (3, C, D) f32, bias (3, C) f32 -> out (B, T H W, C) in the planes' dtype.
inline void check_expand(const TensorView& planes, const TensorView& weight, const TensorView& bias, const TensorView& out,
                         const Layout& layout) {
  const int64_t batch = planes.size[0], channels = weight.size[1], depth = weight.size[2];
  check("planes", planes, {batch, layout.tokens(), depth});
  check("weight", weight, {3, channels, depth});
  check("bias", bias, {3, channels});
  check("out", out, {batch, layout.time * layout.height * layout.width, channels});
  for (const auto* t : {&weight, &bias}) check_float("A parameter", *t);
  for (const auto* t : {&weight, &bias, &out}) check_dense("A parameter or the output", *t);
  require(out.dtype == planes.dtype && planes.dtype != Dtype::f64, "planes and out must share a dtype of at most 32 bits.");
}

// grad (B, T H W, C) -> sums (B, N, C) f32: over time for xy, height for yt, width for xt.
inline void check_expand_sums(const TensorView& grad, const TensorView& sums, const Layout& layout) {
  const int64_t batch = grad.size[0], channels = grad.size[2];
  check("grad", grad, {batch, layout.time * layout.height * layout.width, channels});
  check("sums", sums, {batch, layout.tokens(), channels});
  check_float("sums", sums);
  check_dense("sums", sums);
  require(grad.dtype != Dtype::f64, "grad must be float32, bfloat16 or float16.");
}

}  // namespace pvdm
