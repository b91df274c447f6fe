// triplane_expand: from three planes to a lattice and back. Formula: pvdm_fast/backends/reference/triplane_expand.py.
#include "kernels.h"
#include "runtime/parallel.h"
#include "vec.h"

namespace pvdm::PVDM_ISA {
namespace {

constexpr int tokens_at_once = 4;

// weight (3, C, D) -> (3, D, padded C), so that channels are the fast axis.
void transpose_weight(const TensorView& weight, int64_t padding, float* out) {
  const int64_t channels = weight.size[1], depth = weight.size[2];
  for (int64_t p = 0; p < 3; p++)
    for (int64_t d = 0; d < depth; d++)
      for (int64_t c = 0; c < padding; c++)
        out[(p * depth + d) * padding + c] =
            c < channels ? weight.as<float>()[p * weight.stride[0] + c * weight.stride[1] + d * weight.stride[2]] : 0;
}

// One to four tokens: out[token] = x[token] @ weight + bias. All rows are padded.
template <class T>
void project_tokens(const T* const* x, int count, const float* weight, const float* bias, int64_t depth,
                    int64_t padding, float* values, float* out) {
  for (int i = 0; i < tokens_at_once; i++)
    for (int64_t d = 0; d < depth; d++) values[i * depth + d] = load_n(x[i < count ? i : 0] + d, 1)[0];
  for (int64_t c = 0; c < padding; c += lanes) {
    Vec sum[tokens_at_once];
    for (auto& s : sum) s = load(bias + c);
    for (int64_t d = 0; d < depth; d++) {
      const Vec w = load(weight + d * padding + c);
      for (int i = 0; i < tokens_at_once; i++) sum[i] += w * values[i * depth + d];
    }
    for (int i = 0; i < count; i++) store(out + i * padding + c, sum[i]);
  }
}

// All tokens of one batch element, each with the weight of its plane.
template <class T>
void project(const T* planes, int64_t stride, const float* weight, const float* bias, int64_t depth, int64_t padding,
             const Layout& layout, int threads, float* values, float* out) {
  const int64_t tokens = layout.tokens();
  threads = threads_for(threads, tokens / 64);
  parallel_for(threads, tokens, [&](int64_t begin, int64_t end, int thread) {
    for (int plane = 0; plane < 3; plane++) {
      const int64_t first = begin > layout.offset(plane) ? begin : layout.offset(plane);
      const int64_t last = end < layout.offset(plane + 1) ? end : layout.offset(plane + 1);
      for (int64_t n = first; n < last; n += tokens_at_once) {
        const T* x[tokens_at_once];
        const int count = last - n < tokens_at_once ? static_cast<int>(last - n) : tokens_at_once;
        for (int i = 0; i < tokens_at_once; i++) x[i] = planes + (n + (i < count ? i : 0)) * stride;
        project_tokens(x, count, weight + plane * depth * padding, bias + plane * padding, depth, padding,
                       values + thread * tokens_at_once * depth, out + n * padding);
      }
    }
  });
}

// out[t, h, w] = xy[h, w] + yt[t, w] + xt[t, h]. Units are (h, t), so that a row of xy stays in cache for all t.
template <class T>
void broadcast_sum(const float* projected, int64_t channels, int64_t padding, const Layout& layout, int threads,
                   T* out) {
  const float *xy = projected, *yt = xy + layout.offset(1) * padding, *xt = xy + layout.offset(2) * padding;
  const int64_t units = layout.height * layout.time, width = layout.width;
  parallel_for(threads_for(threads, units), units, [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t h = unit / layout.time, t = unit % layout.time;
      const float* last = xt + (t * layout.height + h) * padding;
      for (int64_t w = 0; w < width; w++) {
        const float *a = xy + (h * width + w) * padding, *b = yt + (t * width + w) * padding;
        T* to = out + ((t * layout.height + h) * width + w) * channels;
        int64_t c = 0;
        for (; c + lanes <= channels; c += lanes) store(to + c, load(a + c) + load(b + c) + load(last + c));
        if (c < channels) store_n(to + c, load(a + c) + load(b + c) + load(last + c), count_at(c, channels));
      }
    }
  });
}

// The three sums for `vectors` registers of channels. Only in the last slice `count` may be below the number of lanes.
template <class T, int vectors>
void sum_slice(const T* grad, int64_t stride, float* sums, int64_t channels, const Layout& layout, int count) {
  float *xy = sums, *yt = sums + layout.offset(1) * channels, *xt = sums + layout.offset(2) * channels;
  for (int64_t t = 0; t < layout.time; t++)
    for (int64_t h = 0; h < layout.height; h++) {
      Vec row[vectors] = {};
      for (int64_t w = 0; w < layout.width; w++) {
        const T* g = grad + ((t * layout.height + h) * layout.width + w) * stride;
        float *over_time = xy + (h * layout.width + w) * channels, *over_height = yt + (t * layout.width + w) * channels;
        for (int v = 0; v < vectors; v++) {
          const Vec x = load_n(g + v * lanes, count);
          row[v] += x;
          store_n(over_time + v * lanes, t ? load_n(over_time + v * lanes, count) + x : x, count);
          store_n(over_height + v * lanes, h ? load_n(over_height + v * lanes, count) + x : x, count);
        }
      }
      for (int v = 0; v < vectors; v++) store_n(xt + (t * layout.height + h) * channels + v * lanes, row[v], count);
    }
}

}  // namespace

