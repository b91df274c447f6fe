// The CPU kernels: one line each; bindings_cpu.cpp checks the arguments, csrc/cpu/<op>.cpp computes.
#pragma once
#include "../tensor_view.h"
#include "runtime/isa.h"

// planes (B, N, D), weight (3, C, D) f32, bias (3, C) f32 -> out (B, T H W, C) of the planes' dtype; last strides are 1.
PVDM_CPU_KERNEL(triplane_expand_forward, (const TensorView& planes, const TensorView& weight, const TensorView& bias,
                                          const TensorView& out, const Layout& layout, int threads))
// grad (B, T H W, C) -> sums (B, N, C) f32: over time for xy, height for yt, width for xt, in one pass.
PVDM_CPU_KERNEL(triplane_expand_sums,
                (const TensorView& grad, const TensorView& sums, const Layout& layout, int threads))

namespace pvdm {
struct NormOptions {
  Planes planes;
  int64_t groups;
  double eps;
  bool activation;
  int resample;  // +1: x2 nearest, -1: 2 x 2 mean, 0: none
  int threads;
};
}  // namespace pvdm

// x (B, N, C), weight and bias (C), scale_shift (B, 2C) or null, all but x f32 -> y (B, N', C) as x; mean, rstd (B, planes, groups).
PVDM_CPU_KERNEL(plane_norm_forward,
                (const TensorView& x, const TensorView& weight, const TensorView& bias, const TensorView& scale_shift,
                 const TensorView& y, const TensorView& mean, const TensorView& rstd, const NormOptions& options))
// grad (B, N', C) and x of one dtype -> dx (B, N, C) of it; dweight, dbias (C), dscale_shift (B, 2C) f32 (null without scale_shift).
PVDM_CPU_KERNEL(plane_norm_backward,
                (const TensorView& grad, const TensorView& x, const TensorView& weight, const TensorView& bias,
                 const TensorView& scale_shift, const TensorView& mean, const TensorView& rstd, const TensorView& dx,
                 const TensorView& dweight, const TensorView& dbias, const TensorView& dscale_shift,
                 const NormOptions& options))

namespace pvdm {
struct AttentionOptions {
  const int64_t* offsets;  // of the segments along L, and the end
  int64_t segments;
  double scale;
  int threads;
};
}  // namespace pvdm

// qkv (B, sites, L, 3, heads, d), or keys and values (..., 2, heads, d) with query (B, sites, 1, heads, d); sin, cos (L, d)
// f32 or null -> out (B, sites, L or 1, heads, d), of one dtype; lse (B, sites, heads, L or 1) f32. Attention is inside
// each segment of L. Last strides are 1.
PVDM_CPU_TILE_KERNEL(attention_forward,
                     (const TensorView& qkv, const TensorView& query, const TensorView& sin, const TensorView& cos,
                      const TensorView& out, const TensorView& lse, const AttentionOptions& options))
// grad and out as out above -> dqkv as qkv.
PVDM_CPU_TILE_KERNEL(attention_backward,
                     (const TensorView& grad, const TensorView& qkv, const TensorView& sin, const TensorView& cos,
                      const TensorView& out, const TensorView& lse, const TensorView& dqkv,
                      const AttentionOptions& options))
// The same with a query: -> dqkv as qkv, dquery as query.
PVDM_CPU_KERNEL(attention_backward_single,
                (const TensorView& grad, const TensorView& qkv, const TensorView& query, const TensorView& out,
                 const TensorView& dqkv, const TensorView& dquery, const AttentionOptions& options))

// x (B, N, C) -> out (rows, 9 C) of its dtype: rows first ... of the unfolded matrix (B N, 9 C), taps fastest.
PVDM_CPU_KERNEL(plane_conv_unfold,
                (const TensorView& x, const TensorView& out, const Planes& planes, int64_t first, int threads))
// Adds rows first ... of an unfolded gradient (rows, 9 C), f32 or bf16, to dx (B, N, C) f32: the transpose of unfolding.
PVDM_CPU_KERNEL(plane_conv_fold,
                (const TensorView& unfolded, const TensorView& dx, const Planes& planes, int64_t first, int threads))

// x (R, 2M) -> out (R, M); and its gradient.
PVDM_CPU_KERNEL(geglu_forward, (const TensorView& x, const TensorView& out, int threads))
PVDM_CPU_KERNEL(geglu_backward, (const TensorView& grad, const TensorView& x, const TensorView& dx, int threads))

// x (R, C), residual (R, C) of another dtype or null, weight and bias (C) f32 -> total (null without residual) and
// normed (R, C) of the residual's dtype, mean and rstd (R) f32.
PVDM_CPU_KERNEL(add_layer_norm_forward,
                (const TensorView& x, const TensorView& residual, const TensorView& weight, const TensorView& bias,
                 const TensorView& total, const TensorView& normed, const TensorView& mean, const TensorView& rstd,
                 float eps, int threads))
// grad of normed, extra of total (or null), total (R, C) of one dtype -> dx (R, C) of it; dweight, dbias (C) f32.
PVDM_CPU_KERNEL(add_layer_norm_backward,
                (const TensorView& grad, const TensorView& extra, const TensorView& total, const TensorView& weight,
                 const TensorView& mean, const TensorView& rstd, const TensorView& dx, const TensorView& dweight,
                 const TensorView& dbias, int threads))

// x (B, T H W, C), token (C) and positions (L + 1, C) f32 -> out (B, sites, L + 1, C) as x. plane: 0 xy, 1 yt, 2 xt.
PVDM_CPU_KERNEL(triplane_slice_forward,
                (const TensorView& x, const TensorView& token, const TensorView& positions, const TensorView& out,
                 const Layout& layout, int plane, int threads))
// grad (B, sites, L + 1, C) -> dx (B, T H W, C) of its dtype, dpositions (L + 1, C) f32; the token's is its last row.
PVDM_CPU_KERNEL(triplane_slice_backward,
                (const TensorView& grad, const TensorView& dx, const TensorView& dpositions, const Layout& layout,
                 int plane, int threads))
