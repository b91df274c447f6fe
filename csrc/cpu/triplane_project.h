// What both directions of triplane_project share: the packed weights, and a tile of sequences on its way through the layers.
//
// A tile is some whole sequences, with all that a layer makes of them in a thread's work-space. Its products are summed
// with weights that are packed once a call; norms and attention are the kernels of those operations, run on the tile.
#pragma once
#include "attention.h"
#include "normal.h"
#include "project_product.h"
#include "sequences.h"

namespace pvdm::PVDM_ISA {
namespace {

struct Sizes {
  int64_t channels, inner, hidden, latent, depth, heads, length;  // length: elements of a sequence, the token included
  Sizes(const ProjectTensors& p, int64_t number_of_heads)
      : channels(p.token.size[0]), inner(p.out_weight.size[2]), hidden(p.up_weight.size[1]),
        latent(p.latent_weight.size[0]), depth(p.up_weight.size[0]), heads(number_of_heads),
        length(p.positions.size[0]) {}
};

// A weight (outputs x inputs) as right operands: `across` for its product, `along` for the gradient of its input.
struct Matrix {
  int64_t outputs, inputs;
  float *across, *along;
};

// A layer's matrices. Queries, keys and values are one product, but in the last layer, where only element 0 has a query.
struct Layer {
  Matrix qkv, query, kv, out, up, down;
};

template <class Op>
class Weights {
 public:
  Weights(const ProjectTensors& p, const Sizes& s, bool gradients, int threads)
      : s_(s), gradients_(gradients), memory_((size(s.latent, s.channels) + s.depth * layer_size()) * 4) {
    pack(p.latent_weight, 0, latent());
    parallel_for(threads_for(threads, s.depth), s.depth, [&](int64_t begin, int64_t end, int) {
      for (int64_t l = begin; l < end; l++) {
        const Layer to = layer(l);
        const int64_t c = s_.channels, rows = 3 * s_.inner * l;
        if (last(l)) {
          pack(p.qkv_weight, rows, to.query);
          pack(p.qkv_weight, rows + s_.inner, to.kv);
        } else {
          pack(p.qkv_weight, rows, to.qkv);
        }
        pack(p.out_weight, l * c, to.out);
        pack(p.up_weight, l * s_.hidden, to.up);
        pack(p.down_weight, l * c, to.down);
      }
    });
  }
  Matrix latent() const {
    float* next = memory_.floats();
    return take(s_.latent, s_.channels, &next);
  }
  Layer layer(int64_t l) const {
    float* next = memory_.floats() + size(s_.latent, s_.channels) + l * layer_size();
    Layer to{};
    if (last(l)) {
      to.query = take(s_.inner, s_.channels, &next);
      to.kv = take(2 * s_.inner, s_.channels, &next);
    } else {
      to.qkv = take(3 * s_.inner, s_.channels, &next);
    }
    to.out = take(s_.channels, s_.inner, &next);
    to.up = take(s_.hidden, s_.channels, &next);
    to.down = take(s_.channels, s_.hidden, &next);
    return to;
  }
  bool last(int64_t l) const { return l == s_.depth - 1; }

 private:
  int64_t size(int64_t outputs, int64_t inputs) const {
    return operand_size<Op>(inputs, outputs) + (gradients_ ? operand_size<Op>(outputs, inputs) : 0);
  }
  int64_t layer_size() const {  // in two products: paddings make it no smaller
    const int64_t c = s_.channels;
    return size(s_.inner, c) + size(2 * s_.inner, c) + size(c, s_.inner) + size(s_.hidden, c) + size(c, s_.hidden);
  }
  Matrix take(int64_t outputs, int64_t inputs, float** next) const {
    Matrix m{outputs, inputs, *next, *next + operand_size<Op>(inputs, outputs)};
    *next += size(outputs, inputs);
    return m;
  }
  void pack(const TensorView& from, int64_t row, const Matrix& to) const {
    PVDM_WITH_TYPE(from.dtype, T, {
      const Tokens<const T> rows{from.as<T>() + row * to.inputs, to.inputs};
      pack_across<Op>(rows, to.outputs, to.inputs, to.across);
      if (gradients_) pack_along<Op>(rows, to.inputs, to.outputs, to.along);
    })
  }

