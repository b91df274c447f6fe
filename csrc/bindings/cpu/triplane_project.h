// triplane_project on the CPU.
#pragma once
#include "../../cpu/kernels.h"
#include "../struct_caster.h"

PVDM_CAST_TENSORS(pvdm::ProjectTensors)

namespace pvdm::bindings {

inline void bind_triplane_project(pybind11::module_& m) {
  m.def("triplane_project_forward",
        [](const TensorView& x, const ProjectTensors& parameters, const TensorView& out, int plane, int64_t time,
           int64_t height, int64_t width, int64_t heads, double eps, int threads) {
          const ProjectOptions options{layout_of(time, height, width), plane, heads, eps, threads};
          check_project(x, parameters, out, options);
          check_float("out", out);
          const pybind11::gil_scoped_release release;
          choose_triplane_project_forward()(x, parameters, out, options);
        });
  m.def("triplane_project_backward",
        [](const TensorView& grad, const TensorView& x, const ProjectTensors& parameters, const TensorView& dx,
           const ProjectTensors& gradients, int plane, int64_t time, int64_t height, int64_t width, int64_t heads,
           double eps, int threads) {
          const ProjectOptions options{layout_of(time, height, width), plane, heads, eps, threads};
          check_project_gradients(grad, x, parameters, dx, gradients, options);
          const pybind11::gil_scoped_release release;
          choose_triplane_project_backward()(grad, x, parameters, dx, gradients, options);
        });
}

}  // namespace pvdm::bindings
