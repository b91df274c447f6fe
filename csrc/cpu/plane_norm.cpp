// plane_norm, forward: one pass over x for the statistics, one that writes. Formula:
// pvdm_fast/backends/reference/plane_norm.py.
#include "plane_norm.h"

namespace pvdm::PVDM_ISA {
namespace {

// sum += x - shift, square += (x - shift)^2 for `tokens` tokens, channel by channel.
template <class T, int tokens>
void accumulate(const T* x, int64_t stride, const float* shift, float* sum, float* square, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    const int count = count_at(c, channels);
    Vec s = load(sum + c), q = load(square + c);
    const Vec origin = load(shift + c);
    for (int i = 0; i < tokens; i++) {
      const Vec d = load_n(x + i * stride + c, count) - origin;
      s += d;
      q += d * d;
    }
    store(sum + c, s);
    store(square + c, q);
  }
}

// Mean and sum of squared deviations of each channel over a chunk. Values are taken relative to the chunk's first
// token, so that a mean far above the deviation costs no digits. work: 3 padded rows. result: 2 padded rows.
template <class T>
void chunk_moments(const T* x, int64_t stride, int64_t tokens, int64_t channels, float* work, double* result) {
  const int64_t padding = padded(channels);
  float *shift = work, *sum = work + padding, *square = sum + padding;
  for (int64_t c = 0; c < padding; c += lanes)
    store(shift + c, c < channels ? load_n(x + c, count_at(c, channels)) : Vec{});
  for (int64_t i = 0; i < 2 * padding; i++) sum[i] = 0, result[i] = 0;
  for (int64_t n = 0; n < tokens;) {
    const int64_t stop = n + exact_tokens < tokens ? n + exact_tokens : tokens;
    for (; n + at_once <= stop; n += at_once)
      accumulate<T, at_once>(x + n * stride, stride, shift, sum, square, channels);
    for (; n < stop; n++) accumulate<T, 1>(x + n * stride, stride, shift, sum, square, channels);
    flush(sum, result, 2 * padding);
  }
  for (int64_t c = 0; c < padding; c++) {
    const double offset = result[c] / static_cast<double>(tokens);
    result[padding + c] -= offset * result[c];
    result[c] = offset + shift[c];
  }
}

// Combines the moments of a plane's chunks and a group's channels into mean and variance. moments: those of the first
// chunk.
void group_moments(const double* moments, int64_t tokens, int64_t padding, int64_t first, int64_t width, double* mean,
                   double* variance) {
  const double count = static_cast<double>(tokens * width);
  double total = 0, squares = 0;
  for (int64_t n = 0; n < tokens; n += chunk_tokens) {
    const double weight = static_cast<double>(tokens - n < chunk_tokens ? tokens - n : chunk_tokens);
    const double* row = moments + n / chunk_tokens * 2 * padding;
    for (int64_t c = first; c < first + width; c++) total += row[c] * weight;
  }
  *mean = total / count;
  for (int64_t n = 0; n < tokens; n += chunk_tokens) {
    const double weight = static_cast<double>(tokens - n < chunk_tokens ? tokens - n : chunk_tokens);
    const double* row = moments + n / chunk_tokens * 2 * padding;
    for (int64_t c = first; c < first + width; c++)
      squares += row[padding + c] + (row[c] - *mean) * (row[c] - *mean) * weight;
  }
  *variance = squares > 0 || squares != squares ? squares / count : 0;
}

// z = (x - origin) * slope + rest. origin is the rounded mean, and rest includes its rounding error.
struct Affine {
  const float *origin, *slope, *rest;
  template <class T, bool activation>
  inline __attribute__((always_inline)) Vec at(const T* x, int64_t c, int count) const {
    return activated<activation>((load_n(x + c, count) - load(origin + c)) * load(slope + c) + load(rest + c));
  }
};

// Writes the tokens of one chunk. With resample -1 the chunk counts output tokens, otherwise input tokens.
template <class T, bool activation>
void write_chunk(const T* x, int64_t stride, const Affine& affine, T* y, int64_t channels, const Chunk& chunk,
                 int64_t columns, int resample) {
  for (int64_t n = chunk.first; n < chunk.first + chunk.count; n++) {
    const int64_t i = n / columns, j = n % columns;
    for (int64_t c = 0; c < channels; c += lanes) {
      const int count = count_at(c, channels);
      if (resample == 0) {
        store_n(y + n * channels + c, affine.template at<T, activation>(x + n * stride, c, count), count);
      } else if (resample > 0) {
        const Vec value = affine.template at<T, activation>(x + n * stride, c, count);
        for (int64_t k = 0; k < 4; k++)
          store_n(y + ((2 * i + k / 2) * 2 * columns + 2 * j + k % 2) * channels + c, value, count);
      } else {
        Vec sum = {};
        for (int64_t k = 0; k < 4; k++)
          sum += affine.template at<T, activation>(x + ((2 * i + k / 2) * 2 * columns + 2 * j + k % 2) * stride, c, count);
        store_n(y + n * channels + c, sum * 0.25f, count);
      }
    }
  }
}

template <class T>
void all_moments(const PlaneNormInputs& in, const Chunks& chunks, double* moments, int threads) {
  const TensorView& x = in.x;
  const int64_t channels = x.size[2], padding = padded(channels), units = x.size[0] * chunks.total;
  threads = threads_for(threads, units);
  const Buffer work(threads * 3 * padding * 4);
  parallel_for(threads, units, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t unit = begin; unit < end; unit++) {
      const Chunk chunk = chunks.at(unit % chunks.total);
      const int64_t token = in.planes.offset(chunk.plane) + chunk.first;
      const T* from = x.as<T>() + unit / chunks.total * x.stride[0] + token * x.stride[1];
      chunk_moments(from, x.stride[1], chunk.count, channels, work.floats() + thread * 3 * padding,
                    moments + unit * 2 * padding);
    }
  });
}

