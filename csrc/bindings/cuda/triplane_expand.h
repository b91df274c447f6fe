// triplane_expand on a GPU.
#pragma once
#include "../../ops/triplane_expand.h"
#include "../../tensor_caster.h"
#include "target.h"

namespace pvdm::bindings {

inline void check_workspace(const TensorView& workspace, int64_t batch, int64_t channels, const Layout& layout) {
  check("workspace", workspace, {cuda::triplane_expand_workspace(batch, channels, layout)});
  check_float("workspace", workspace);
}

inline void bind_triplane_expand(pybind11::module_& m) {
  m.def("triplane_expand_workspace", [](int64_t batch, int64_t channels, int64_t time, int64_t height, int64_t width) {
    const Layout layout = layout_of(time, height, width);
    product({3, batch, sum(channels, 64), time, height, width});  // channels are padded
    return cuda::triplane_expand_workspace(batch, channels, layout);
  });
  m.def("triplane_expand_forward",
        [](const TensorView& planes, const TensorView& weight, const TensorView& bias, const TensorView& out,
           const TensorView& workspace, int64_t time, int64_t height, int64_t width, int device, uintptr_t stream) {
          const Layout layout = layout_of(time, height, width);
          check_expand(planes, weight, bias, out, layout);
          check_workspace(workspace, planes.size[0], weight.size[1], layout);
          const pybind11::gil_scoped_release release;
          cuda::triplane_expand_forward(planes, weight, bias, out, workspace, layout, target(device, stream));
        });
  m.def("triplane_expand_sums", [](const TensorView& grad, const TensorView& sums, const TensorView& workspace, int64_t time,
                                   int64_t height, int64_t width, int device, uintptr_t stream) {
    const Layout layout = layout_of(time, height, width);
    check_expand_sums(grad, sums, layout);
    check_workspace(workspace, grad.size[0], grad.size[2], layout);
    const pybind11::gil_scoped_release release;
    cuda::triplane_expand_sums(grad, sums, workspace, layout, target(device, stream));
  });
}

}  // namespace pvdm::bindings
