// triplane_project at the border of the native backends.
#pragma once
#include <utility>

#include "sizes.h"

namespace pvdm {

// All layers' parameters (or their gradients), one kind after another: token (C), positions (L + 1, C); of each of `depth`
// layers norm1_* (depth, C), qkv_weight (depth, 3 inner, C), out_weight (depth, C, inner), out_bias (depth, C), norm2_*
// (depth, C), up_weight (depth, hidden, C), up_bias (depth, hidden), down_weight (depth, C, hidden), down_bias (depth, C);
// latent_weight (D, C), latent_bias (D). The matrices share a dtype, the rest is f32; all are contiguous.
struct ProjectTensors {
  TensorView token, positions, norm1_weight, norm1_bias, qkv_weight, out_weight, out_bias, norm2_weight, norm2_bias,
      up_weight, up_bias, down_weight, down_bias, latent_weight, latent_bias;
};

struct ProjectOptions {
  Layout layout;
  int plane;  // 0 xy, 1 yt, 2 xt
  int64_t heads;
  double eps;
  int threads;
};

inline void check_project(const TensorView& x, const ProjectTensors& p, const TensorView& out,
                          const ProjectOptions& options) {
  const Layout& layout = options.layout;
  const int plane = options.plane;
  require(plane >= 0 && plane < 3, "plane must be 0, 1 or 2.");
  const int64_t channels = p.token.size[0], depth = p.up_weight.size[0], hidden = p.up_weight.size[1];
  const int64_t inner = p.out_weight.size[2], latent = p.latent_weight.size[0];
  const int64_t length = layout.length(plane);
  require(depth > 0 && inner > 0 && options.heads > 0 && inner % options.heads == 0,
          "There must be a layer, and the heads must divide its inner width.");
  check("x", x, {out.size[0], layout.time * layout.height * layout.width, channels});
  check("out", out, {out.size[0], layout.rows(plane) * layout.columns(plane), latent});
  check("token", p.token, {channels});
  check("positions", p.positions, {length + 1, channels});
  for (const auto* t : {&p.norm1_weight, &p.norm1_bias, &p.out_bias, &p.norm2_weight, &p.norm2_bias, &p.down_bias})
    check("A norm's parameter or a bias", *t, {depth, channels});
  check("qkv_weight", p.qkv_weight, {depth, product({3, inner}), channels});
  check("out_weight", p.out_weight, {depth, channels, inner});
  check("up_weight", p.up_weight, {depth, hidden, channels});
  check("up_bias", p.up_bias, {depth, hidden});
  check("down_weight", p.down_weight, {depth, channels, hidden});
  check("latent_weight", p.latent_weight, {latent, channels});
  check("latent_bias", p.latent_bias, {latent});
  for (const auto* t : {&p.token, &p.positions, &p.norm1_weight, &p.norm1_bias, &p.out_bias, &p.norm2_weight,
                        &p.norm2_bias, &p.up_bias, &p.down_bias, &p.latent_bias})
    check_float("A vector", *t);
  const Dtype dtype = p.qkv_weight.dtype;
  for (const auto* t : {&p.qkv_weight, &p.out_weight, &p.up_weight, &p.down_weight, &p.latent_weight})
    require(t->dtype == dtype && dtype != Dtype::f64, "The matrices must share a dtype of at most 32 bits.");
  require(x.dtype != Dtype::f64, "x must be float32, bfloat16 or float16.");
  for (const auto* t : {&p.token, &p.positions, &p.norm1_weight, &p.norm1_bias, &p.qkv_weight, &p.out_weight,
                        &p.out_bias, &p.norm2_weight, &p.norm2_bias, &p.up_weight, &p.up_bias, &p.down_weight,
                        &p.down_bias, &p.latent_weight, &p.latent_bias, &out})
    check_dense("A parameter or the output", *t);
}

// The backward pass: grad as out; dx as x, contiguous; gradients as parameters, f32.
inline void check_project_gradients(const TensorView& grad, const TensorView& x, const ProjectTensors& parameters,
                                    const TensorView& dx, const ProjectTensors& gradients,
                                    const ProjectOptions& options) {
  check_project(x, parameters, grad, options);
  check_float("grad", grad);
  check_project(dx, gradients, grad, options);
  check_float("A gradient", gradients.qkv_weight);
  for (const auto& [a, b] : {std::pair{&parameters.up_weight, &gradients.up_weight},
                             std::pair{&parameters.out_weight, &gradients.out_weight}})
    require(a->size[0] == b->size[0] && a->size[1] == b->size[1] && a->size[2] == b->size[2],
            "A gradient must have its parameter's shape.");
  require(dx.dtype == x.dtype, "x and dx must share a dtype.");
  check_dense("dx", dx);
}

}  // namespace pvdm
