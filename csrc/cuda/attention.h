// What crosses from the bindings to the attention kernels, and how their work is numbered.
#pragma once
#include <stdexcept>

#include "../tensor_view.h"

namespace pvdm::cuda {
struct LaunchTarget;

// Attention of sequences: qkv (B, sites, L, 3, heads, d), or keys and values (B, sites, L, 2, heads, d) with
// query (B, sites, 1, heads, d). Places share nothing. Along L, segments attend to themselves only.
struct AttentionInputs {
  TensorView qkv;
  TensorView query;     // no data: every token is a query
  TensorView sin, cos;  // (L, d) f32; no data: no rotation. Not with segments, nor with query
  const int64_t* offsets;
  int64_t segments;
  float scale;
};

// out (B, sites, queries, heads, d); lse (B, sites, heads, queries) f32. `tensor_cores`: which kernel; only for 16 bits.
void attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse, bool tensor_cores,
                       const LaunchTarget& target);

// Gradients like qkv and query; delta (B, sites, heads, queries) f32 is workspace.
void attention_backward(const AttentionInputs& in, const TensorView& grad, const TensorView& out, const TensorView& lse,
                        const TensorView& delta, const TensorView& dqkv, const TensorView& dquery, bool tensor_cores,
                        const LaunchTarget& target);

// The most bytes of shared memory that a launch asks for, beside what is static: with tensor cores, heads of `width`.
int64_t attention_shared_memory(int64_t width, bool tensor_cores, bool backward);

}  // namespace pvdm::cuda
