// triplane_project on a GPU.
#pragma once
#include "../struct_caster.h"
#include "target.h"

PVDM_CAST_TENSORS(pvdm::ProjectTensors)

namespace pvdm::bindings {

// Beyond check_project: what the kernel's 16-byte copies and its products ask for.
inline void check_tile(const ProjectTensors& p, const TensorView& out, const TensorView& stream,
                       const ProjectOptions& options, const cuda::ProjectTile& tile) {
  const int64_t channels = p.token.size[0], length = p.positions.size[0], hidden = p.up_weight.size[1];
  const int64_t inner = p.out_weight.size[2];
  const bool half = p.qkv_weight.dtype != Dtype::f32;
  require(out.dtype == p.qkv_weight.dtype, "The output must have the dtype of the matrices.");
  require(channels % 8 == 0 && hidden % 16 == 0 && inner / options.heads % 16 == 0,
          "Channels must be a multiple of 8, a head's and those of the hidden layer of 16.");
  for (int64_t size : {product({3, inner}), hidden, p.latent_weight.size[0], p.up_weight.size[0]})
    require(product({size, channels}) <= INT32_MAX, "A matrix has more than 2^31 - 1 elements.");
  for (const auto* t : {&p.token, &p.positions, &p.norm1_weight, &p.norm1_bias, &p.norm2_weight, &p.norm2_bias,
                        &p.qkv_weight, &p.out_weight, &p.up_weight, &p.down_weight, &p.latent_weight})
    require(reinterpret_cast<uintptr_t>(t->data) % 16 == 0, "A parameter must start at 16 bytes.");
  require(tile.rows == 32 || tile.rows == 64 || (half && (tile.rows == 96 || tile.rows == 112)),
          "A tile must have 32 or 64 rows, or of 16-bit matrices 96 or 112.");
  require(length <= 64 && length <= tile.rows, "A tile must hold a sequence, of at most 64 elements.");
  require(tile.warps > 0 && tile.warps <= 8 && tile.heads > 0 && tile.heads <= options.heads && tile.hidden > 0 &&
              tile.hidden <= hidden && tile.hidden % 16 == 0,
          "A block must have 1 to 8 warps, some heads at a time, and 16 or more channels of the hidden layer.");
  const int64_t shared = cuda::triplane_project_shared(p.qkv_weight.dtype, channels, inner / options.heads, tile);
  require(shared <= 227 << 10, "The tile takes more shared memory than there is.");
  check("stream", stream, {stream.size[0], tile.rows, channels});
  check_float("stream", stream);
  check_dense("stream", stream);
  require(stream.size[0] > 0, "There must be a block.");
}

inline void bind_triplane_project(pybind11::module_& m) {
  m.def("triplane_project_forward",
        [](const TensorView& x, const ProjectTensors& parameters, const TensorView& out, const TensorView& stream,
           const std::tuple<int, int, int, int>& cut, double scale, int plane, int64_t time, int64_t height, int64_t width,
           int64_t heads, double eps, int device, uintptr_t queue) {
          const ProjectOptions options{layout_of(time, height, width), plane, heads, eps, 0};
          const auto [rows, warps, some_heads, hidden] = cut;
          const cuda::ProjectTile tile{rows, warps, some_heads, hidden, static_cast<float>(scale)};
          check_project(x, parameters, out, options);
          check_tile(parameters, out, stream, options, tile);
          const pybind11::gil_scoped_release release;
          cuda::triplane_project_forward(x, parameters, out, stream, options, tile, target(device, queue));
        });
  m.def("triplane_project_shared", [](bool half, int channels, int head, const std::tuple<int, int, int, int>& cut) {
    const auto [rows, warps, heads, hidden] = cut;
    return cuda::triplane_project_shared(half ? Dtype::bf16 : Dtype::f32, channels, head, {rows, warps, heads, hidden, 0});
  });
}

}  // namespace pvdm::bindings