  Sizes s_;
  bool gradients_;
  Buffer memory_;
};

// Views of float memory for the kernels that run on a tile.
PVDM_INLINE TensorView vector_view(const float* data, int64_t size) {
  TensorView t;
  t.data = const_cast<float*>(data), t.dims = 1, t.size[0] = size, t.stride[0] = 1;
  return t;
}
PVDM_INLINE TensorView rows_view(const float* data, int64_t rows, int64_t columns, int64_t stride) {
  TensorView t = vector_view(data, rows);
  t.dims = 2, t.stride[0] = stride, t.size[1] = columns, t.stride[1] = 1;
  return t;
}
// (1, sequences, elements, [parts,] heads, inner / heads), parts 0: without that axis.
PVDM_INLINE TensorView heads_view(const Rows& rows, int64_t sequences, int64_t elements, int parts, const Sizes& s) {
  TensorView t;
  t.data = rows.data, t.dims = parts ? 6 : 5;
  const int64_t size[] = {1, sequences, elements}, stride[] = {0, elements * rows.stride, rows.stride};
  for (int i = 0; i < 3; i++) t.size[i] = size[i], t.stride[i] = stride[i];
  if (parts) t.size[3] = parts, t.stride[3] = s.inner;
  const int head = t.dims - 2;
  t.size[head] = s.heads, t.stride[head] = s.inner / s.heads;
  t.size[head + 1] = s.inner / s.heads, t.stride[head + 1] = 1;
  return t;
}

// `normal` for an Op of attention_product.h: within 3e-4 of the smaller tail where what is made of it is rounded to bf16.
template <class Op>
PVDM_INLINE Normal normal_for(Vec g) {
#if defined(PVDM_ISA_AVX512BF16)
  if constexpr (Op::step == 2) {
    const Vec a = bit_cast<Vec>(bit_cast<Words>(g) & 0x7fffffffu), e = exp2<Op>(a * a * (-0.5f * log2_e));
    const Vec t = bit_cast<Vec>(_mm512_rcp14_ps(bit_cast<__m512>(1.0f + 0.45f * a)));
    Vec p = splat(-0.11781817f);
    p = p * t + 0.31166821f;
    p = p * t + 0.116895705f;
    p = p * t + 0.18997165f;
    p = p * t - 0.00063603639f;
    const Vec tail = p * e;
    return {g < 0.0f ? tail : 1.0f - tail, e * 0.3989422804f};
  }
#endif
  return normal(g);
}

PVDM_INLINE void add_bias(const Rows& rows, int64_t count, const float* bias, int64_t width) {
  for (int64_t r = 0; r < count; r++)
    for_registers(width, [&](int64_t c, int n) PVDM_BODY {
      store_n(rows.at(r) + c, load_n(rows.at(r) + c, n) + load_n(bias + c, n), n);
    });
}

// What a layer makes of a tile, for the backward pass: residual sums in front of both norms and their statistics, queries,
// keys and values, what was attended to, and the hidden layer in front of its GELU. Of the last layer, from the attention
// on, one row a sequence.
struct Kept {
  Rows total1, qkv, query, attended, total2, hidden;
  float *mean1, *rstd1, *mean2, *rstd2, *lse;
  Kept() = default;
  Kept(Arena& arena, const Sizes& s, int64_t rows, int64_t sequences) {
    const int64_t all = padded(rows);
    const auto take = [&](int64_t count, int64_t stride) { return Rows{arena.floats(count * stride), stride}; };
    total1 = take(all, s.channels), total2 = take(all, s.channels);
    qkv = take(all, padded(3 * s.inner));
    query = take(padded(sequences), padded(s.inner));
    attended = take(all, padded(s.inner));
    hidden = take(all, padded(s.hidden));
    for (float** part : {&mean1, &rstd1, &mean2, &rstd2}) *part = arena.floats(rows);
    lse = arena.floats(rows * s.heads);
  }
};

// A tile, and a thread's buffers for it.
template <class Op>
struct Tile {
  const ProjectTensors& p;
  const Sizes& s;
  const Weights<Op>& weights;
  const ProjectOptions& o;
  Rows normed, branch, wide;  // dense; of channels; of the hidden layer
  float* left;                // a packed operand

