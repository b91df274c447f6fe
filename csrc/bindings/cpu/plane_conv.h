// plane_conv on the CPU: unfolding. PyTorch computes the product.
#pragma once
#include "../../cpu/kernels.h"
#include "../../ops/plane_conv.h"
#include "../../tensor_caster.h"

namespace pvdm::bindings {

inline void bind_plane_conv(pybind11::module_& m) {
  using Sizes = std::vector<int64_t>;
  m.def("plane_conv_unfold",
        [](const TensorView& x, const TensorView& out, const Sizes& sizes, int64_t first, int threads) {
          const Planes planes = planes_of(sizes);
          check_unfold(x, out, planes, first);
          const pybind11::gil_scoped_release release;
          choose_plane_conv_unfold()(x, out, planes, first, threads);
        });
  m.def("plane_conv_fold",
        [](const TensorView& unfolded, const TensorView& dx, const Sizes& sizes, int64_t first, int threads) {
          const Planes planes = planes_of(sizes);
          check_fold(unfolded, dx, planes, first);
          const pybind11::gil_scoped_release release;
          choose_plane_conv_fold()(unfolded, dx, planes, first, threads);
        });
}

}  // namespace pvdm::bindings
