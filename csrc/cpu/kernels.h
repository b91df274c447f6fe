// The CPU kernels. bindings/cpu/<op>.h checks their arguments, csrc/cpu/<op>.cpp defines them.
#pragma once
#include "../ops/add_layer_norm.h"
#include "../ops/plane_norm.h"
#include "../ops/triplane_project.h"
#include "runtime/isa.h"

// planes (B, N, D), weight (3, C, D) f32, bias (3, C) f32 -> out (B, T H W, C) in the planes' dtype. Last strides are
// 1.
PVDM_CPU_KERNEL(triplane_expand_forward, (const TensorView& planes, const TensorView& weight, const TensorView& bias,
                                          const TensorView& out, const Layout& layout, int threads))
// grad (B, T H W, C) -> sums (B, N, C) f32: over time for xy, height for yt, width for xt, in one pass.
PVDM_CPU_KERNEL(triplane_expand_sums,
                (const TensorView& grad, const TensorView& sums, const Layout& layout, int threads))

PVDM_CPU_KERNEL(plane_norm_forward, (const PlaneNormInputs& in, const TensorView& y, double eps, int threads))
PVDM_CPU_KERNEL(plane_norm_backward, (const PlaneNormInputs& in, const PlaneNormGradients& gradients, int threads))

namespace pvdm {
struct AttentionOptions {
  const int64_t* offsets;  // where segments start along L, and the end of the last
  int64_t segments;
  double scale;
  int threads;
};
}  // namespace pvdm

// qkv (B, sites, L, 3, heads, d), or keys and values (..., 2, heads, d) with query (B, sites, 1, heads, d). sin, cos
// (L, d) f32 or null. -> out (B, sites, L or 1, heads, d) in the same dtype; lse (B, sites, heads, L or 1) f32.
// Attention stays inside each segment of L. Last strides are 1.
PVDM_CPU_TILE_KERNEL(attention_forward,
                     (const TensorView& qkv, const TensorView& query, const TensorView& sin, const TensorView& cos,
                      const TensorView& out, const TensorView& lse, const AttentionOptions& options))
// grad and out have the shape of out above. -> dqkv like qkv.
PVDM_CPU_TILE_KERNEL(attention_backward,
                     (const TensorView& grad, const TensorView& qkv, const TensorView& sin, const TensorView& cos,
                      const TensorView& out, const TensorView& lse, const TensorView& dqkv,
                      const AttentionOptions& options))
// The same for a single query. -> dqkv like qkv, dquery like query.
PVDM_CPU_KERNEL(attention_backward_single,
                (const TensorView& grad, const TensorView& qkv, const TensorView& query, const TensorView& out,
                 const TensorView& dqkv, const TensorView& dquery, const AttentionOptions& options))

// x (B, N, C) -> out (rows, 9 C) in the same dtype: rows first ... of the unfolded matrix (B N, 9 C), with taps
// fastest.
PVDM_CPU_KERNEL(plane_conv_unfold,
                (const TensorView& x, const TensorView& out, const Planes& planes, int64_t first, int threads))
// The transpose of unfolding: adds rows first ... of an unfolded gradient (rows, 9 C), f32 or bf16, to dx (B, N, C)
// f32.
PVDM_CPU_KERNEL(plane_conv_fold,
                (const TensorView& unfolded, const TensorView& dx, const Planes& planes, int64_t first, int threads))

// x (R, 2M) -> out (R, M). And its gradient.
PVDM_CPU_KERNEL(geglu_forward, (const TensorView& x, const TensorView& out, int threads))
PVDM_CPU_KERNEL(geglu_backward, (const TensorView& grad, const TensorView& x, const TensorView& dx, int threads))

PVDM_CPU_KERNEL(add_layer_norm_forward, (const AddLayerNorm& tensors, float eps, int threads))
PVDM_CPU_KERNEL(add_layer_norm_backward, (const AddLayerNormGradients& tensors, int threads))

// x (B, T H W, C), token (C) and positions (L + 1, C) f32 -> out (B, sites, L + 1, C) like x. plane: 0 xy, 1 yt, 2 xt.
PVDM_CPU_KERNEL(triplane_slice_forward,
                (const TensorView& x, const TensorView& token, const TensorView& positions, const TensorView& out,
                 const Layout& layout, int plane, int threads))
// grad (B, sites, L + 1, C) -> dx (B, T H W, C) in the same dtype, dpositions (L + 1, C) f32. The last row of
// dpositions is the token's gradient.
PVDM_CPU_KERNEL(triplane_slice_backward,
                (const TensorView& grad, const TensorView& dx, const TensorView& dpositions, const Layout& layout,
                 int plane, int threads))

// x (B, T H W, C) -> out (B, sites, D) f32, by the parameters of ops/triplane_project.h.
PVDM_CPU_TILE_KERNEL(triplane_project_forward, (const TensorView& x, const ProjectTensors& parameters,
                                                const TensorView& out, const ProjectOptions& options))
// grad (B, sites, D) f32 -> dx as x, and the gradients of all parameters, f32.
PVDM_CPU_TILE_KERNEL(triplane_project_backward,
                     (const TensorView& grad, const TensorView& x, const ProjectTensors& parameters,
                      const TensorView& dx, const ProjectTensors& gradients, const ProjectOptions& options))
