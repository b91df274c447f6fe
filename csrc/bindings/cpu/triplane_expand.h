// triplane_expand on the CPU.
#pragma once
#include "../../cpu/kernels.h"
#include "../../ops/triplane_expand.h"
#include "../../tensor_caster.h"

namespace pvdm::bindings {

inline void bind_triplane_expand(pybind11::module_& m) {
  m.def("triplane_expand_forward",
        [](const TensorView& planes, const TensorView& weight, const TensorView& bias, const TensorView& out, int64_t time,
           int64_t height, int64_t width, int threads) {
          const Layout layout = layout_of(time, height, width);
          check_expand(planes, weight, bias, out, layout);
          const pybind11::gil_scoped_release release;
          choose_triplane_expand_forward()(planes, weight, bias, out, layout, threads);
        });
  m.def("triplane_expand_sums", [](const TensorView& grad, const TensorView& sums, int64_t time, int64_t height,
                                   int64_t width, int threads) {
    const Layout layout = layout_of(time, height, width);
    check_expand_sums(grad, sums, layout);
    const pybind11::gil_scoped_release release;
    choose_triplane_expand_sums()(grad, sums, layout, threads);
  });
}

}  // namespace pvdm::bindings
