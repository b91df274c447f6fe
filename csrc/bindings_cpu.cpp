// pvdm_fast._cpu: one function an operation and direction. Arguments are checked here, kernels trust them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "tensor_caster.h"

namespace py = pybind11;
using pvdm::Dtype;
using pvdm::Layout;
using pvdm::TensorView;

namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// Kernels read and write through these: the shape must be exactly this, the last axis dense.
void check(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes) {
  require(t.data || t.size[0] == 0 || t.dims == 0, std::string(name) + " has no memory.");
  bool same = t.dims == static_cast<int>(sizes.size());
  int axis = 0;
  for (int64_t size : sizes) same = same && t.size[axis++] == size;
  require(same, std::string(name) + " has not the shape that the layout and the other tensors ask for.");
  require(t.size[t.dims - 1] <= 1 || t.stride[t.dims - 1] == 1, std::string(name) + ": the last axis must be dense.");
}

void check_float(const char* name, const TensorView& t) {
  require(t.dtype == Dtype::f32, std::string(name) + " must be float32.");
}

void check_dense(const char* name, const TensorView& t) {
  int64_t dense = 1;
  for (int i = t.dims - 1; i >= 0; i--) {
    require(t.size[i] <= 1 || t.stride[i] == dense, std::string(name) + " must be contiguous.");
    dense *= t.size[i];
  }
}

void expand_forward(TensorView planes, TensorView weight, TensorView bias, TensorView out, int64_t time, int64_t height,
                    int64_t width, int threads) {
  const Layout layout{time, height, width};
  const int64_t batch = planes.size[0], channels = weight.size[1], depth = weight.size[2];
  check("planes", planes, {batch, layout.tokens(), depth});
  check("weight", weight, {3, channels, depth});
  check("bias", bias, {3, channels});
  check("out", out, {batch, time * height * width, channels});
  check_float("weight", weight);
  check_float("bias", bias);
  check_dense("out", out);
  require(out.dtype == planes.dtype && planes.dtype != Dtype::f64, "planes and out must share a dtype of at most 32 bits.");
  py::gil_scoped_release release;
  pvdm::choose_triplane_expand_forward()(planes, weight, bias, out, layout, threads);
}

void expand_sums(TensorView grad, TensorView sums, int64_t time, int64_t height, int64_t width, int threads) {
  const Layout layout{time, height, width};
  const int64_t batch = grad.size[0], channels = grad.size[2];
  check("grad", grad, {batch, time * height * width, channels});
  check("sums", sums, {batch, layout.tokens(), channels});
  check_float("sums", sums);
  check_dense("sums", sums);
  require(grad.dtype != Dtype::f64, "grad must be float32, bfloat16 or float16.");
  py::gil_scoped_release release;
  pvdm::choose_triplane_expand_sums()(grad, sums, layout, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of pvdm_fast; call them through pvdm_fast.native.cpu.";
  m.attr("abi") = 1;
  m.def("isa", [] { return pvdm::isa_name(pvdm::current_isa()); });
  m.def("isas", &pvdm::usable_isas);
  m.def("set_isa", &pvdm::set_isa);
  m.def("triplane_expand_forward", &expand_forward);
  m.def("triplane_expand_sums", &expand_sums);
}
