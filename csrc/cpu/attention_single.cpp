// Softmax attention of one query to each sequence, backward (forward: `lone` of attention_forward.cpp).
#include "attention.h"

namespace pvdm::PVDM_ISA {
namespace {

int64_t one_block(int64_t) { return 1; }

struct Workspace {
  float *keys_across, *keys, *values_across;  // panels; rows; panels
  float *query, *grad, *dquery, *p, *ds;
  int64_t size;
  Workspace(Arena arena, int64_t longest, int64_t width) {
    const int64_t tokens = padded(longest), padding = padded(width);
    for (float** part : {&keys_across, &keys, &values_across}) *part = arena.floats(tokens * padding);
    for (float** part : {&query, &grad, &dquery}) *part = arena.floats(padding);
    for (float** part : {&p, &ds}) *part = arena.floats(tokens);
    size = arena.used;
  }
};

// Turns scores into probabilities, in place. All scores of the query are here, so the saved (rounded) log-sum-exp isn't
// needed.
void softmax(float* scores, int64_t count) {
  for (int64_t j = count; j < padded(count); j++) scores[j] = minus_infinity;
  Vec top = splat(minus_infinity), total = {};
  for (int64_t j = 0; j < count; j += lanes) top = max(top, load(scores + j));
  float maximum = top[0];
  for (int i = 1; i < lanes; i++) maximum = top[i] > maximum ? top[i] : maximum;
  for (int64_t j = 0; j < count; j += lanes) {
    const Vec p = exp2<Floats>((load(scores + j) - maximum) * log2_e);
    store(scores + j, p);
    total += p;
  }
  const float inverse = 1.0f / reduce_sum(total);
  for (int64_t j = 0; j < count; j += lanes) store(scores + j, load(scores + j) * inverse);
}

template <class T>
struct Single {
  const TensorView &grad, &qkv, &query, &out, &dqkv, &dquery;
  float scale;
  int64_t width;

  void run(const Problem& p, const Workspace& w) const {
    const auto keys = tokens_of<const T>(qkv, p, 0), values = tokens_of<const T>(qkv, p, 1);
    const auto queries = tokens_of<const T>(query, p);
    const auto grads = tokens_of<const T>(grad, p), outs = tokens_of<const T>(out, p);
    const int64_t padding = padded(width);
    pack_panels<Floats>(keys, p.count, width, Rotation{}, w.keys_across);
    pack_rows<Floats>(keys, p.count, width, Rotation{}, w.keys);
    pack_panels<Floats>(values, p.count, width, Rotation{}, w.values_across);
    Vec products = {};
    for (int64_t c = 0; c < width; c += lanes) {
      const Vec g = piece(grads, 0, c, width);
      products += g * piece(outs, 0, c, width);
      store(w.grad + c, g);
      store(w.query + c, piece(queries, 0, c, width) * scale);
    }
    const float delta = reduce_sum(products);
    for (int64_t j = 0; j < p.count; j += lanes) {
      multiply_row(1, w.query, w.keys_across + j * width, lanes, w.p + j, width);
      multiply_row(1, w.grad, w.values_across + j * width, lanes, w.ds + j, width);
    }
    softmax(w.p, p.count);
    for (int64_t j = 0; j < p.count; j += lanes) store(w.ds + j, load(w.p + j) * (load(w.ds + j) - delta));
    multiply_row(padding / lanes, w.ds, w.keys, padding, w.dquery, p.count);
    const auto to = tokens_of<T>(dquery, p), dkeys = tokens_of<T>(dqkv, p, 0), dvalues = tokens_of<T>(dqkv, p, 1);
    write_rows(w.dquery, 1, width, scale, Rotation{}, to);
    for (int64_t j = 0; j < p.count; j++) {  // outer products; the packed query includes the scale
      write_rows(w.query, 1, width, w.ds[j], Rotation{}, dkeys.from(j));
      write_rows(w.grad, 1, width, w.p[j], Rotation{}, dvalues.from(j));
    }
  }
};

template <class T>
void single(const TensorView& grad, const TensorView& qkv, const TensorView& query, const TensorView& out,
            const TensorView& dqkv, const TensorView& dquery, const AttentionOptions& o) {
  const Plan plan(qkv, o, true, one_block);
  const int64_t width = qkv.size[5], longest = plan.longest(), size = Workspace({nullptr}, longest, width).size;
  const Buffer memory(plan.threads * size * 4);
  const Single<T> op{grad, qkv, query, out, dqkv, dquery, static_cast<float>(o.scale), width};
  parallel_for(plan.threads, plan.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; t++) {
      const Workspace workspace({memory.floats() + t * size}, longest, width);
      plan.run(t, [&](const Problem& p, const Problem& next, int64_t, int64_t, int64_t) {
        for (int part = 0; part < 2; part++) prefetch(tokens_of<const T>(qkv, next, part), next.count, width);
        op.run(p, workspace); });
    }
  });
}

}  // namespace

void attention_backward_single(const TensorView& grad, const TensorView& qkv, const TensorView& query,
                               const TensorView& out, const TensorView& dqkv, const TensorView& dquery,
                               const AttentionOptions& o) {
  PVDM_WITH_TYPE(qkv.dtype, T, single<T>(grad, qkv, query, out, dqkv, dquery, o))
}

}  // namespace pvdm::PVDM_ISA
