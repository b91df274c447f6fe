// The two families of attention kernels, chosen between in attention.cu.
#pragma once
#include "attention.cuh"

namespace pvdm::cuda {

// attention_vector.cu: any dtype, any length, d up to 256, one query a sequence too.
void vector_attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                              const LaunchTarget& target);
void vector_attention_backward(const AttentionInputs& in, const TensorView& grad, const TensorView& out,
                               const TensorView& lse, const TensorView& delta, const TensorView& dqkv,
                               const TensorView& dquery, const LaunchTarget& target);

int64_t vector_attention_shared();

// attention_matrix.cu: 16-bit types by tensor cores, d up to 128, rows of 16 aligned bytes.
void matrix_attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                              const LaunchTarget& target);
void matrix_attention_backward(const AttentionInputs& in, const TensorView& grad, const TensorView& out,
                               const TensorView& lse, const TensorView& delta, const TensorView& dqkv,
                               const LaunchTarget& target);
int64_t matrix_attention_shared(int64_t width, bool backward);

}  // namespace pvdm::cuda
