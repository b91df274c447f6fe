// triplane_project, backward: a tile goes through all layers again, what they make of it is kept for that tile only, and
// the gradient goes back through it. Formula: pvdm_fast/backends/reference/triplane_project.py.
//
// Gradients of parameters are sums over the tiles of a thread, in their order; the threads' sums are added in theirs.
#include "triplane_project.h"

namespace pvdm::PVDM_ISA {
namespace {

template <class Op>
constexpr int64_t tile_size = Op::step == 2 ? 384 : 128;  // rows

// Sums of a thread for one layer: matrices with padded rows and columns.
struct LayerSums {
  Rows qkv, query, kv, out, up, down;
  float *norm1_weight, *norm1_bias, *out_bias, *norm2_weight, *norm2_bias, *up_bias, *down_bias;
  LayerSums(Arena& arena, const Sizes& s, bool last) {
    const auto take = [&](int64_t outputs, int64_t inputs) {
      return Rows{arena.floats(padded(outputs) * padded(inputs)), padded(inputs)};
    };
    const Rows none{nullptr, 0};
    qkv = last ? none : take(3 * s.inner, s.channels);
    query = last ? take(s.inner, s.channels) : none;
    kv = last ? take(2 * s.inner, s.channels) : none;
    out = take(s.channels, s.inner), up = take(s.hidden, s.channels), down = take(s.channels, s.hidden);
    for (float** part : {&norm1_weight, &norm1_bias, &out_bias, &norm2_weight, &norm2_bias, &down_bias})
      *part = arena.floats(padded(s.channels));
    up_bias = arena.floats(padded(s.hidden));
  }
};

// And for what isn't a layer's.
struct Sums {
  Rows positions, latent;
  float* latent_bias;
  Sums(Arena& arena, const Sizes& s) {
    positions = {arena.floats(s.length * padded(s.channels)), padded(s.channels)};
    latent = {arena.floats(padded(s.latent) * padded(s.channels)), padded(s.channels)};
    latent_bias = arena.floats(padded(s.latent));
  }
};

// A tile's gradients: of the stream, of a norm's result, of the hidden layer, of queries, keys and values.
template <class Op>
struct Backward {
  const Tile<Op>& tile;
  const Sizes& s;
  Rows grad, grad_total, dnormed, dattended, dqkv, dquery;
  float *right, *dweight, *dbias;

  Backward(Arena& arena, const Tile<Op>& t, int64_t rows, int64_t sequences) : tile(t), s(t.s) {
    const int64_t all = padded(rows), channels = padded(s.channels);
    const auto take = [&](int64_t count, int64_t stride) { return Rows{arena.floats(count * stride), stride}; };
    grad = take(all, s.channels), grad_total = take(all, s.channels), dnormed = take(all, channels);
    dattended = take(all, padded(s.inner)), dqkv = take(all, padded(3 * s.inner));
    dquery = take(padded(sequences), padded(s.inner));
    right = arena.floats(operand_size<Op>(rows, tile.widest()));
    dweight = arena.floats(channels), dbias = arena.floats(channels);
  }

