// Softmax attention, forward: segment_attention and axial_attention.
// Formula: pvdm_fast/backends/reference/{segment,axial}_attention.py.
//
// Flash-style: a thread packs the keys and values of a problem once. Then it takes blocks of 48 or 64 queries through
// blocks of keys with a running maximum. Workspace per thread: two packed copies of the longest segment, O(N d).
#include "attention.h"

namespace pvdm::PVDM_ISA {
namespace {

// A single query left over behind whole vectors gets its own row kernel. The projections have 17 tokens, and a whole
// vector for the last one would double their cost.
template <class Op>
int64_t query_blocks(int64_t tokens) {
  const int64_t rest = tokens % block_queries;
  return tokens / block_queries + (rest > 0) + (Op::step == 1 && rest > 1 && rest % lanes == 1);
}
template <class Op>
int64_t queries_of(int64_t block, int64_t tokens) {
  const int64_t rest = tokens - block * block_queries;
  if (rest < 0) return 1;  // the single query
  if (rest >= block_queries) return block_queries;
  return Op::step == 1 && rest > 1 && rest % lanes == 1 ? rest - 1 : rest;
}

struct Workspace {
  float *keys, *values;             // panels; rows
  float *queries, *scores, *sums;   // panels of a block, side by side; keys x queries; width x queries
  float *maximum, *total, *factor;  // per query
  Workspace(Arena arena, int64_t longest, int64_t width) {
    const int64_t tokens = padded(longest), padding = padded(width);
    keys = arena.floats(tokens * padding);
    values = arena.floats(tokens * padding);
    queries = arena.floats(padding * block_queries);
    // A single query's scores against all keys use this buffer too.
    scores = arena.floats(tokens > block_keys * block_queries ? tokens : block_keys * block_queries);
    sums = arena.floats(padding * block_queries);
    maximum = arena.floats(block_queries);
    total = arena.floats(block_queries);
    factor = arena.floats(block_queries);
    size = arena.used;
  }
  int64_t size;
};

template <class Op, class T>
struct Forward {
  const TensorView &qkv, &query, &out, &lse;
  Rotation rotation;
  float scale;  // of the scores
  int64_t width;

  void run(const Problem& p, const Problem& next, int64_t begin, int64_t end, const Workspace& w) const {
    const int first = query.data ? 0 : 1;
    const Rotation turn = rotation.from(p.start);
    for (int part = 0; part < 3 - !first; part++) prefetch(tokens_of<const T>(qkv, next, part), next.count, width);
    pack_panels<Op>(tokens_of<const T>(qkv, p, first), p.count, width, turn, w.keys);
    pack_left_rows<Op>(tokens_of<const T>(qkv, p, first + 1), p.count, width, Rotation{}, w.values);
    const auto queries = query.data ? tokens_of<const T>(query, p) : tokens_of<const T>(qkv, p, 0);
    const auto results = tokens_of<T>(out, p);
    float* logs = logs_of(lse, p);
    if (query.data) return lone(queries, turn, p.count, results, logs, w);
    for (int64_t b = begin; b < end; b++) {
      const int64_t count = queries_of<Op>(b, p.count);
      const int64_t at = b * block_queries < p.count - count ? b * block_queries : p.count - count;
      if (count == 1 && Op::step == 1)
        lone(queries.from(at), turn.from(at), p.count, results.from(at), logs + at, w);
      else
        block(queries.from(at), turn.from(at), count, p.count, results.from(at), logs + at, w);
    }
  }

  void block(const Tokens<const T>& queries, const Rotation& turn, int64_t count, int64_t keys, const Tokens<T>& results,
             float* logs, const Workspace& w) const {
    const int64_t vectors = (count + lanes - 1) / lanes, depth = words<Op>(width), padding = padded(width);
    // Queries take the sign of the scale, so that maxima stay maxima. Only the sign: in bf16 anything else would round.
    const float size = scale < 0 ? -scale : scale;
    for (int64_t v = 0; v < vectors; v++)
      pack_panel<Op>(queries.from(v * lanes), count_at(v * lanes, count), width, turn.from(v * lanes),
                     w.queries + v * lanes, block_queries);
    if (scale < 0) negate<Op>(w.queries, depth * block_queries);
    for (int64_t j = 0; j < keys; j += block_keys) {
      const int64_t part = keys - j < block_keys ? keys - j : block_keys;
      multiply<Op>(part, vectors, Panels{w.keys + j * depth, depth * lanes, lanes}, {w.queries, block_queries},
                   {w.scores, block_queries}, depth);
      exponentials<Op>(w.scores, part, vectors, size * log2_e, j == 0, w.maximum, w.total, w.factor);
      multiply<Op>(width, vectors, Panels{w.values + j / Op::step * padding, lanes, padding}, {w.scores, block_queries},
                   {w.sums, block_queries, j > 0, j > 0 ? w.factor : nullptr}, words<Op>(part));
    }
    for (int64_t v = 0; v < vectors; v++) {
      const Vec total = load(w.total + v * lanes), top = load(w.maximum + v * lanes);
      const int lane_count = count_at(v * lanes, count);
      write_columns(w.sums + v * lanes, block_queries, lane_count, width, 1.0f / total, Rotation{},
                    results.from(v * lanes));
      store_n(logs + v * lanes, top * size + log2(total) * ln_2, lane_count);
    }
  }

