// plane_norm on the CPU.
#pragma once
#include "../../cpu/kernels.h"
#include "../struct_caster.h"

PVDM_CAST_TENSORS(pvdm::PlaneNormTensors)
PVDM_CAST_TENSORS(pvdm::PlaneNormGradients)

namespace pvdm::bindings {

inline void bind_plane_norm(pybind11::module_& m) {
  using Sizes = std::vector<int64_t>;
  m.def("plane_norm_forward", [](const PlaneNormTensors& tensors, const TensorView& y, const Sizes& planes, int64_t groups,
                                 double eps, bool activation, int resample, int threads) {
    const PlaneNormInputs in{tensors, planes_of(planes), groups, activation, resample};
    check(in);
    check_output(in, y);
    const pybind11::gil_scoped_release release;
    choose_plane_norm_forward()(in, y, eps, threads);
  });
  m.def("plane_norm_backward", [](const PlaneNormTensors& tensors, const PlaneNormGradients& gradients, const Sizes& planes,
                                  int64_t groups, bool activation, int resample, int threads) {
    const PlaneNormInputs in{tensors, planes_of(planes), groups, activation, resample};
    check(in);
    check(in, gradients);
    const pybind11::gil_scoped_release release;
    choose_plane_norm_backward()(in, gradients, threads);
  });
}

}  // namespace pvdm::bindings
