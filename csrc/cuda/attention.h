// The arguments that the bindings pass to the attention kernels.
#pragma once
#include <stdexcept>

#include "../tensor_view.h"

namespace pvdm::cuda {
struct LaunchTarget;

// Attention of sequences: qkv (B, sites, L, 3, heads, d), or keys and values (B, sites, L, 2, heads, d) with query (B,
// sites, 1, heads, d). Sites don't share anything. Along L, tokens attend to their own segment only.
struct AttentionInputs {
  TensorView qkv;
  TensorView query;     // no data: every token is a query
  TensorView sin, cos;  // (L, d) f32; no data: no rotation. Rotation excludes segments and query
  const int64_t* offsets;
  int64_t segments;
  float scale;
};

// out (B, sites, queries, heads, d) and its gradient; lse (B, sites, heads, queries) f32; delta is workspace, shaped
// like lse. dqkv and dquery are shaped like qkv and query.
struct AttentionGradients {
  TensorView grad, out, lse, delta, dqkv, dquery;
};

// attention_vector.cu: any dtype and length, d up to 256, also a single query per sequence.
void vector_attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                              const LaunchTarget& target);
void vector_attention_backward(const AttentionInputs& in, const AttentionGradients& gradients, const LaunchTarget& target);

// attention_matrix.cu: 16-bit types on tensor cores, d up to 128. Rows must start at multiples of 16 bytes.
void matrix_attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                              const LaunchTarget& target);
void matrix_attention_backward(const AttentionInputs& in, const AttentionGradients& gradients, const LaunchTarget& target);

// The most dynamic shared memory, in bytes, that a launch asks for. With tensor cores, heads have `width` channels.
int64_t vector_attention_shared();
int64_t matrix_attention_shared(int64_t width, bool backward);

}  // namespace pvdm::cuda
