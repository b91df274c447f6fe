// plane_norm, backward: one pass over x and grad for the sums, one that writes dx. Normed values are recomputed.
//
// With n = (x - mean) rstd, z = n slope + rest (weight, bias and FiLM folded), dz the gradient of z: dx = rstd (slope
// dz - avg(slope dz) - n avg(slope dz n)), averaged over a group's tokens and channels.
#include "plane_norm.h"

namespace pvdm::PVDM_ISA {
namespace {

enum Row { mean_row, rstd_row, slope_row, rest_row, gain_row, level_row, tilt_row, row_count };

// The gradient of one plane, read as if it had the resolution of x: the transpose of the resampling.
template <class T>
struct PlaneGrad {
  const T* data;
  int64_t stride, columns;  // columns of x's plane
  int resample;

  inline __attribute__((always_inline)) Vec at(int64_t n, int64_t c, int count) const {
    if (resample == 0) return load_n(data + n * stride + c, count);
    const int64_t i = n / columns, j = n % columns;
    if (resample < 0) return load_n(data + (i / 2 * (columns / 2) + j / 2) * stride + c, count) * 0.25f;
    const T* corner = data + (2 * i * 2 * columns + 2 * j) * stride + c;
    return (load_n(corner, count) + load_n(corner + stride, count)) +
           (load_n(corner + 2 * columns * stride, count) + load_n(corner + (2 * columns + 1) * stride, count));
  }
};

// dz from the gradient of silu(z): g (s + z s (1 - s)), s = sigmoid(z).
template <bool activation>
PVDM_INLINE Vec through_activation(Vec g, Vec z) {
  if (!activation) return g;
  const Vec s = sigmoid(z);
  return g * (s + z * s * (1.0f - s));
}

// first += dz, second += dz n for `tokens` tokens from n on.
template <class T, bool activation, int tokens>
void accumulate(const PlaneGrad<T>& grad, const T* x, int64_t stride, int64_t n, const float* rows, float* first,
                float* second, int64_t channels) {
  const int64_t padding = padded(channels);
  for (int64_t c = 0; c < channels; c += lanes) {
    const int count = count_at(c, channels);
    const Vec mean = load(rows + c), rstd = load(rows + rstd_row * padding + c);
    const Vec slope = load(rows + slope_row * padding + c), rest = load(rows + rest_row * padding + c);
    Vec a = load(first + c), b = load(second + c);
    for (int64_t i = n; i < n + tokens; i++) {
      const Vec normed = (load_n(x + i * stride + c, count) - mean) * rstd;
      const Vec dz = through_activation<activation>(grad.at(i, c, count), normed * slope + rest);
      a += dz;
      b += dz * normed;
    }
    store(first + c, a);
    store(second + c, b);
  }
}

// Sums of dz and dz n of each channel over a chunk. work, result: 2 padded rows.
template <class T, bool activation>
void chunk_sums(const PlaneGrad<T>& grad, const T* x, int64_t stride, const Chunk& chunk, const float* rows,
                int64_t channels, float* work, double* result) {
  const int64_t padding = padded(channels), last = chunk.first + chunk.count;
  for (int64_t i = 0; i < 2 * padding; i++) work[i] = 0, result[i] = 0;
  for (int64_t n = chunk.first; n < last;) {
    const int64_t stop = n + exact_tokens < last ? n + exact_tokens : last;
    for (; n + at_once <= stop; n += at_once)
      accumulate<T, activation, at_once>(grad, x, stride, n, rows, work, work + padding, channels);
    for (; n < stop; n++)
      accumulate<T, activation, 1>(grad, x, stride, n, rows, work, work + padding, channels);
    flush(work, result, 2 * padding);
  }
}

template <class T, bool activation>
void write_chunk(const PlaneGrad<T>& grad, const T* x, int64_t stride, const Chunk& chunk, const float* rows, T* dx,
                 int64_t channels) {
  const int64_t padding = padded(channels);
  for (int64_t n = chunk.first; n < chunk.first + chunk.count; n++)
    for (int64_t c = 0; c < channels; c += lanes) {
      const int count = count_at(c, channels);
      const Vec normed = (load_n(x + n * stride + c, count) - load(rows + c)) * load(rows + rstd_row * padding + c);
      const Vec z = normed * load(rows + slope_row * padding + c) + load(rows + rest_row * padding + c);
      const Vec dz = through_activation<activation>(grad.at(n, c, count), z);
      const Vec back = load(rows + level_row * padding + c) + normed * load(rows + tilt_row * padding + c);
      store_n(dx + n * channels + c, dz * load(rows + gain_row * padding + c) - back, count);
    }
}

// For every (batch element, plane), the rows that are known before the sums.
void prepare(const PlaneNormInputs& in, float* parameters) {
  const int64_t channels = in.x.size[2], padding = padded(channels), planes = in.planes.count;
  for (int64_t b = 0; b < in.x.size[0]; b++)
    for (int64_t p = 0; p < planes; p++)
      for (int64_t c = 0; c < channels; c++) {
        const int64_t at = (b * planes + p) * in.groups + c / (channels / in.groups);
        float* row = parameters + (b * planes + p) * row_count * padding + c;
        const float scale = 1.0f + scale_shift_at(in, b, c);
        row[mean_row * padding] = in.mean.as<float>()[at];
        row[rstd_row * padding] = in.rstd.as<float>()[at];
        row[slope_row * padding] = in.weight.as<float>()[c] * scale;
        row[rest_row * padding] = in.bias.as<float>()[c] * scale + scale_shift_at(in, b, channels + c);
      }
}

// From the chunks' sums: gradients of weight, bias and FiLM, and the remaining rows. Chunks are added in order.
void combine(const PlaneNormInputs& in, const double* sums, const Chunks& chunks, const TensorView& dscale_shift,
             float* parameters, double* dweight, double* dbias, double* totals) {
  const int64_t channels = in.x.size[2], padding = padded(channels), width = channels / in.groups;
  const int64_t planes = in.planes.count;
  for (int64_t b = 0; b < in.x.size[0]; b++)
    for (int64_t p = 0; p < planes; p++) {
      float* rows = parameters + (b * planes + p) * row_count * padding;
      for (int64_t i = 0; i < 2 * padding; i++) totals[i] = 0;
      for (int64_t k = chunks.start(p); k < chunks.start(p + 1); k++)
        for (int64_t i = 0; i < 2 * padding; i++) totals[i] += sums[(b * chunks.total + k) * 2 * padding + i];
      for (int64_t c = 0; c < channels; c++) {
        const double scale = 1.0 + scale_shift_at(in, b, c), level = totals[c], tilt = totals[padding + c];
        dweight[c] += scale * tilt;
        dbias[c] += scale * level;
        if (!dscale_shift.data) continue;
        float* to = dscale_shift.as<float>() + b * 2 * channels + c;
        to[0] += static_cast<float>(tilt * in.weight.as<float>()[c] + level * in.bias.as<float>()[c]);
        to[channels] += static_cast<float>(level);
      }
      for (int64_t g = 0; g < in.groups; g++) {
        double level = 0, tilt = 0;
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
          level += rows[slope_row * padding + c] * totals[c];
          tilt += rows[slope_row * padding + c] * totals[padding + c];
        }
        const double count = static_cast<double>(chunks.tokens(p) * width);
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
          const float rstd = rows[rstd_row * padding + c];
          rows[gain_row * padding + c] = rstd * rows[slope_row * padding + c];
          rows[level_row * padding + c] = static_cast<float>(rstd * level / count);
          rows[tilt_row * padding + c] = static_cast<float>(rstd * tilt / count);
        }
      }
    }
}

