// pvdm_fast._cpu: one function an operation and direction. Arguments are checked here, kernels trust them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings_attention.h"
#include "bindings_attention_jvp.h"
#include "bindings_pointwise.h"
#include "cpu/kernels.h"
#include "tensor_caster.h"
#include "tensor_checks.h"

namespace py = pybind11;
using namespace pvdm;

namespace {

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

using Sizes = std::vector<int64_t>;

pvdm::NormOptions norm_options(const Sizes& planes, int64_t groups, double eps, bool activation, int resample,
                               int threads) {
  require(resample >= -1 && resample <= 1, "resample must be -1, 0 or 1.");
  require(planes.size() % 2 == 0, "planes must be (rows, columns, rows, columns, ...).");
  for (int64_t size : planes) {
    require(size > 0, "The planes' sizes must be positive.");
    require(resample >= 0 || size % 2 == 0, "Halving needs even sizes.");
  }
  return {{planes.data(), static_cast<int64_t>(planes.size() / 2)}, groups, eps, activation, resample, threads};
}

int64_t resampled(int64_t tokens, int resample) { return resample > 0 ? tokens * 4 : resample < 0 ? tokens / 4 : tokens; }

// What both directions read.
void check_norm(const TensorView& x, const TensorView& weight, const TensorView& bias, const TensorView& scale_shift,
                const TensorView& mean, const TensorView& rstd, const pvdm::NormOptions& o) {
  const int64_t batch = x.size[0], channels = x.size[2], count = o.planes.count;
  check("x", x, {batch, o.planes.offset(count), channels});
  require(o.groups > 0 && channels % o.groups == 0, "The channels must be a multiple of the groups.");
  require(x.dtype != Dtype::f64, "x must be float32, bfloat16 or float16.");
  check("weight", weight, {channels});
  check("bias", bias, {channels});
  check("mean", mean, {batch, count, o.groups});
  check("rstd", rstd, {batch, count, o.groups});
  for (const auto* t : {&weight, &bias, &scale_shift, &mean, &rstd}) check_float("A parameter or statistic", *t);
  if (scale_shift.data) check("scale_shift", scale_shift, {batch, 2 * channels});
}

void norm_forward(TensorView x, TensorView weight, TensorView bias, TensorView scale_shift, TensorView y, TensorView mean,
                  TensorView rstd, const Sizes& planes, int64_t groups, double eps, bool activation, int resample, int threads) {
  const auto o = norm_options(planes, groups, eps, activation, resample, threads);
  check_norm(x, weight, bias, scale_shift, mean, rstd, o);
  check("y", y, {x.size[0], resampled(o.planes.offset(o.planes.count), resample), x.size[2]});
  check_dense("y", y);
  require(y.dtype == x.dtype, "x and y must share a dtype.");
  py::gil_scoped_release release;
  pvdm::choose_plane_norm_forward()(x, weight, bias, scale_shift, y, mean, rstd, o);
}

void norm_backward(TensorView grad, TensorView x, TensorView weight, TensorView bias, TensorView scale_shift, TensorView mean,
                   TensorView rstd, TensorView dx, TensorView dweight, TensorView dbias, TensorView dscale_shift, const Sizes& planes,
                   int64_t groups, bool activation, int resample,
                   int threads) {
  const auto o = norm_options(planes, groups, 0, activation, resample, threads);
  check_norm(x, weight, bias, scale_shift, mean, rstd, o);
  check("grad", grad, {x.size[0], resampled(o.planes.offset(o.planes.count), resample), x.size[2]});
  check("dx", dx, {x.size[0], o.planes.offset(o.planes.count), x.size[2]});
  check_dense("dx", dx);
  check("dweight", dweight, {x.size[2]});
  check("dbias", dbias, {x.size[2]});
  if (dscale_shift.data) check("dscale_shift", dscale_shift, {x.size[0], 2 * x.size[2]});
  check_dense("dscale_shift", dscale_shift);
  for (const auto* t : {&dweight, &dbias, &dscale_shift}) check_float("A parameter's gradient", *t);
  require(grad.dtype == x.dtype && dx.dtype == x.dtype, "grad, x and dx must share a dtype.");
  require(!dscale_shift.data == !scale_shift.data, "scale_shift and its gradient go together.");
  py::gil_scoped_release release;
  pvdm::choose_plane_norm_backward()(grad, x, weight, bias, scale_shift, mean, rstd, dx, dweight, dbias, dscale_shift, o);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of pvdm_fast; call them through pvdm_fast.backends.cpu.";
  m.attr("abi") = 3;
  m.def("isa", [] { return pvdm::isa_name(pvdm::current_isa()); });
  m.def("isas", &pvdm::usable_isas);
  m.def("set_isa", &pvdm::set_isa);
  m.def("triplane_expand_forward", &expand_forward);
  m.def("triplane_expand_sums", &expand_sums);
  m.def("plane_norm_forward", &norm_forward);
  m.def("plane_norm_backward", &norm_backward);
  pvdm::border::bind_attention(m);
  pvdm::border::bind_attention_jvp(m);
  pvdm::border::bind_pointwise(m);
}
