// triplane_slice: checks of both native backends.
#pragma once
#include "sizes.h"

namespace pvdm {

// lattice: (B, T H W, C); sequences: (B, sites, L + 1, C) in the same dtype; positions: (L + 1, C) f32. plane: 0 xy, 1
// yt, 2 xt. Outputs are contiguous.
inline void check_slice(const TensorView& lattice, const TensorView& sequences, const TensorView& positions,
                        const Layout& layout, int plane) {
  require(plane >= 0 && plane < 3, "plane must be 0, 1 or 2.");
  const int64_t batch = lattice.size[0], channels = lattice.size[2];
  const int64_t length = layout.length(plane);
  check("The lattice", lattice, {batch, layout.time * layout.height * layout.width, channels});
  check("The sequences", sequences, {batch, layout.rows(plane) * layout.columns(plane), length + 1, channels});
  check("positions", positions, {length + 1, channels});
  check_float("positions", positions);
  check_dense("positions", positions);
  require(lattice.dtype == sequences.dtype && lattice.dtype != Dtype::f64,
          "Lattice and sequences must share a dtype of at most 32 bits.");
}

// Forward: x, token (C) f32 and positions -> out.
inline void check_slice(const TensorView& x, const TensorView& token, const TensorView& positions, const TensorView& out,
                        const Layout& layout, int plane) {
  check_slice(x, out, positions, layout, plane);
  check("token", token, {x.size[2]});
  check_float("token", token);
  check_dense("out", out);
}

// Backward: grad -> dx, dpositions.
inline void check_slice_gradients(const TensorView& grad, const TensorView& dx, const TensorView& dpositions,
                                  const Layout& layout, int plane) {
  check_slice(dx, grad, dpositions, layout, plane);
  check_dense("dx", dx);
}

}  // namespace pvdm