  Tile(Arena& arena, const ProjectTensors& parameters, const Sizes& sizes, const Weights<Op>& packed,
       const ProjectOptions& options, int64_t rows)
      : p(parameters), s(sizes), weights(packed), o(options) {
    const int64_t all = padded(rows), most = widest();
    normed = {arena.floats(all * s.channels), s.channels};
    branch = {arena.floats(all * padded(s.channels)), padded(s.channels)};
    const int64_t rest = padded(s.hidden > s.latent ? s.hidden : s.latent);  // the latents lie here too
    wide = {arena.floats(all * rest), padded(s.hidden)};
    const int64_t across = operand_size<Op>(most, rows), along = operand_size<Op>(rows, most);
    left = arena.floats(across > along ? across : along);
  }
  int64_t widest() const {
    int64_t most = s.channels;
    for (int64_t width : {3 * s.inner, s.hidden, s.latent}) most = width > most ? width : most;
    return most;
  }
  const float* of_layer(const TensorView& parameter, int64_t l) const {
    return parameter.as<float>() + l * parameter.stride[0];
  }
  AttentionOptions attention(const int64_t* offsets) const {
    return {offsets, 1, 1.0 / __builtin_sqrt(static_cast<double>(s.inner / s.heads)), 1};
  }

  void multiply_rows(const Tokens<const float>& rows, int64_t count, const Matrix& by, const Rows& to) const {
    pack_panels<Op>(rows, count, by.inputs, Rotation{}, left);
    product<Op>(count, left, by.inputs, by.across, by.outputs, to);
  }

  // total = residual + x, where there is a residual; its norm goes to `normed`.
  void norm(int64_t rows, const Rows& x, const Rows* residual, const TensorView& weight, const TensorView& bias, int64_t l,
            const Rows& total, float* mean, float* rstd) const {
    const int64_t c = s.channels;
    AddLayerNorm t{};
    t.x = rows_view(x.data, rows, c, x.stride);
    if (residual) {
      t.residual = rows_view(residual->data, rows, c, residual->stride);
      t.total = rows_view(total.data, rows, c, c);
    }
    t.weight = vector_view(of_layer(weight, l), c), t.bias = vector_view(of_layer(bias, l), c);
    t.normed = rows_view(normed.data, rows, c, c);
    t.mean = vector_view(mean, rows), t.rstd = vector_view(rstd, rows);
    add_layer_norm_forward(t, static_cast<float>(o.eps), 1);
  }

