// geglu: checks of the native backends.
#pragma once
#include "sizes.h"

namespace pvdm {

inline void check_geglu(const TensorView& x, const TensorView& out) {
  check("out", out, {out.size[0], out.size[1]});
  check("x", x, {out.size[0], product({2, out.size[1]})});
  check_dense("out", out);
  require(out.dtype == x.dtype && x.dtype != Dtype::f64, "x and out must share a dtype of at most 32 bits.");
}

inline void check_geglu_gradients(const TensorView& grad, const TensorView& x, const TensorView& dx) {
  check("grad", grad, {x.size[0], x.size[1] / 2});
  check("x", x, {grad.size[0], product({2, grad.size[1]})});
  check("dx", dx, {x.size[0], x.size[1]});
  check_dense("dx", dx);
  require(grad.dtype == x.dtype && dx.dtype == x.dtype && x.dtype != Dtype::f64,
          "grad, x and dx must share a dtype of at most 32 bits.");
}

}  // namespace pvdm
