// add_layer_norm on the CPU.
#pragma once
#include "../../cpu/kernels.h"
#include "../struct_caster.h"

PVDM_CAST_TENSORS(pvdm::AddLayerNorm)
PVDM_CAST_TENSORS(pvdm::AddLayerNormGradients)

namespace pvdm::bindings {

inline void bind_add_layer_norm(pybind11::module_& m) {
  m.def("add_layer_norm_forward", [](const AddLayerNorm& given, float eps, int threads) {
    const AddLayerNorm tensors = given.rows();
    check(tensors);
    const pybind11::gil_scoped_release release;
    choose_add_layer_norm_forward()(tensors, eps, threads);
  });
  m.def("add_layer_norm_backward", [](const AddLayerNormGradients& given, int threads) {
    const AddLayerNormGradients tensors = given.rows();
    check(tensors);
    const pybind11::gil_scoped_release release;
    choose_add_layer_norm_backward()(tensors, threads);
  });
}

}  // namespace pvdm::bindings
