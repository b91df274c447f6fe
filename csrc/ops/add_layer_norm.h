// add_layer_norm: arguments and checks of the native backends.
#pragma once
#include "sizes.h"

namespace pvdm {

// x (..., C) as rows (R, C), residual (R, C) of another dtype or none, weight and bias (C) f32 -> total (none without
// residual) and normed (R, C) in the residual's dtype, or x's without one; mean and rstd (R) f32, or neither.
struct AddLayerNorm {
  TensorView x, residual, weight, bias, total, normed, mean, rstd;
  AddLayerNorm rows() const {
    return {rows_of("x", x),         rows_of("residual", residual), weight,                     bias,
            rows_of("total", total), rows_of("normed", normed),     rows_of("mean", mean, 0), rows_of("rstd", rstd, 0)};
  }
};

// grad of normed, extra of total (or none), and total (..., C) as rows (R, C), all of one dtype -> dx (R, C) in that
// dtype; dweight, dbias (C) f32.
struct AddLayerNormGradients {
  TensorView grad, extra, total, weight, mean, rstd, dx, dweight, dbias;
  AddLayerNormGradients rows() const {
    return {rows_of("grad", grad),     rows_of("grad_total", extra), rows_of("total", total),
            weight,                    rows_of("mean", mean, 0),     rows_of("rstd", rstd, 0),
            rows_of("dx", dx),         dweight,                      dbias};
  }
};

// What both directions have.
inline void check_parameter_of_rows(const TensorView& rows, const TensorView& weight) {
  check("The rows", rows, {rows.size[0], rows.size[1]});
  check("weight", weight, {rows.size[1]});
  check_float("weight", weight);
}

inline void check_norm_of_rows(const TensorView& rows, const TensorView& weight, const TensorView& mean,
                               const TensorView& rstd) {
  check_parameter_of_rows(rows, weight);
  for (const auto* t : {&mean, &rstd}) {
    check("A statistic", *t, {rows.size[0]});
    check_float("A statistic", *t);
  }
}

inline void check(const AddLayerNorm& t) {
  const int64_t rows = t.x.size[0], channels = t.x.size[1];
  require(!t.mean.data == !t.rstd.data, "mean and rstd go together.");
  if (t.mean.data)
    check_norm_of_rows(t.x, t.weight, t.mean, t.rstd);
  else
    check_parameter_of_rows(t.x, t.weight);
  check("bias", t.bias, {channels});
  check_float("bias", t.bias);
  check("normed", t.normed, {rows, channels});
  check_dense("normed", t.normed);
  require(t.x.dtype != Dtype::f64 && t.normed.dtype != Dtype::f64, "x must be float32, bfloat16 or float16.");
  require(!t.residual.data == !t.total.data, "residual and total go together.");
  if (t.residual.data) {
    check("residual", t.residual, {rows, channels});
    check("total", t.total, {rows, channels});
    check_dense("total", t.total);
  }
  require(t.normed.dtype == (t.residual.data ? t.residual : t.x).dtype && (!t.residual.data || t.total.dtype == t.normed.dtype),
          "The results must have the dtype of the residual, else of x.");
}

inline void check(const AddLayerNormGradients& t) {
  const int64_t rows = t.total.size[0], channels = t.total.size[1];
  check_norm_of_rows(t.total, t.weight, t.mean, t.rstd);
  check("grad", t.grad, {rows, channels});
  check("dx", t.dx, {rows, channels});
  check_dense("dx", t.dx);
  if (t.extra.data) check("The gradient of the sum", t.extra, {rows, channels});
  check("dweight", t.dweight, {channels});
  check("dbias", t.dbias, {channels});
  for (const auto* each : {&t.dweight, &t.dbias}) check_float("A parameter's gradient", *each);
  require(t.total.dtype != Dtype::f64 && t.grad.dtype == t.total.dtype && t.dx.dtype == t.total.dtype &&
              (!t.extra.data || t.extra.dtype == t.total.dtype),
          "The sum and all gradients of its shape must share a dtype of at most 32 bits.");
}

}  // namespace pvdm