void triplane_expand_forward(const TensorView& planes, const TensorView& weight, const TensorView& bias,
                             const TensorView& out, const Layout& layout, int threads) {
  const int64_t channels = weight.size[1], depth = weight.size[2], padding = padded(channels);
  const Buffer turned(3 * depth * padding * 4), biases(3 * padding * 4);
  const Buffer projected(layout.tokens() * padding * 4), values(threads * tokens_at_once * depth * 4);
  transpose_weight(weight, padding, turned.floats());
  for (int64_t p = 0; p < 3; p++)
    for (int64_t c = 0; c < padding; c++)
      biases.floats()[p * padding + c] =
          c < channels ? bias.as<float>()[p * bias.stride[0] + c * bias.stride[1]] : 0;
  PVDM_WITH_TYPE(planes.dtype, T, for (int64_t b = 0; b < planes.size[0]; b++) {
    project(planes.as<T>() + b * planes.stride[0], planes.stride[1], turned.floats(), biases.floats(), depth, padding,
            layout, threads, values.floats(), projected.floats());
    broadcast_sum(projected.floats(), channels, padding, layout, threads, out.as<T>() + b * out.stride[0]);
  })
}

// A thread owns slices of channels. So each sum has one owner and a fixed order, for any number of threads.
void triplane_expand_sums(const TensorView& grad, const TensorView& sums, const Layout& layout, int threads) {
  constexpr int wide = 4;
  const int64_t batch = grad.size[0], channels = grad.size[2];
  const int64_t slice = batch * (channels / (wide * lanes)) >= threads ? wide * lanes : lanes;
  const int64_t slices = (channels + slice - 1) / slice, units = batch * slices;
  PVDM_WITH_TYPE(grad.dtype, T, parallel_for(threads_for(threads, units), units, [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / slices, first = unit % slices * slice;
      const int64_t last = first + slice < channels ? first + slice : channels;
      const T* from = grad.as<T>() + b * grad.stride[0];
      float* to = sums.as<float>() + b * sums.stride[0];
      if (last - first == wide * lanes) {
        sum_slice<T, wide>(from + first, grad.stride[1], to + first, channels, layout, lanes);
        continue;
      }
      for (int64_t c = first; c < last; c += lanes)
        sum_slice<T, 1>(from + c, grad.stride[1], to + c, channels, layout, count_at(c, channels));
    }
  }))
}

}  // namespace pvdm::PVDM_ISA
