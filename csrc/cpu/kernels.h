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