// Calls body(chunk, x of the plane, gradient of the plane, rows, unit, thread) for every chunk.
template <class T, class F>
void for_chunks(const PlaneNormInputs& in, const TensorView& grad, const Chunks& chunks, const float* parameters,
                int threads, const F& body) {
  const TensorView& x = in.x;
  const int64_t padding = padded(x.size[2]), units = x.size[0] * chunks.total;
  parallel_for(threads, units, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / chunks.total;
      const Chunk chunk = chunks.at(unit % chunks.total);
      const int64_t token = in.planes.offset(chunk.plane);
      const PlaneGrad<T> g{grad.as<T>() + b * grad.stride[0] + in.written(token) * grad.stride[1], grad.stride[1],
                           chunks.columns(chunk.plane), in.resample};
      body(chunk, x.as<T>() + b * x.stride[0] + token * x.stride[1], g,
           parameters + (b * in.planes.count + chunk.plane) * row_count * padding, unit, thread);
    }
  });
}

template <class T, bool activation>
void all_sums(const PlaneNormInputs& in, const TensorView& grad, const Chunks& chunks, const float* parameters,
              double* sums, int threads) {
  const TensorView& x = in.x;
  const int64_t channels = x.size[2], padding = padded(channels);
  threads = threads_for(threads, x.size[0] * chunks.total);
  const Buffer work(threads * 2 * padding * 4);
  for_chunks<T>(in, grad, chunks, parameters, threads,
                [&](const Chunk& chunk, const T* from, const PlaneGrad<T>& g, const float* rows, int64_t unit, int thread) {
                  chunk_sums<T, activation>(g, from, x.stride[1], chunk, rows, channels,
                                            work.floats() + thread * 2 * padding, sums + unit * 2 * padding);
                });
}