// Statistics of one batch element, and three rows of parameters for each of its planes.
void prepare(const PlaneNormInputs& in, const double* moments, const Chunks& chunks, int64_t b, double eps,
             float* parameters) {
  const int64_t channels = in.x.size[2], padding = padded(channels), width = channels / in.groups;
  for (int64_t p = 0; p < in.planes.count; p++)
    for (int64_t g = 0; g < in.groups; g++) {
      double m, variance;
      group_moments(moments + chunks.start(p) * 2 * padding, chunks.tokens(p), padding, g * width, width, &m, &variance);
      const double r = 1.0 / __builtin_sqrt(variance + eps);
      const float rounded = static_cast<float>(m);
      const int64_t at = (b * in.planes.count + p) * in.groups + g;
      in.mean.as<float>()[at] = rounded;
      in.rstd.as<float>()[at] = static_cast<float>(r);
      float* rows = parameters + p * 3 * padding;
      for (int64_t c = g * width; c < (g + 1) * width; c++) {
        const double scale = 1.0 + scale_shift_at(in, b, c), slope = r * in.weight.as<float>()[c] * scale;
        rows[c] = rounded;
        rows[padding + c] = static_cast<float>(slope);
        rows[2 * padding + c] = static_cast<float>((rounded - m) * slope + in.bias.as<float>()[c] * scale +
                                                   scale_shift_at(in, b, channels + c));
      }
    }
}

template <class T, bool activation>
void write_all(const PlaneNormInputs& in, const TensorView& y, const float* parameters, int threads) {
  const TensorView& x = in.x;
  const Chunks chunks(in.planes, in.resample < 0);
  const int64_t channels = x.size[2], padding = padded(channels), units = x.size[0] * chunks.total;
  parallel_for(threads_for(threads, units), units, [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / chunks.total;
      const Chunk chunk = chunks.at(unit % chunks.total);
      const int64_t token = in.planes.offset(chunk.plane);
      const float* rows = parameters + (b * in.planes.count + chunk.plane) * 3 * padding;
      write_chunk<T, activation>(x.as<T>() + b * x.stride[0] + token * x.stride[1], x.stride[1],
                                 Affine{rows, rows + padding, rows + 2 * padding},
                                 y.as<T>() + b * y.stride[0] + in.written(token) * channels, channels, chunk,
                                 chunks.columns(chunk.plane), in.resample);
    }
  });
}

}  // namespace

void plane_norm_forward(const PlaneNormInputs& in, const TensorView& y, double eps, int threads) {
  const Chunks chunks(in.planes, false);
  const int64_t batch = in.x.size[0], padding = padded(in.x.size[2]), count = in.planes.count;
  const Buffer moments(batch * chunks.total * 2 * padding * 8), parameters(batch * count * 3 * padding * 4);
  memset(parameters.floats(), 0, batch * count * 3 * padding * 4);
  PVDM_WITH_TYPE(in.x.dtype, T, all_moments<T>(in, chunks, moments.doubles(), threads))
  parallel_for(threads_for(threads, batch), batch, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; b++)
      prepare(in, moments.doubles() + b * chunks.total * 2 * padding, chunks, b, eps,
              parameters.floats() + b * count * 3 * padding);
  });
  PVDM_WITH_TYPE(in.x.dtype, T, in.activation ? write_all<T, true>(in, y, parameters.floats(), threads)
                                              : write_all<T, false>(in, y, parameters.floats(), threads))
}

}  // namespace pvdm::PVDM_ISA