  // One query. For the scores the lanes hold keys, for the sum they hold the width.
  void lone(const Tokens<const T>& queries, const Rotation& turn, int64_t keys, const Tokens<T>& results, float* logs,
            const Workspace& w) const {
    const int64_t padding = padded(width), all = padded(keys);
    pack_rows<Floats>(queries, 1, width, turn, w.queries);
    for (int64_t c = 0; c < padding; c += lanes) store(w.queries + c, load(w.queries + c) * (scale * log2_e));
    for (int64_t j = 0; j < all; j += lanes) multiply_row(1, w.queries, w.keys + j * width, lanes, w.scores + j, width);
    for (int64_t j = keys; j < all; j++) w.scores[j] = minus_infinity;
    Vec top = splat(minus_infinity), total = {};
    for (int64_t j = 0; j < all; j += lanes) top = max(top, load(w.scores + j));
    float maximum = top[0];
    for (int i = 1; i < lanes; i++) maximum = top[i] > maximum ? top[i] : maximum;
    const Vec base = base_of(splat(maximum));
    for (int64_t j = 0; j < all; j += lanes) {
      const Vec p = exp2<Floats>(load(w.scores + j) - base);
      store(w.scores + j, p);
      total += p;
    }
    const Vec sum = splat(reduce_sum(total)), inverse = 1.0f / sum;
    multiply_row(padding / lanes, w.scores, w.values, padding, w.sums, keys);
    for (int64_t c = 0; c < width; c += lanes) store_n(results.data + c, load(w.sums + c) * inverse, count_at(c, width));
    store_n(logs, (splat(maximum) + log2(sum)) * ln_2, 1);
  }
};

template <class Op, class T>
void forward(const TensorView& qkv, const TensorView& query, const Tables& tables, const TensorView& out,
             const TensorView& lse, const AttentionOptions& o) {
  const Plan plan(qkv, o, query.data != nullptr, query_blocks<Op>);
  const int64_t width = qkv.size[5], longest = plan.longest(), size = Workspace({nullptr}, longest, width).size;
  const Buffer memory(plan.threads * size * 4);
  const Forward<Op, T> op{qkv, query, out, lse, tables.rotation(), static_cast<float>(o.scale), width};
  parallel_for(plan.threads, plan.threads, [&](int64_t begin, int64_t end, int) {
    [[maybe_unused]] const typename Op::Session session{};
    for (int64_t t = begin; t < end; t++) {
      const Workspace workspace({memory.floats() + t * size}, longest, width);
      plan.run(t, [&](const Problem& p, const Problem& next, int64_t first, int64_t last, int64_t) {
        op.run(p, next, first, last, workspace);
      });
    }
  });
}

}  // namespace

void attention_forward(const TensorView& qkv, const TensorView& query, const TensorView& sin, const TensorView& cos,
                       const TensorView& out, const TensorView& lse, const AttentionOptions& o) {
#if defined(PVDM_ISA_AMX)
  if (query.data || !use_pairs(qkv, o)) return avx512bf16::attention_forward(qkv, query, sin, cos, out, lse, o);
  forward<Tiles, bf16>(qkv, query, Tables(sin, cos), out, lse, o);
#else
  const Tables tables(sin, cos);
#if defined(PVDM_ISA_AVX512BF16)
  if (!query.data && use_pairs(qkv, o)) return forward<Pairs, bf16>(qkv, query, tables, out, lse, o);
#endif
  PVDM_WITH_TYPE(qkv.dtype, T, forward<Floats, T>(qkv, query, tables, out, lse, o))
#endif
}

}  // namespace pvdm::PVDM_ISA
