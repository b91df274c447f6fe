// Attention with tangents: one kernel. bindings/cpu/attention_jvp.h checks its arguments.
#pragma once
#include "kernels.h"

// qkv (B, sites, L, 3, heads, d) and its tangent, of one dtype; sin, cos (L, d) f32 or null -> out and its tangent dout
// (B, sites, L, heads, d) of that dtype; lse (B, sites, heads, L) f32. Last strides are 1.
PVDM_CPU_KERNEL(attention_jvp,
                (const TensorView& qkv, const TensorView& tangent, const TensorView& sin, const TensorView& cos,
                 const TensorView& out, const TensorView& lse, const TensorView& dout, const AttentionOptions& options))