  // Layer l: from k.total1, or total2 of the layer before and its `branch`, to k.total2 and `branch`, which is to be added.
  void layer(int64_t l, const Kept& k, const Kept* before, int64_t sequences) const {
    const Layer w = weights.layer(l);
    const int64_t c = s.channels, rows = sequences * s.length, offsets[] = {0, s.length};
    const bool last = weights.last(l);
    if (before)
      norm(rows, branch, &before->total2, p.norm1_weight, p.norm1_bias, l, k.total1, k.mean1, k.rstd1);
    else
      norm(rows, k.total1, nullptr, p.norm1_weight, p.norm1_bias, l, k.total1, k.mean1, k.rstd1);
    const TensorView none{}, lse = lse_view(k, sequences, last ? 1 : s.length);
    if (last) {
      multiply_rows({normed.data, s.length * c}, sequences, w.query, k.query);
      multiply_rows(normed.tokens(), rows, w.kv, k.qkv);
      attention_forward(heads_view(k.qkv, sequences, s.length, 2, s), heads_view(k.query, sequences, 1, 0, s), none, none,
                        heads_view(k.attended, sequences, 1, 0, s), lse, attention(offsets));
    } else {
      multiply_rows(normed.tokens(), rows, w.qkv, k.qkv);
      attention_forward(heads_view(k.qkv, sequences, s.length, 3, s), none, none, none,
                        heads_view(k.attended, sequences, s.length, 0, s), lse, attention(offsets));
    }
    const int64_t count = last ? sequences : rows;
    const Rows stream{k.total1.data, last ? s.length * c : c};  // of element 0, or of all
    multiply_rows(k.attended.tokens(), count, w.out, branch);
    add_bias(branch, count, of_layer(p.out_bias, l), c);
    norm(count, branch, &stream, p.norm2_weight, p.norm2_bias, l, k.total2, k.mean2, k.rstd2);
    multiply_rows(normed.tokens(), count, w.up, k.hidden);
    activate(k.hidden, count, of_layer(p.up_bias, l));
    multiply_rows(wide.tokens(), count, w.down, branch);
    add_bias(branch, count, of_layer(p.down_bias, l), c);
  }
  TensorView lse_view(const Kept& k, int64_t sequences, int64_t queries) const {
    TensorView t;
    t.data = k.lse, t.dims = 4;
    const int64_t size[] = {1, sequences, s.heads, queries};
    for (int i = 0; i < 4; i++) t.size[i] = size[i];
    t.stride[1] = s.heads * queries, t.stride[2] = queries, t.stride[3] = 1;
    return t;
  }
  // Adds the bias to the hidden layer; its GELU goes to `wide`.
  void activate(const Rows& hidden, int64_t count, const float* bias) const {
    for (int64_t r = 0; r < count; r++)
      for_registers(s.hidden, [&](int64_t c, int n) PVDM_BODY {
        const Vec h = load_n(hidden.at(r) + c, n) + load_n(bias + c, n);
        store_n(hidden.at(r) + c, h, n);
        store_n(wide.at(r) + c, h * normal_for<Op>(h).cdf, n);
      });
  }

  // The sequences `first` ... of the lattice, token and positions added, into `to`.
  void gather(const TensorView& x, int64_t first, int64_t sequences, const Rows& to) const {
    PVDM_WITH_TYPE(x.dtype, T, {
      const Sequences at{o.layout, o.plane};
      for (int64_t q = 0; q < sequences; q++) {
        const int64_t unit = first + q, sites = at.sites();
        const T* from = x.as<T>() + unit / sites * x.stride[0] + at.start(unit % sites) * x.stride[1];
        for (int64_t i = 0; i < s.length; i++) {
          const float* positions = p.positions.as<float>() + i * s.channels;
          float* row = to.at(q * s.length + i);
          for_registers(s.channels, [&](int64_t c, int n) PVDM_BODY {
            const Vec value = i < s.length - 1 ? load_n(from + i * at.step() * x.stride[1] + c, n)
                                               : load_n(p.token.as<float>() + c, n);
            store_n(row + c, value + load_n(positions + c, n), n);
          });
        }
      }
    })
  }

  // Element 0 of the last layer's result, into `normed`, and tanh of its product with the latents' weight.
  void finish(const Kept& k, int64_t sequences, float* out) const {
    for (int64_t r = 0; r < sequences; r++)
      for_registers(s.channels, [&](int64_t c, int n) PVDM_BODY {
        store_n(normed.at(r) + c, load_n(k.total2.at(r) + c, n) + load_n(branch.at(r) + c, n), n);
      });
    const Matrix w = weights.latent();
    const Rows latents{wide.data, padded(s.latent)};
    multiply_rows(normed.tokens(), sequences, w, latents);
    for (int64_t r = 0; r < sequences; r++)
      for (int64_t c = 0; c < s.latent; c++)
        out[r * s.latent + c] = __builtin_tanhf(latents.at(r)[c] + p.latent_bias.as<float>()[c]);
  }
};

// How many sequences a tile has: whole panels of rows as far as that goes, none so large that a thread has nothing to do.
PVDM_INLINE int64_t sequences_of_tile(int64_t rows, int64_t length, int64_t units, int threads) {
  int64_t sequences = rows / length;
  const int64_t share = (units + threads - 1) / threads;
  if (sequences > share) sequences = share;
  return sequences > 1 ? sequences : 1;
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
