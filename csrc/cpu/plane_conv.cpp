// plane_conv: unfolds the tokens for the 3 x 3 convolution, and folds gradients back. The products are the vendor's
// GEMM.
//
// The unfolded row of a token is (channel, tap) with taps fastest, like the weight (C', C, 3, 3). So the weight in
// memory already is the matrix (C', 9 C) of all three products, and its gradient needs no rearranging. Tap-major rows
// would be plain copies, but the weight would need a transpose at every optimizer step: 38 MB for 1024 channels, which
// takes as long as the product for 32 tokens. The transpose in registers here costs about as much as a copy.
#include "kernels.h"
#include "runtime/parallel.h"
#include "vec.h"

#if defined(__clang__)
#define PVDM_PICK(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PVDM_PICK(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

namespace pvdm::PVDM_ISA {
namespace {

constexpr int taps = 9;
constexpr int64_t slice = 16;  // channels: a cache line of floats, so that no two threads write the same line

typedef uint64_t Two __attribute__((vector_size(16)));
typedef uint32_t Four __attribute__((vector_size(16)));
typedef uint16_t Eight __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

PVDM_INLINE Eight low(Eight a, Eight b) { return PVDM_PICK(Eight, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
PVDM_INLINE Eight high(Eight a, Eight b) { return PVDM_PICK(Eight, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
PVDM_INLINE Four low(Four a, Four b) { return PVDM_PICK(Four, a, b, 0, 4, 1, 5); }
PVDM_INLINE Four high(Four a, Four b) { return PVDM_PICK(Four, a, b, 2, 6, 3, 7); }
PVDM_INLINE Two low(Two a, Two b) { return PVDM_PICK(Two, a, b, 0, 2); }
PVDM_INLINE Two high(Two a, Two b) { return PVDM_PICK(Two, a, b, 1, 3); }

// Transposes four vectors.
PVDM_INLINE void transpose(Four* v) {
  const Four a = low(v[0], v[1]), b = low(v[2], v[3]), c = high(v[0], v[1]), d = high(v[2], v[3]);
  v[0] = bit_cast<Four>(low(bit_cast<Two>(a), bit_cast<Two>(b)));
  v[1] = bit_cast<Four>(high(bit_cast<Two>(a), bit_cast<Two>(b)));
  v[2] = bit_cast<Four>(low(bit_cast<Two>(c), bit_cast<Two>(d)));
  v[3] = bit_cast<Four>(high(bit_cast<Two>(c), bit_cast<Two>(d)));
}
// Transposes eight vectors.
PVDM_INLINE void transpose(Eight* v) {
  Four lower[4], upper[4];  // pairs of rows: columns 0-3, columns 4-7
  for (int i = 0; i < 4; i++) {
    lower[i] = bit_cast<Four>(low(v[2 * i], v[2 * i + 1]));
    upper[i] = bit_cast<Four>(high(v[2 * i], v[2 * i + 1]));
  }
  transpose(lower);
  transpose(upper);
  for (int i = 0; i < 4; i++) v[i] = bit_cast<Eight>(lower[i]), v[4 + i] = bit_cast<Eight>(upper[i]);
}

// The vector that moves a storage type.
template <class E>
struct Block;
template <>
struct Block<uint32_t> {
  using Vector = Four;
  static constexpr int channels = 4;
  // Columns 0-7 of `channels` rows <-> rows 0-7 of `channels` columns.
  static inline __attribute__((always_inline)) void turn(Vector* v) {
    transpose(v);
    transpose(v + 4);
  }
};
template <>
struct Block<uint16_t> {
  using Vector = Eight;
  static constexpr int channels = 8;
  static inline __attribute__((always_inline)) void turn(Vector* v) { transpose(v); }
};

// One row of the unfolded matrix: out[c][k] = from[k][c].
template <class E>
void unfold_token(const E* const* from, int64_t channels, E* out) {
  using B = Block<E>;
  int64_t c = 0;
  for (; c + B::channels <= channels; c += B::channels) {
    typename B::Vector v[8];
    for (int k = 0; k < 8; k++) v[k] = fetch<typename B::Vector>(from[k] + c);
    B::turn(v);
    E* to = out + c * taps;
    for (int i = 0; i < B::channels; i++, to += taps) {
      // 32-bit types have four channels: v[i] holds taps 0-3, v[4 + i] taps 4-7. 16-bit types have eight: v[i] holds
      // taps 0-7.
      memcpy(to, &v[i], sizeof v[i]);
      if (B::channels == 4) memcpy(to + 4, &v[(4 + i) % 8], sizeof v[i]);
      to[8] = from[8][c + i];
    }
  }
  for (; c < channels; c++)
    for (int k = 0; k < taps; k++) out[c * taps + k] = from[k][c];
}

PVDM_INLINE void add(float* to, Four bits) {
  const Floats sum = fetch<Floats>(to) + bit_cast<Floats>(bits);
  memcpy(to, &sum, sizeof sum);
}
PVDM_INLINE void add(float* to, Eight bits) {  // a bfloat16 is the upper half of a float
  add(to, bit_cast<Four>(low(Eight{}, bits)));
  add(to + 4, bit_cast<Four>(high(Eight{}, bits)));
}
PVDM_INLINE float value(uint32_t bits) { return bit_cast<float>(bits); }
PVDM_INLINE float value(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// The transpose: to[k][c] += in[c][k] for the channels from first to last.
template <class E>
void fold_token(const E* in, float* const* to, int64_t first, int64_t last) {
  using B = Block<E>;
  int64_t c = first;
  for (; c + B::channels <= last; c += B::channels) {
    typename B::Vector v[8];
    const E* from = in + c * taps;
    for (int i = 0; i < B::channels; i++, from += taps) {
      v[i] = fetch<typename B::Vector>(from);
      if (B::channels == 4) v[(4 + i) % 8] = fetch<typename B::Vector>(from + 4);
      to[8][c + i] += value(from[8]);
    }
    B::turn(v);
    for (int k = 0; k < 8; k++) add(to[k] + c, v[k]);
  }
  for (; c < last; c++)
    for (int k = 0; k < taps; k++) to[k][c] += value(in[c * taps + k]);
}

// For each tap, the packed token that it reads around row `row` of (B N), or -1 outside the token's plane.
void neighbours(const Planes& planes, int64_t tokens, int64_t row, int64_t* found) {
  int64_t plane = 0, place = row % tokens, first = row - place;
  for (; place >= planes.tokens(plane); plane++) place -= planes.tokens(plane), first += planes.tokens(plane);
  const int64_t rows = planes.rows(plane), columns = planes.columns(plane), i = place / columns, j = place % columns;
  for (int k = 0; k < taps; k++) {
    const int64_t y = i + k / 3 - 1, x = j + k % 3 - 1;
    found[k] = y >= 0 && y < rows && x >= 0 && x < columns ? first + y * columns + x : -1;
  }
}

template <class E>
void unfold(const TensorView& x, const TensorView& out, const Planes& planes, int64_t first, int threads) {
  const int64_t tokens = x.size[1], channels = x.size[2];
  const Buffer zeros(channels * 4);
  memset(zeros.floats(), 0, channels * 4);
  const auto* zero = reinterpret_cast<const E*>(zeros.floats());
  parallel_for(threads_for(threads, out.size[0]), out.size[0], [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; row++) {
      int64_t around[taps];
      const E* from[taps];
      neighbours(planes, tokens, first + row, around);
      for (int k = 0; k < taps; k++)
        from[k] = around[k] < 0 ? zero : x.as<E>() + around[k] / tokens * x.stride[0] + around[k] % tokens * x.stride[1];
      unfold_token(from, channels, out.as<E>() + row * channels * taps);
    }
  });
}

// A thread owns slices of channels. So each sum has one owner and a fixed order, for any number of threads.
template <class E>
void fold(const TensorView& unfolded, const TensorView& dx, const Planes& planes, int64_t first, int threads) {
  const int64_t tokens = dx.size[1], channels = dx.size[2], slices = (channels + slice - 1) / slice;
  threads = threads_for(threads, slices);
  const Buffer sinks(threads * slices * slice * 4);  // takes what falls outside a plane
  memset(sinks.floats(), 0, threads * slices * slice * 4);
  parallel_for(threads, slices, [&](int64_t begin, int64_t end, int thread) {
    const int64_t last = end * slice < channels ? end * slice : channels;
    for (int64_t row = 0; row < unfolded.size[0]; row++) {
      int64_t around[taps];
      float* to[taps];
      neighbours(planes, tokens, first + row, around);
      for (int k = 0; k < taps; k++)
        to[k] = around[k] < 0 ? sinks.floats() + thread * slices * slice : dx.as<float>() + around[k] * channels;
      fold_token(unfolded.as<E>() + row * unfolded.stride[0], to, begin * slice, last);
    }
  });
}

}  // namespace

void plane_conv_unfold(const TensorView& x, const TensorView& out, const Planes& planes, int64_t first, int threads) {
  if (x.dtype == Dtype::f32)
    unfold<uint32_t>(x, out, planes, first, threads);
  else
    unfold<uint16_t>(x, out, planes, first, threads);
}

void plane_conv_fold(const TensorView& unfolded, const TensorView& dx, const Planes& planes, int64_t first,
                     int threads) {
  if (unfolded.dtype == Dtype::f32)
    fold<uint32_t>(unfolded, dx, planes, first, threads);
  else
    fold<uint16_t>(unfolded, dx, planes, first, threads);
}

}  // namespace pvdm::PVDM_ISA