  // sum (outputs x inputs) += grad' x, both of `count` rows.
  void add_product(const Rows& d, int64_t outputs, const Tokens<const float>& x, int64_t inputs, int64_t count,
                   const Rows& sum) const {
    pack_left_across<Op>(d.tokens(), outputs, count, tile.left);
    pack_along<Op>(x, inputs, count, right);
    product<Op>(outputs, tile.left, count, right, inputs, sum, true);
  }
  // to = d w, the gradient of a product's input.
  void through(const Rows& d, int64_t count, const Matrix& w, const Rows& to) const {
    pack_panels<Op>(d.tokens(), count, w.outputs, Rotation{}, tile.left);
    product<Op>(count, tile.left, w.outputs, w.along, w.inputs, to);
  }
  static void add_columns(const Rows& d, int64_t count, int64_t width, float* sum) {
    for_registers(width, [&](int64_t c, int n) PVDM_BODY {
      Vec total = {};
      for (int64_t r = 0; r < count; r++) total += load_n(d.at(r) + c, n);
      store(sum + c, load(sum + c) + total);
    });
  }
  // The norm's result again, into tile.normed.
  void normalize(const Rows& total, const float* mean, const float* rstd, int64_t count, const float* weight,
                 const float* bias) const {
    for (int64_t r = 0; r < count; r++)
      for_registers(s.channels, [&](int64_t c, int n) PVDM_BODY {
        const Vec value = (load_n(total.at(r) + c, n) - mean[r]) * rstd[r];
        store_n(tile.normed.at(r) + c, value * load_n(weight + c, n) + load_n(bias + c, n), n);
      });
  }
  // Through a norm: to = extra + the gradient of its input from `dnormed`.
  void through_norm(const Rows& total, const float* mean, const float* rstd, int64_t count, const float* weight,
                    const Rows& extra, const Rows& to, float* weight_sum, float* bias_sum) const {
    const int64_t c = s.channels;
    AddLayerNormGradients t{};
    t.grad = rows_view(dnormed.data, count, c, dnormed.stride), t.extra = rows_view(extra.data, count, c, c);
    t.total = rows_view(total.data, count, c, c), t.weight = vector_view(weight, c);
    t.mean = vector_view(mean, count), t.rstd = vector_view(rstd, count), t.dx = rows_view(to.data, count, c, c);
    t.dweight = vector_view(dweight, c), t.dbias = vector_view(dbias, c);
    add_layer_norm_backward(t, 1);
    for (int64_t i = 0; i < c; i++) weight_sum[i] += dweight[i], bias_sum[i] += dbias[i];
  }

