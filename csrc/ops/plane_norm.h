// plane_norm: arguments of both directions, and their checks, for both native backends.
#pragma once
#include "sizes.h"

namespace pvdm {

// x (B, N, C); weight and bias (C), scale_shift (B, 2C) or none, mean and rstd (B, planes, groups), all float32 and
// contiguous. The forward pass writes mean and rstd.
struct PlaneNormTensors {
  TensorView x, weight, bias, scale_shift, mean, rstd;
};

struct PlaneNormInputs : PlaneNormTensors {
  Planes planes;
  int64_t groups;
  bool activation;
  int resample;  // 1 doubles sides, -1 halves them, 0 leaves them

  // Number of tokens written where `tokens` are read.
  int64_t written(int64_t tokens) const { return resample > 0 ? tokens * 4 : resample < 0 ? tokens / 4 : tokens; }
};

// grad (B, N', C) like x -> dx (B, N, C) like x; dweight and dbias (C), dscale_shift (B, 2C) or none, all float32. dx
// and the float32 gradients are contiguous.
struct PlaneNormGradients {
  TensorView grad, dx, dweight, dbias, dscale_shift;
};

inline void check(const PlaneNormInputs& in) {
  require(in.resample >= -1 && in.resample <= 1, "resample must be -1, 0 or 1.");
  for (int64_t i = 0; i < 2 * in.planes.count; i++)
    require(in.resample >= 0 || in.planes.sizes[i] % 2 == 0, "Halving needs even sizes.");
  require(in.x.dims == 3, "x must be (B, N, C).");
  const int64_t batch = in.x.size[0], channels = in.x.size[2], count = in.planes.count;
  check("x", in.x, {batch, in.planes.offset(count), channels});
  require(in.x.dtype != Dtype::f64, "x must be float32, bfloat16 or float16.");
  require(in.groups > 0 && channels % in.groups == 0, "The channels must be a multiple of the groups.");
  check("weight", in.weight, {channels});
  check("bias", in.bias, {channels});
  if (in.scale_shift.data) check("scale_shift", in.scale_shift, {batch, 2 * channels});
  check("mean", in.mean, {batch, count, in.groups});
  check("rstd", in.rstd, {batch, count, in.groups});
  for (const auto* t : {&in.weight, &in.bias, &in.scale_shift, &in.mean, &in.rstd}) {
    check_float("A parameter or statistic", *t);
    check_dense("A parameter or statistic", *t);
  }
}

inline void check_output(const PlaneNormInputs& in, const TensorView& y) {
  check("y", y, {in.x.size[0], in.written(in.x.size[1]), in.x.size[2]});
  check_dense("y", y);
  require(y.dtype == in.x.dtype, "x and y must share a dtype.");
}

inline void check(const PlaneNormInputs& in, const PlaneNormGradients& g) {
  const int64_t batch = in.x.size[0], channels = in.x.size[2];
  check("grad", g.grad, {batch, in.written(in.x.size[1]), channels});
  check("dx", g.dx, {batch, in.x.size[1], channels});
  check("dweight", g.dweight, {channels});
  check("dbias", g.dbias, {channels});
  require(!g.dscale_shift.data == !in.scale_shift.data, "scale_shift and its gradient go together.");
  if (g.dscale_shift.data) check("dscale_shift", g.dscale_shift, {batch, 2 * channels});
  for (const auto* t : {&g.dx, &g.dweight, &g.dbias, &g.dscale_shift}) check_dense("A gradient", *t);
  for (const auto* t : {&g.dweight, &g.dbias, &g.dscale_shift}) check_float("A parameter's gradient", *t);
  require(g.grad.dtype == in.x.dtype && g.dx.dtype == in.x.dtype, "grad, x and dx must share a dtype.");
}

}  // namespace pvdm
