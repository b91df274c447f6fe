// What crosses from the bindings to the attention kernels, and how their work is numbered.
#pragma once
#include <stdexcept>

#include "../tensor_view.h"

namespace pvdm::cuda {
struct LaunchTarget;

// Attention of sequences: qkv (B, sites, L, 3, heads, d), or keys and values (B, sites, L, 2, heads, d) with
// query (B, sites, 1, heads, d). Sites share nothing. Along L, segments attend to themselves only.
struct AttentionInputs {
  TensorView qkv;
  TensorView query;     // no data: every token is a query
  TensorView sin, cos;  // (L, d) f32; no data: no rotation. Not with segments, nor with query
  const int64_t* offsets;
  int64_t segments;
  float scale;
};

// out (B, sites, queries, heads, d) and its gradient; lse (B, sites, heads, queries) f32; delta like lse is workspace. Gradients
// like qkv and query.
struct AttentionGradients {
  TensorView grad, out, lse, delta, dqkv, dquery;
};

// attention_vector.cu: any dtype, any length, d up to 256, one query a sequence too.
void vector_attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                              const LaunchTarget& target);
void vector_attention_backward(const AttentionInputs& in, const AttentionGradients& gradients, const LaunchTarget& target);

// attention_matrix.cu: 16-bit types by tensor cores, d up to 128, rows of 16 aligned bytes.
void matrix_attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                              const LaunchTarget& target);
void matrix_attention_backward(const AttentionInputs& in, const AttentionGradients& gradients, const LaunchTarget& target);

// The most bytes of shared memory that a launch asks for, beside what is static: with tensor cores, heads of `width`.
int64_t vector_attention_shared();
int64_t matrix_attention_shared(int64_t width, bool backward);

}  // namespace pvdm::cuda