  // Back through layer l: `grad`, of its result, becomes that of its input. `grad` is one row a sequence in the last layer.
  void layer(int64_t l, const Kept& k, int64_t sequences, const LayerSums& sums) const {
    const Layer w = tile.weights.layer(l);
    const ProjectTensors& p = tile.p;
    const bool last = tile.weights.last(l);
    const int64_t count = last ? sequences : sequences * s.length;
    feed_forward(l, k, count, w, sums);
    add_columns(grad_total, count, s.channels, sums.out_bias);
    add_product(grad_total, s.channels, k.attended.tokens(), s.inner, count, sums.out);
    through(grad_total, count, w.out, dattended);
    normalize(k.total1, k.mean1, k.rstd1, sequences * s.length, tile.of_layer(p.norm1_weight, l),
              tile.of_layer(p.norm1_bias, l));
    if (last)
      attention_of_first(k, sequences, w, sums);
    else
      attention(k, sequences, w, sums);
    through_norm(k.total1, k.mean1, k.rstd1, sequences * s.length, tile.of_layer(p.norm1_weight, l), grad_total, grad,
                 sums.norm1_weight, sums.norm1_bias);
  }
  // grad -> grad_total, the gradient of the residual sum in front of the second norm.
  void feed_forward(int64_t l, const Kept& k, int64_t count, const Layer& w, const LayerSums& sums) const {
    const ProjectTensors& p = tile.p;
    const Rows dhidden = tile.wide;
    add_columns(grad, count, s.channels, sums.down_bias);
    for (int64_t r = 0; r < count; r++)  // GELU again, and its slope in the hidden layer's place
      for_registers(s.hidden, [&](int64_t c, int n) PVDM_BODY {
        const Vec h = load_n(k.hidden.at(r) + c, n);
        const Normal at = normal_for<Op>(h);
        store_n(tile.wide.at(r) + c, h * at.cdf, n);
        store_n(k.hidden.at(r) + c, at.cdf + h * at.density, n);
      });
    add_product(grad, s.channels, tile.wide.tokens(), s.hidden, count, sums.down);
    through(grad, count, w.down, dhidden);
    for (int64_t r = 0; r < count; r++)
      for_registers(s.hidden, [&](int64_t c, int n) PVDM_BODY {
        store_n(dhidden.at(r) + c, load_n(dhidden.at(r) + c, n) * load_n(k.hidden.at(r) + c, n), n);
      });
    add_columns(dhidden, count, s.hidden, sums.up_bias);
    normalize(k.total2, k.mean2, k.rstd2, count, tile.of_layer(p.norm2_weight, l), tile.of_layer(p.norm2_bias, l));
    add_product(dhidden, s.hidden, tile.normed.tokens(), s.channels, count, sums.up);
    through(dhidden, count, w.up, dnormed);
    through_norm(k.total2, k.mean2, k.rstd2, count, tile.of_layer(p.norm2_weight, l), grad, grad_total,
                 sums.norm2_weight, sums.norm2_bias);
  }
  void attention(const Kept& k, int64_t sequences, const Layer& w, const LayerSums& sums) const {
    const int64_t offsets[] = {0, s.length}, rows = sequences * s.length;
    const TensorView none{};
    attention_backward(heads_view(dattended, sequences, s.length, 0, s), heads_view(k.qkv, sequences, s.length, 3, s),
                       none, none, heads_view(k.attended, sequences, s.length, 0, s),
                       tile.lse_view(k, sequences, s.length), heads_view(dqkv, sequences, s.length, 3, s),
                       tile.attention(offsets));
    add_product(dqkv, 3 * s.inner, tile.normed.tokens(), s.channels, rows, sums.qkv);
    through(dqkv, rows, w.qkv, dnormed);
  }
  // The last layer's; grad_total, until now a row a sequence, becomes that of all elements.
  void attention_of_first(const Kept& k, int64_t sequences, const Layer& w, const LayerSums& sums) const {
    const int64_t offsets[] = {0, s.length}, rows = sequences * s.length, c = s.channels;
    attention_backward_single(heads_view(dattended, sequences, 1, 0, s), heads_view(k.qkv, sequences, s.length, 2, s),
                              heads_view(k.query, sequences, 1, 0, s), heads_view(k.attended, sequences, 1, 0, s),
                              heads_view(dqkv, sequences, s.length, 2, s), heads_view(dquery, sequences, 1, 0, s),
                              tile.attention(offsets));
    add_product(dqkv, 2 * s.inner, tile.normed.tokens(), c, rows, sums.kv);
    add_product(dquery, s.inner, {tile.normed.data, s.length * c}, c, sequences, sums.query);
    through(dqkv, rows, w.kv, dnormed);
    through(dquery, sequences, w.query, tile.branch);
    for (int64_t q = sequences - 1; q >= 0; q--) {
      float* to = dnormed.at(q * s.length);
      for (int64_t i = 0; i < c; i++) to[i] += tile.branch.at(q)[i];
      memmove(grad_total.at(q * s.length), grad_total.at(q), c * 4);
      memset(grad_total.at(q * s.length + 1), 0, (s.length - 1) * c * 4);
    }
  }

