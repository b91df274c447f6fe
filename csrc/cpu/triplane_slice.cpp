// triplane_slice: sequences along one axis of a lattice, with a token appended and positions added. Backward reads the
// gradient once. Formula: pvdm_fast/backends/reference/triplane_slice.py.
#include "kernels.h"
#include "runtime/parallel.h"
#include "sequences.h"

namespace pvdm::PVDM_ISA {
namespace {

// sequences summed in float, then added in double; so results don't depend on the thread count
constexpr int64_t chunk_sequences = 64;

// ahead: the row to prefetch. Rows are too far apart for the CPU's own prefetching.
template <class T>
void add_row(const T* x, const T* ahead, const float* positions, T* out, int64_t channels) {
  for_registers(channels, [&](int64_t c, int count) PVDM_BODY {
    __builtin_prefetch(ahead + c);
    store_n(out + c, load_n(x + c, count) + load(positions + c), count);
  });
}

// Adds a row of the gradient to the sum of its position, and copies it to dx if `copied` (the token's row has no place
// there).
template <class T, bool copied>
void take_row(const T* grad, T* dx, const T* ahead, float* sum, int64_t channels) {
  for_registers(channels, [&](int64_t c, int count) PVDM_BODY {
    if (copied) __builtin_prefetch(ahead + c, 1);
    const Vec g = load_n(grad + c, count);
    if (copied) store_n(dx + c, g, count);
    store(sum + c, load(sum + c) + g);
  });
}

}  // namespace

void triplane_slice_forward(const TensorView& x, const TensorView& token, const TensorView& positions,
                            const TensorView& out, const Layout& layout, int plane, int threads) {
  const Sequences sequences{layout, plane};
  const int64_t channels = x.size[2], padding = padded(channels), length = sequences.length(), step = sequences.step();
  const int64_t sites = sequences.sites(), units = x.size[0] * sites;
  const Buffer rows((length + 1) * padding * 4);  // positions, with the token added to the last
  for (int64_t l = 0; l <= length; l++)
    for (int64_t c = 0; c < padding; c++)
      rows.floats()[l * padding + c] = c >= channels ? 0
                                                     : positions.as<float>()[l * positions.stride[0] + c] +
                                                           (l == length ? token.as<float>()[c] : 0);
  PVDM_WITH_TYPE(x.dtype, T, parallel_for(threads_for(threads, units), units, [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; unit++) {
      const T* from = x.as<T>() + unit / sites * x.stride[0] + sequences.start(unit % sites) * x.stride[1];
      T* to = out.as<T>() + unit * (length + 1) * channels;
      const int64_t stride = step * x.stride[1];
      for (int64_t l = 0; l < length; l++)
        add_row(from + l * stride, from + (l + 1 < length ? l + 1 : l) * stride, rows.floats() + l * padding,
                to + l * channels, channels);
      for_registers(channels, [&](int64_t c, int count) PVDM_BODY {
        store_n(to + length * channels + c, load(rows.floats() + length * padding + c), count);
      });
    }
  }))
}

void triplane_slice_backward(const TensorView& grad, const TensorView& dx, const TensorView& dpositions,
                             const Layout& layout, int plane, int threads) {
  const Sequences sequences{layout, plane};
  const int64_t channels = dx.size[2], padding = padded(channels), length = sequences.length(), step = sequences.step();
  const int64_t sites = sequences.sites(), units = dx.size[0] * sites;
  const int64_t chunks = (units + chunk_sequences - 1) / chunk_sequences, size = (length + 1) * padding;
  const Buffer parts(chunks * size * 4);
  PVDM_WITH_TYPE(grad.dtype, T, parallel_for(threads_for(threads, chunks), chunks, [&](int64_t begin, int64_t end, int) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* sums = parts.floats() + chunk * size;
      memset(sums, 0, size * 4);
      const int64_t last = (chunk + 1) * chunk_sequences < units ? (chunk + 1) * chunk_sequences : units;
      for (int64_t unit = chunk * chunk_sequences; unit < last; unit++) {
        const T* from = grad.as<T>() + unit / sites * grad.stride[0] + unit % sites * grad.stride[1];
        T* to = dx.as<T>() + (unit / sites * dx.size[1] + sequences.start(unit % sites)) * channels;
        for (int64_t l = 0; l < length; l++)
          take_row<T, true>(from + l * grad.stride[2], to + l * step * channels,
                            to + (l + 1 < length ? l + 1 : l) * step * channels, sums + l * padding, channels);
        take_row<T, false>(from + length * grad.stride[2], to, to, sums + length * padding, channels);
      }
    }
  }))
  parallel_for(threads_for(threads, length + 1), length + 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t l = begin; l < end; l++)
      for (int64_t c = 0; c < channels; c++) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) sum += parts.floats()[chunk * size + l * padding + c];
        dpositions.as<float>()[l * channels + c] = static_cast<float>(sum);
      }
  });
}

}  // namespace pvdm::PVDM_ISA
