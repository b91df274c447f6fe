// triplane_slice on a GPU.
#pragma once
#include "../../ops/triplane_slice.h"
#include "../../tensor_caster.h"
#include "target.h"

namespace pvdm::bindings {

inline void bind_triplane_slice(pybind11::module_& m) {
  m.def("triplane_slice_workspace",
        [](int64_t batch, int64_t channels, int plane, int64_t time, int64_t height, int64_t width) {
          const Layout layout = layout_of(time, height, width);
          product({2, batch, channels, time, height, width});  // a sequence is one token longer than its axis
          return cuda::triplane_slice_workspace(batch, channels, plane, layout);
        });
  m.def("triplane_slice_forward",
        [](const TensorView& x, const TensorView& token, const TensorView& positions, const TensorView& out, int plane,
           int64_t time, int64_t height, int64_t width, int device, uintptr_t stream) {
          const Layout layout = layout_of(time, height, width);
          check_slice(x, token, positions, out, layout, plane);
          const pybind11::gil_scoped_release release;
          cuda::triplane_slice_forward(x, token, positions, out, plane, layout, target(device, stream));
        });
  m.def("triplane_slice_backward",
        [](const TensorView& grad, const TensorView& dx, const TensorView& dpositions, const TensorView& workspace, int plane,
           int64_t time, int64_t height, int64_t width, int device, uintptr_t stream) {
          const Layout layout = layout_of(time, height, width);
          check_slice_gradients(grad, dx, dpositions, layout, plane);
          check("workspace", workspace, {cuda::triplane_slice_workspace(grad.size[0], grad.size[3], plane, layout)});
          check_float("workspace", workspace);
          const pybind11::gil_scoped_release release;
          cuda::triplane_slice_backward(grad, dx, dpositions, workspace, plane, layout, target(device, stream));
        });
}

}  // namespace pvdm::bindings