  // From the gradient of the latents to that of the last layer's result, which lies in tile.normed.
  void latents(const float* incoming, const float* out, int64_t sequences, const Sums& sums) const {
    const Rows d{tile.wide.data, padded(s.latent)};
    for (int64_t r = 0; r < sequences; r++)
      for (int64_t c = 0; c < s.latent; c++) {
        const float y = out[r * s.latent + c];
        d.at(r)[c] = incoming[r * s.latent + c] * (1.0f - y * y);
      }
    add_columns(d, sequences, s.latent, sums.latent_bias);
    add_product(d, s.latent, tile.normed.tokens(), s.channels, sequences, sums.latent);
    through(d, sequences, tile.weights.latent(), dnormed);
    for (int64_t r = 0; r < sequences; r++) memcpy(grad.at(r), dnormed.at(r), s.channels * 4);
  }
  // The stream's gradient, back to the lattice; adds to that of the positions.
  void scatter(const TensorView& dx, int64_t first, int64_t sequences, const Rows& positions) const {
    PVDM_WITH_TYPE(dx.dtype, T, {
      const Sequences at{tile.o.layout, tile.o.plane};
      for (int64_t q = 0; q < sequences; q++) {
        const int64_t unit = first + q, sites = at.sites();
        T* to = dx.as<T>() + unit / sites * dx.stride[0] + at.start(unit % sites) * dx.stride[1];
        for (int64_t i = 0; i < s.length; i++) {
          const float* row = grad.at(q * s.length + i);
          for_registers(s.channels, [&](int64_t c, int n) PVDM_BODY {
            const Vec g = load_n(row + c, n);
            store(positions.at(i) + c, load(positions.at(i) + c) + g);
            if (i < s.length - 1) store_n(to + i * at.step() * dx.stride[1] + c, g, n);
          });
        }
      }
    })
  }
};

// Where a thread's sums lie: those of the ends first, then layer by layer.
int64_t sums_size_of(const Sizes& s) {
  Arena count{nullptr};
  Sums sums(count, s);
  for (int64_t l = 0; l < s.depth; l++) LayerSums layer(count, s, l == s.depth - 1);
  return count.used;
}
LayerSums layer_sums(float* start, const Sizes& s, int64_t l) {
  Arena arena{start};
  Sums sums(arena, s);
  for (int64_t i = 0; i < l; i++) LayerSums before(arena, s, false);
  return LayerSums(arena, s, l == s.depth - 1);
}

Kept kept_of(float* start, int64_t size, const Sizes& s, int64_t rows, int64_t sequences, int64_t l) {
  Arena arena{start + l * size};
  return Kept(arena, s, rows, sequences);
}

// to[r][c] = the sum over threads of a matrix of sums, of rows ... columns as dense as `to`.
void add_threads(const float* first, int64_t stride, int64_t threads, int64_t each, int64_t rows, int64_t columns,
                 float* to) {
  for (int64_t r = 0; r < rows; r++)
    for_registers(columns, [&](int64_t c, int n) PVDM_BODY {
      Vec sum = load_n(first + r * stride + c, n);
      for (int64_t t = 1; t < threads; t++) sum += load_n(first + t * each + r * stride + c, n);
      store_n(to + r * columns + c, sum, n);
    });
}

void write_sums(float* start, int64_t threads, int64_t each, const Sizes& s, const ProjectTensors& g) {
  const auto write = [&](const Rows& from, int64_t rows, int64_t columns, const TensorView& to, int64_t at) {
    add_threads(from.data, from.stride, threads, each, rows, columns, to.as<float>() + at);
  };
  const int64_t c = s.channels;
  Arena arena{start};
  const Sums sums(arena, s);
  write(sums.positions, s.length, c, g.positions, 0);
  memcpy(g.token.data, g.positions.as<float>() + (s.length - 1) * c, c * 4);
  write(sums.latent, s.latent, c, g.latent_weight, 0);
  write({sums.latent_bias, 0}, 1, s.latent, g.latent_bias, 0);
  parallel_for(threads_for(static_cast<int>(threads), s.depth), s.depth, [&](int64_t begin, int64_t end, int) {
    for (int64_t l = begin; l < end; l++) {
      const LayerSums layer = layer_sums(start, s, l);
      const int64_t rows = 3 * s.inner * l * c;
      if (l == s.depth - 1) {
        write(layer.query, s.inner, c, g.qkv_weight, rows);
        write(layer.kv, 2 * s.inner, c, g.qkv_weight, rows + s.inner * c);
      } else {
        write(layer.qkv, 3 * s.inner, c, g.qkv_weight, rows);
      }
      write(layer.out, c, s.inner, g.out_weight, l * c * s.inner);
      write(layer.up, s.hidden, c, g.up_weight, l * c * s.hidden);
      write(layer.down, c, s.hidden, g.down_weight, l * c * s.hidden);
      write({layer.norm1_weight, 0}, 1, c, g.norm1_weight, l * c);
      write({layer.norm1_bias, 0}, 1, c, g.norm1_bias, l * c);
      write({layer.out_bias, 0}, 1, c, g.out_bias, l * c);
      write({layer.norm2_weight, 0}, 1, c, g.norm2_weight, l * c);
      write({layer.norm2_bias, 0}, 1, c, g.norm2_bias, l * c);
      write({layer.up_bias, 0}, 1, s.hidden, g.up_bias, l * s.hidden);
      write({layer.down_bias, 0}, 1, c, g.down_bias, l * c);
    }
  });
}

template <class Op>
void backward(const TensorView& grad, const TensorView& x, const ProjectTensors& p, const TensorView& dx,
              const ProjectTensors& gradients, const ProjectOptions& o) {
  const Sizes s(p, o.heads);
  const Weights<Op> weights(p, s, true, o.threads);
  const int64_t units = grad.size[0] * grad.size[1];
  const int64_t each = sequences_of_tile(tile_size<Op>, s.length, units, o.threads), tiles = (units + each - 1) / each;
  const int64_t rows = each * s.length, sums_size = sums_size_of(s);
  Arena count{nullptr}, count_kept{nullptr};
  Kept(count_kept, s, rows, each);
  const Tile<Op> counted(count, p, s, weights, o, rows);
  Backward<Op>(count, counted, rows, each);
  count.floats(each * s.latent);
  const int64_t kept_size = count_kept.used, size = sums_size + s.depth * kept_size + count.used;
  const int threads = threads_for(o.threads, tiles);
  const Buffer memory(threads * size * 4);
  parallel_for(threads, tiles, [&](int64_t begin, int64_t end, int thread) {
    [[maybe_unused]] const typename Op::Session session{};
    float *const start = memory.floats() + thread * size, *const states = start + sums_size;
    memset(start, 0, sums_size * 4);
    Arena arena{states + s.depth * kept_size};
    const Tile<Op> tile(arena, p, s, weights, o, rows);
    const Backward<Op> back(arena, tile, rows, each);
    float* out = arena.floats(each * s.latent);
    Arena sums_arena{start};
    const Sums sums(sums_arena, s);
    const auto kept = [&](int64_t l) { return kept_of(states, kept_size, s, rows, each, l); };
    for (int64_t t = begin; t < end; t++) {
      const int64_t first = t * each, sequences = units - first < each ? units - first : each;
      Kept before;
      tile.gather(x, first, sequences, kept(0).total1);
      for (int64_t l = 0; l < s.depth; l++) {
        const Kept k = kept(l);
        tile.layer(l, k, l ? &before : nullptr, sequences);
        before = k;
      }
      tile.finish(kept(s.depth - 1), sequences, out);
      back.latents(grad.as<float>() + first * s.latent, out, sequences, sums);
      for (int64_t l = s.depth - 1; l >= 0; l--) back.layer(l, kept(l), sequences, layer_sums(start, s, l));
      back.scatter(dx, first, sequences, sums.positions);
    }
  });
  write_sums(memory.floats(), threads, size, s, gradients);
}

}  // namespace

void triplane_project_backward(const TensorView& grad, const TensorView& x, const ProjectTensors& parameters,
                               const TensorView& dx, const ProjectTensors& gradients, const ProjectOptions& options) {
#if defined(PVDM_ISA_AMX)
  if (parameters.qkv_weight.dtype != Dtype::bf16)
    return avx512bf16::triplane_project_backward(grad, x, parameters, dx, gradients, options);
  backward<Tiles>(grad, x, parameters, dx, gradients, options);
#else
#if defined(PVDM_ISA_AVX512BF16)
  if (parameters.qkv_weight.dtype == Dtype::bf16)
    return backward<Pairs>(grad, x, parameters, dx, gradients, options);
#endif
  backward<Floats>(grad, x, parameters, dx, gradients, options);
#endif
}

}  // namespace pvdm::PVDM_ISA
