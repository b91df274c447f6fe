// The CUDA kernels. bindings/cuda/<op>.h checks their arguments, csrc/cuda/<op>.cu defines them. None allocates or
// waits.
#pragma once
#include "../ops/plane_norm.h"
#include "../ops/triplane_project.h"

namespace pvdm::cuda {
struct LaunchTarget;

// Floats of workspace for either direction.
int64_t triplane_expand_workspace(int64_t batch, int64_t channels, const Layout& layout);

// planes (B, N, D), weight (3, C, D) f32, bias (3, C) f32 -> out (B, T H W, C) in the planes' dtype.
void triplane_expand_forward(const TensorView& planes, const TensorView& weight, const TensorView& bias,
                             const TensorView& out, const TensorView& workspace, const Layout& layout,
                             const LaunchTarget& target);

// grad (B, T H W, C) -> sums (B, N, C) f32: over time for xy, height for yt, width for xt. grad is read once.
void triplane_expand_sums(const TensorView& grad, const TensorView& sums, const TensorView& workspace,
                          const Layout& layout, const LaunchTarget& target);

// Floats of workspace for the backward direction of triplane_slice.
int64_t triplane_slice_workspace(int64_t batch, int64_t channels, int plane, const Layout& layout);

// x (B, T H W, C), token (C) f32, positions (L + 1, C) f32 -> out (B, sites, L + 1, C). plane: 0 xy, 1 yt, 2 xt.
void triplane_slice_forward(const TensorView& x, const TensorView& token, const TensorView& positions,
                            const TensorView& out, int plane, const Layout& layout, const LaunchTarget& target);

// grad (like out) -> dx, dpositions (L + 1, C) f32, whose last row is the token's gradient. grad is read once.
void triplane_slice_backward(const TensorView& grad, const TensorView& dx, const TensorView& dpositions,
                             const TensorView& workspace, int plane, const Layout& layout, const LaunchTarget& target);

// Floats of workspace for either direction of plane_norm.
int64_t plane_norm_workspace(int64_t batch, int64_t channels, int64_t groups, const Planes& planes);

// Writes y (B, N', C), mean and rstd.
void plane_norm_forward(const PlaneNormInputs& in, const TensorView& y, const TensorView& workspace, float eps,
                        const LaunchTarget& target);
void plane_norm_backward(const PlaneNormInputs& in, const PlaneNormGradients& gradients, const TensorView& workspace,
                         const LaunchTarget& target);

// How triplane_project is cut: rows of a tile (32, 64; of 16-bit matrices also 96 or 112), a block's warps, heads and
// channels of the hidden layer at a time (a multiple of 16). And the scale of scores.
struct ProjectTile {
  int rows, warps, heads, hidden;
  float scale;
};

// Bytes of shared memory of a block, with matrices of this dtype and heads of `head` channels.
int64_t triplane_project_shared(Dtype dtype, int64_t channels, int64_t head, const ProjectTile& tile);

// x (B, T H W, C) -> out (B, sites, D) in the matrices' dtype. stream (blocks of the grid, rows of a tile, C) f32 is
// workspace. C is a multiple of 8, heads and hidden layer are of 16, parameters start at 16 bytes.
void triplane_project_forward(const TensorView& x, const ProjectTensors& parameters, const TensorView& out,
                              const TensorView& stream, const ProjectOptions& options, const ProjectTile& tile,
                              const LaunchTarget& target);
}  // namespace pvdm::cuda
