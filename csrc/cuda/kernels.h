// The CUDA kernels: bindings_cuda.cpp checks the arguments, csrc/cuda/<op>.cu computes. Nothing here allocates or waits.
#pragma once
#include "../tensor_view.h"

namespace pvdm::cuda {
struct Place;

// How many floats of workspace either direction needs.
int64_t triplane_expand_workspace(int64_t batch, int64_t channels, const Layout& layout);

// planes (B, N, D), weight (3, C, D) f32, bias (3, C) f32 -> out (B, T H W, C) of the planes' dtype.
void triplane_expand_forward(const TensorView& planes, const TensorView& weight, const TensorView& bias,
                             const TensorView& out, const TensorView& workspace, const Layout& layout,
                             const Place& place);

// grad (B, T H W, C) -> sums (B, N, C) f32: over time for xy, height for yt, width for xt. grad is read once.
void triplane_expand_sums(const TensorView& grad, const TensorView& sums, const TensorView& workspace,
                          const Layout& layout, const Place& place);
}  // namespace pvdm::cuda
