// add_layer_norm: each row is read from memory once, then summed and normed while it is in the L1 cache.
// Formula: pvdm_fast/backends/reference/add_layer_norm.py.
#include "kernels.h"
#include "runtime/parallel.h"
#include "vec.h"

namespace pvdm::PVDM_ISA {
namespace {

// rows summed in float, then added in double; so results don't depend on the thread count
constexpr int64_t chunk_rows = 64;

PVDM_INLINE float total_of(Vec v) {
  float part[lanes];
  store(part, v);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) part[i] += part[i + width];
  return part[0];
}

// Writes x + residual, rounded to the type it is stored in, to `row` as floats (padded with zeros). Returns the sum
// over the channels.
template <class X, class R>
float add_row(const X* x, const R* residual, R* total, int64_t channels, float* row) {
  Vec sum = {};
  for_registers(channels, [&](int64_t c, int count) PVDM_BODY {
    Vec v = load_n(x + c, count);
    if (residual) {
      R rounded[lanes];
      store(rounded, v + load_n(residual + c, count));
      v = load(rounded);
      store_n(total + c, v, count);
    }
    store(row + c, v);
    sum += v;
  });
  return total_of(sum);
}

// Takes a row's deviations from a first estimate of its mean. Gives the error of that estimate, and 1 / std. The two
// parts of the mean stay separate until they are subtracted: rounding a mean of 1000 standard deviations costs 3e-5 of
// the result.
void moments(const float* row, float first, int64_t channels, float eps, float* shift, float* rstd) {
  Vec sum = {}, squares = {};
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    const Vec d = load(row + c) - first;
    sum += d;
    squares += d * d;
  }
  float rest = total_of(sum), square = total_of(squares);
  for (; c < channels; c++) {
    const float d = row[c] - first;
    rest += d;
    square += d * d;
  }
  const float count = static_cast<float>(channels), lack = rest / count;
  const float variance = square / count - lack * lack;
  *shift = lack;
  *rstd = 1.0f / __builtin_sqrtf((variance > 0 || variance != variance ? variance : 0.0f) + eps);
}

template <class X, class R>
void forward(const AddLayerNorm& tensors, float eps, int threads) {
  const TensorView &x = tensors.x, &residual = tensors.residual, &total = tensors.total, &normed = tensors.normed;
  const TensorView &weight = tensors.weight, &bias = tensors.bias, &mean = tensors.mean, &rstd = tensors.rstd;
  const int64_t rows = x.size[0], channels = x.size[1], padding = padded(channels);
  threads = threads_for(threads, rows);
  const Buffer work(threads * padding * 4);
  const float *w = weight.as<float>(), *b = bias.as<float>();
  parallel_for(threads, rows, [&](int64_t begin, int64_t end, int thread) {
    float* row = work.floats() + thread * padding;
    for (int64_t i = begin; i < end; i++) {
      const float sum =
          add_row(x.as<X>() + i * x.stride[0], residual.data ? residual.as<R>() + i * residual.stride[0] : nullptr,
                  total.as<R>() + i * channels, channels, row);
      const float first = sum / static_cast<float>(channels);
      float shift, r;
      moments(row, first, channels, eps, &shift, &r);
      if (mean.data) {
        mean.as<float>()[i] = first + shift;
        rstd.as<float>()[i] = r;
      }
      R* out = normed.as<R>() + i * channels;
      for_registers(channels, [&](int64_t c, int count) PVDM_BODY {
        store_n(out + c, (load(row + c) - first - shift) * r * load_n(w + c, count) + load_n(b + c, count), count);
      });
    }
  });
}

// Writes one row of dx, and adds to dweight and dbias.
template <class T>
void backward_row(const T* grad, const T* extra, const T* total, const float* weight, float mean, float rstd,
                  int64_t channels, T* dx, float* dweight, float* dbias) {
  Vec level = {}, tilt = {};
  for_registers(channels, [&](int64_t c, int count) PVDM_BODY {
    const Vec g = load_n(grad + c, count), normed = (load_n(total + c, count) - mean) * rstd;
    const Vec dn = g * load(weight + c);  // zero beyond the channels, because g is
    level += dn;
    tilt += dn * normed;
    store(dweight + c, load(dweight + c) + g * normed);
    store(dbias + c, load(dbias + c) + g);
  });
  const float share = 1.0f / static_cast<float>(channels), a = total_of(level) * share, b = total_of(tilt) * share;
  for_registers(channels, [&](int64_t c, int count) PVDM_BODY {
    const Vec normed = (load_n(total + c, count) - mean) * rstd;
    Vec d = (load_n(grad + c, count) * load(weight + c) - (a + normed * b)) * rstd;
    if (extra) d += load_n(extra + c, count);
    store_n(dx + c, d, count);
  });
}

}  // namespace

void add_layer_norm_forward(const AddLayerNorm& tensors, float eps, int threads) {
  PVDM_WITH_TYPE(tensors.x.dtype, X,
                 PVDM_WITH_TYPE(tensors.normed.dtype, R, forward<X, R>(tensors, eps, threads)))
}

void add_layer_norm_backward(const AddLayerNormGradients& tensors, int threads) {
  const TensorView &grad = tensors.grad, &extra = tensors.extra, &total = tensors.total, &weight = tensors.weight;
  const TensorView &mean = tensors.mean, &rstd = tensors.rstd, &dx = tensors.dx;
  const TensorView &dweight = tensors.dweight, &dbias = tensors.dbias;
  const int64_t rows = total.size[0], channels = total.size[1], padding = padded(channels);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const Buffer weights(padding * 4), parts(chunks * 2 * padding * 4);
  for (int64_t c = 0; c < padding; c++) weights.floats()[c] = c < channels ? weight.as<float>()[c] : 0;
  PVDM_WITH_TYPE(total.dtype, T, parallel_for(threads_for(threads, chunks), chunks, [&](int64_t begin, int64_t end, int) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* part = parts.floats() + chunk * 2 * padding;
      memset(part, 0, 2 * padding * 4);
      const int64_t last = (chunk + 1) * chunk_rows < rows ? (chunk + 1) * chunk_rows : rows;
      for (int64_t i = chunk * chunk_rows; i < last; i++)
        backward_row(grad.as<T>() + i * grad.stride[0], extra.data ? extra.as<T>() + i * extra.stride[0] : nullptr,
                     total.as<T>() + i * total.stride[0], weights.floats(), mean.as<float>()[i], rstd.as<float>()[i],
                     channels, dx.as<T>() + i * channels, part, part + padding);
    }
  }))
  for (int64_t c = 0; c < channels; c++) {
    double slope = 0, level = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      slope += parts.floats()[chunk * 2 * padding + c];
      level += parts.floats()[(chunk * 2 + 1) * padding + c];
    }
    dweight.as<float>()[c] = static_cast<float>(slope);
    dbias.as<float>()[c] = static_cast<float>(level);
  }
}

}  // namespace pvdm::PVDM_ISA
