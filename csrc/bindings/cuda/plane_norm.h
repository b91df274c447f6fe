// plane_norm on a GPU.
#pragma once
#include "../struct_caster.h"
#include "target.h"

PVDM_CAST_TENSORS(pvdm::PlaneNormTensors)
PVDM_CAST_TENSORS(pvdm::PlaneNormGradients)

namespace pvdm::bindings {

inline void check_workspace(const PlaneNormInputs& in, const TensorView& workspace) {
  check("workspace", workspace, {cuda::plane_norm_workspace(in.x.size[0], in.x.size[2], in.groups, in.planes)});
  check_float("workspace", workspace);
  check_dense("workspace", workspace);
}

inline void bind_plane_norm(pybind11::module_& m) {
  using Sizes = std::vector<int64_t>;
  m.def("plane_norm_workspace", [](int64_t batch, int64_t channels, int64_t groups, const Sizes& planes) {
    const Planes all = planes_of(planes);
    product({2, batch, all.offset(all.count) + 1, sum(channels, groups)});
    return cuda::plane_norm_workspace(batch, channels, groups, all);
  });
  m.def("plane_norm_forward", [](const PlaneNormTensors& tensors, const TensorView& y, const TensorView& workspace,
                                 const Sizes& planes, int64_t groups, double eps, bool activation, int resample, int device,
                                 uintptr_t stream) {
    const PlaneNormInputs in{tensors, planes_of(planes), groups, activation, resample};
    check(in);
    check_output(in, y);
    check_workspace(in, workspace);
    const pybind11::gil_scoped_release release;
    cuda::plane_norm_forward(in, y, workspace, static_cast<float>(eps), target(device, stream));
  });
  m.def("plane_norm_backward", [](const PlaneNormTensors& tensors, const PlaneNormGradients& gradients,
                                  const TensorView& workspace, const Sizes& planes, int64_t groups, bool activation,
                                  int resample, int device, uintptr_t stream) {
    const PlaneNormInputs in{tensors, planes_of(planes), groups, activation, resample};
    check(in);
    check(in, gradients);
    check_workspace(in, workspace);
    const pybind11::gil_scoped_release release;
    cuda::plane_norm_backward(in, gradients, workspace, target(device, stream));
  });
}

}  // namespace pvdm::bindings
