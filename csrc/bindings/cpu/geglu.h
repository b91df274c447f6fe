// geglu on the CPU.
#pragma once
#include "../../cpu/kernels.h"
#include "../../ops/geglu.h"
#include "../../tensor_caster.h"

namespace pvdm::bindings {

inline void bind_geglu(pybind11::module_& m) {
  m.def("geglu_forward", [](const TensorView& halves, const TensorView& result, int threads) {
    const TensorView x = rows_of("x", halves), out = rows_of("out", result);
    check_geglu(x, out);
    const pybind11::gil_scoped_release release;
    choose_geglu_forward()(x, out, threads);
  });
  m.def("geglu_backward", [](const TensorView& gradient, const TensorView& halves, const TensorView& result, int threads) {
    const TensorView grad = rows_of("grad", gradient), x = rows_of("x", halves), dx = rows_of("dx", result);
    check_geglu_gradients(grad, x, dx);
    const pybind11::gil_scoped_release release;
    choose_geglu_backward()(grad, x, dx, threads);
  });
}

}  // namespace pvdm::bindings