template <class T, bool activation>
void write_all(const PlaneNormInputs& in, const TensorView& grad, const Chunks& chunks, const float* parameters,
               const TensorView& dx, int threads) {
  const TensorView& x = in.x;
  threads = threads_for(threads, x.size[0] * chunks.total);
  for_chunks<T>(in, grad, chunks, parameters, threads,
                [&](const Chunk& chunk, const T* from, const PlaneGrad<T>& g, const float* rows, int64_t unit, int) {
                  T* to = dx.as<T>() + unit / chunks.total * dx.stride[0] + in.planes.offset(chunk.plane) * x.size[2];
                  write_chunk<T, activation>(g, from, x.stride[1], chunk, rows, to, x.size[2]);
                });
}

}  // namespace

void plane_norm_backward(const PlaneNormInputs& in, const PlaneNormGradients& gradients, int threads) {
  const TensorView &grad = gradients.grad, &dx = gradients.dx, &dweight = gradients.dweight, &dbias = gradients.dbias;
  const TensorView& dscale_shift = gradients.dscale_shift;
  const Chunks chunks(in.planes, false);
  const int64_t batch = in.x.size[0], channels = in.x.size[2], padding = padded(channels);
  const int64_t rows = batch * in.planes.count * row_count * padding;
  const Buffer parameters(rows * 4), sums(batch * chunks.total * 2 * padding * 8), totals(4 * padding * 8);
  memset(parameters.floats(), 0, rows * 4);
  memset(totals.doubles(), 0, 4 * padding * 8);
  if (dscale_shift.data) memset(dscale_shift.data, 0, batch * 2 * channels * 4);
  prepare(in, parameters.floats());
  PVDM_WITH_TYPE(in.x.dtype, T,
                 in.activation ? all_sums<T, true>(in, grad, chunks, parameters.floats(), sums.doubles(), threads)
                               : all_sums<T, false>(in, grad, chunks, parameters.floats(), sums.doubles(), threads))
  double *dw = totals.doubles() + 2 * padding, *db = dw + padding;
  combine(in, sums.doubles(), chunks, dscale_shift, parameters.floats(), dw, db, totals.doubles());
  for (int64_t c = 0; c < channels; c++) {
    dweight.as<float>()[c] = static_cast<float>(dw[c]);
    dbias.as<float>()[c] = static_cast<float>(db[c]);
  }
  PVDM_WITH_TYPE(in.x.dtype, T, in.activation ? write_all<T, true>(in, grad, chunks, parameters.floats(), dx, threads)
                                              : write_all<T, false>(in, grad, chunks, parameters.floats(), dx, threads))
}

}  // namespace pvdm::PVDM_ISA
