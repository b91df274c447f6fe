// The borders of plane_conv, geglu, add_layer_norm and triplane_slice: arguments are checked here, kernels trust them.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/kernels.h"
#include "tensor_caster.h"
#include "tensor_checks.h"

namespace pvdm::border {

using Sizes = std::vector<int64_t>;

inline Planes planes_of(const Sizes& sizes) {
  require(sizes.size() % 2 == 0, "planes must be (rows, columns, rows, columns, ...).");
  for (int64_t size : sizes) require(size > 0, "The planes' sizes must be positive.");
  return {sizes.data(), static_cast<int64_t>(sizes.size() / 2)};
}

// tokens: (B, N, C) of the planes; unfolded: (rows, 9 C), of which row 0 is row `first` of all B N.
inline void check_unfolded(const TensorView& tokens, const TensorView& unfolded, const Planes& planes, int64_t first) {
  const int64_t batch = tokens.size[0], count = planes.offset(planes.count), channels = tokens.size[2];
  check("The packed tensor", tokens, {batch, count, channels});
  check("The unfolded matrix", unfolded, {unfolded.size[0], 9 * channels});
  require(first >= 0 && first + unfolded.size[0] <= batch * count, "There are not so many rows to unfold.");
}

inline void conv_unfold(TensorView x, TensorView out, const Sizes& sizes, int64_t first, int threads) {
  const Planes planes = planes_of(sizes);
  check_unfolded(x, out, planes, first);
  check_dense("out", out);
  require(out.dtype == x.dtype && x.dtype != Dtype::f64, "x and out must share a dtype of at most 32 bits.");
  pybind11::gil_scoped_release release;
  choose_plane_conv_unfold()(x, out, planes, first, threads);
}

inline void conv_fold(TensorView unfolded, TensorView dx, const Sizes& sizes, int64_t first, int threads) {
  const Planes planes = planes_of(sizes);
  check_unfolded(dx, unfolded, planes, first);
  check_float("dx", dx);
  check_dense("dx", dx);
  require(unfolded.dtype == Dtype::f32 || unfolded.dtype == Dtype::bf16, "unfolded must be float32 or bfloat16.");
  pybind11::gil_scoped_release release;
  choose_plane_conv_fold()(unfolded, dx, planes, first, threads);
}

inline void geglu_forward(TensorView x, TensorView out, int threads) {
  check("x", x, {out.size[0], 2 * out.size[1]});
  check("out", out, {out.size[0], out.size[1]});
  check_dense("out", out);
  require(out.dtype == x.dtype && x.dtype != Dtype::f64, "x and out must share a dtype of at most 32 bits.");
  pybind11::gil_scoped_release release;
  choose_geglu_forward()(x, out, threads);
}

inline void geglu_backward(TensorView grad, TensorView x, TensorView dx, int threads) {
  check("grad", grad, {x.size[0], x.size[1] / 2});
  check("x", x, {grad.size[0], 2 * grad.size[1]});
  check("dx", dx, {x.size[0], x.size[1]});
  check_dense("dx", dx);
  require(grad.dtype == x.dtype && dx.dtype == x.dtype && x.dtype != Dtype::f64,
          "grad, x and dx must share a dtype of at most 32 bits.");
  pybind11::gil_scoped_release release;
  choose_geglu_backward()(grad, x, dx, threads);
}

// What both directions of add_layer_norm have.
inline void check_rows(const TensorView& rows, const TensorView& weight, const TensorView& mean,
                       const TensorView& rstd) {
  check("The rows", rows, {rows.size[0], rows.size[1]});
  check("weight", weight, {rows.size[1]});
  check("mean", mean, {rows.size[0]});
  check("rstd", rstd, {rows.size[0]});
  for (const auto* t : {&weight, &mean, &rstd}) check_float("A parameter or statistic", *t);
}

inline void norm_rows_forward(TensorView x, TensorView residual, TensorView weight, TensorView bias, TensorView total,
                              TensorView normed, TensorView mean, TensorView rstd, float eps, int threads) {
  check_rows(x, weight, mean, rstd);
  check("bias", bias, {x.size[1]});
  check_float("bias", bias);
  check("normed", normed, {x.size[0], x.size[1]});
  check_dense("normed", normed);
  require(x.dtype != Dtype::f64 && normed.dtype != Dtype::f64, "x must be float32, bfloat16 or float16.");
  require(!residual.data == !total.data, "residual and total go together.");
  if (residual.data) {
    check("residual", residual, {x.size[0], x.size[1]});
    check("total", total, {x.size[0], x.size[1]});
    check_dense("total", total);
  }
  require(normed.dtype == (residual.data ? residual : x).dtype && (!residual.data || total.dtype == normed.dtype),
          "The results must have the dtype of the residual, else of x.");
  pybind11::gil_scoped_release release;
  choose_add_layer_norm_forward()(x, residual, weight, bias, total, normed, mean, rstd, eps, threads);
}

inline void norm_rows_backward(TensorView grad, TensorView extra, TensorView total, TensorView weight, TensorView mean,
                               TensorView rstd, TensorView dx, TensorView dweight, TensorView dbias, int threads) {
  check_rows(total, weight, mean, rstd);
  const int64_t rows = total.size[0], channels = total.size[1];
  check("grad", grad, {rows, channels});
  check("dx", dx, {rows, channels});
  check_dense("dx", dx);
  if (extra.data) check("The gradient of the sum", extra, {rows, channels});
  check("dweight", dweight, {channels});
  check("dbias", dbias, {channels});
  for (const auto* t : {&dweight, &dbias}) check_float("A parameter's gradient", *t);
  require(total.dtype != Dtype::f64 && grad.dtype == total.dtype && dx.dtype == total.dtype &&
              (!extra.data || extra.dtype == total.dtype),
          "The sum and all gradients of its shape must share a dtype of at most 32 bits.");
  pybind11::gil_scoped_release release;
  choose_add_layer_norm_backward()(grad, extra, total, weight, mean, rstd, dx, dweight, dbias, threads);
}

// lattice: (B, T H W, C), sequences: (B, sites, L + 1, C), positions: (L + 1, C).
inline void check_slice(const TensorView& lattice, const TensorView& sequences, const TensorView& positions,
                        const Layout& layout, int plane) {
  require(plane >= 0 && plane < 3, "plane must be 0, 1 or 2.");
  const int64_t batch = lattice.size[0], channels = lattice.size[2];
  const int64_t length = plane == 0 ? layout.time : plane == 1 ? layout.height : layout.width;
  check("The lattice", lattice, {batch, layout.time * layout.height * layout.width, channels});
  check("The sequences", sequences, {batch, layout.rows(plane) * layout.columns(plane), length + 1, channels});
  check("positions", positions, {length + 1, channels});
  check_float("positions", positions);
  require(lattice.dtype == sequences.dtype && lattice.dtype != Dtype::f64,
          "Lattice and sequences must share a dtype of at most 32 bits.");
}

inline void slice_forward(TensorView x, TensorView token, TensorView positions, TensorView out, int plane, int64_t time,
                          int64_t height, int64_t width, int threads) {
  const Layout layout{time, height, width};
  check_slice(x, out, positions, layout, plane);
  check("token", token, {x.size[2]});
  check_float("token", token);
  check_dense("out", out);
  pybind11::gil_scoped_release release;
  choose_triplane_slice_forward()(x, token, positions, out, layout, plane, threads);
}

inline void slice_backward(TensorView grad, TensorView dx, TensorView dpositions, int plane, int64_t time,
                           int64_t height, int64_t width, int threads) {
  const Layout layout{time, height, width};
  check_slice(dx, grad, dpositions, layout, plane);
  check_dense("dx", dx);
  check_dense("dpositions", dpositions);
  pybind11::gil_scoped_release release;
  choose_triplane_slice_backward()(grad, dx, dpositions, layout, plane, threads);
}

inline void bind_pointwise(pybind11::module_& m) {
  m.def("plane_conv_unfold", &conv_unfold);
  m.def("plane_conv_fold", &conv_fold);
  m.def("geglu_forward", &geglu_forward);
  m.def("geglu_backward", &geglu_backward);
  m.def("add_layer_norm_forward", &norm_rows_forward);
  m.def("add_layer_norm_backward", &norm_rows_backward);
  m.def("triplane_slice_forward", &slice_forward);
  m.def("triplane_slice_backward", &slice_backward);
}

}  // namespace pvdm::border
