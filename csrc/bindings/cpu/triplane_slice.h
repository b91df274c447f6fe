// triplane_slice on the CPU.
#pragma once
#include "../../cpu/kernels.h"
#include "../../ops/triplane_slice.h"
#include "../../tensor_caster.h"

namespace pvdm::bindings {

inline void bind_triplane_slice(pybind11::module_& m) {
  m.def("triplane_slice_forward",
        [](const TensorView& x, const TensorView& token, const TensorView& positions, const TensorView& out, int plane,
           int64_t time, int64_t height, int64_t width, int threads) {
          const Layout layout = layout_of(time, height, width);
          check_slice(x, token, positions, out, layout, plane);
          const pybind11::gil_scoped_release release;
          choose_triplane_slice_forward()(x, token, positions, out, layout, plane, threads);
        });
  m.def("triplane_slice_backward", [](const TensorView& grad, const TensorView& dx, const TensorView& dpositions, int plane,
                                      int64_t time, int64_t height, int64_t width, int threads) {
    const Layout layout = layout_of(time, height, width);
    check_slice_gradients(grad, dx, dpositions, layout, plane);
    const pybind11::gil_scoped_release release;
    choose_triplane_slice_backward()(grad, dx, dpositions, layout, plane, threads);
  });
}

}  // namespace pvdm::bindings
