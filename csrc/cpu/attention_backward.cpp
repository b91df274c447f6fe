// Softmax attention, backward: segment_attention and axial_attention.
// Formula: pvdm_fast/backends/reference/{segment,axial}_attention.py.
//
// Probabilities are recomputed from the saved log-sum-exp. A thread packs the queries and gradients of a problem once.
// Then it takes each block of keys through all queries. dK and dV of the block are summed in place, dQ in a buffer of
// the thread. Where threads share a problem, their dQ are added afterwards, in the order of the threads. There are no
// atomics, so results are bitwise reproducible.
#include "attention.h"

namespace pvdm::PVDM_ISA {
namespace {

int64_t key_blocks(int64_t tokens) { return (tokens + block_keys - 1) / block_keys; }

struct Workspace {
  // tokens in whole blocks of queries; floats in one width x queries block
  int64_t tokens, block;
  float *queries_across, *queries, *grads_across, *grads;  // across: panels, block after block; the others: rows
  float *tops, *logs, *deltas;                             // per query: see `weights`; delta is rowsum(dO . O)
  // transposed, block by block; [0]: of a problem that an earlier thread began
  float *dqueries[2];
  float *keys_across, *keys, *values_across;               // one block of keys
  float *p, *ds, *p_pairs, *ds_pairs, *ds_along;           // keys x queries
  float *dkeys, *dvalues;
  int64_t size;

  Workspace(Arena arena, int64_t longest, int64_t width, bool shared) {
    const int64_t padding = padded(width);
    tokens = (longest + block_queries - 1) / block_queries * block_queries;
    block = padding * block_queries;
    for (float** part : {&queries_across, &queries, &grads_across, &grads, &dqueries[1]})
      *part = arena.floats(tokens * padding);
    dqueries[0] = shared ? arena.floats(tokens * padding) : nullptr;
    for (float** part : {&tops, &logs, &deltas}) *part = arena.floats(tokens);
    for (float** part : {&keys_across, &keys, &values_across, &dkeys, &dvalues})
      *part = arena.floats(block_keys * padding);
    for (float** part : {&p, &ds}) *part = arena.floats(block_keys * block_queries);
    for (float** part : {&p_pairs, &ds_pairs, &ds_along}) *part = arena.floats(block_keys * block_queries / 2);
    size = arena.used;
  }
};

// Writes the zeros that AMX tiles sum with the output of `weights`: half a tile row behind an odd vector of queries,
// and the rows behind the last pair of keys.
template <class Op>
void pad_weights(const Workspace& w, int64_t keys, int64_t vectors) {
  if constexpr (Op::depth == 1) return;
  const int64_t written = vectors * lanes / 2, zeros = words<Op>(vectors * lanes) - written;
  for (float* part : {w.p_pairs, w.ds_pairs})
    for (int64_t j = 0; j < keys && zeros; j++) memset(part + j * block_queries / 2 + written, 0, zeros * sizeof(float));
  for (int64_t j = (keys + 1) / 2; j < words<Op>(keys); j++)
    for (int64_t v = 0; v < vectors; v++) store(w.ds_along + j * block_queries + v * lanes, Vec{});
}

// In place: scores S become P = 2^((S - top) scale - log), and dP becomes dS = P (dP - D). Normally top is 0 and log is
// the saved log-sum-exp. After `find_logs`, top is the largest score and log the logarithm of the sum of exponentials.
// With bf16 pairs, the rounded values are stored too: P and dS paired along queries, dS also along keys.
//
// count: the number of queries. Lanes behind them get 0. An infinite key would make them NaN, and sums over pairs and
// tiles of queries would pick that up.
template <class Op>
void weights(const Workspace& w, int64_t query, int64_t count, int64_t keys, float scale) {
  const int64_t vectors = (count + lanes - 1) / lanes;
  pad_weights<Op>(w, keys, vectors);
  for (int64_t v = 0; v < vectors; v++) {
    const Ints there = first_n(count_at(v * lanes, count));
    const Vec top = load(w.tops + query + v * lanes), log = load(w.logs + query + v * lanes);
    const Vec delta = load(w.deltas + query + v * lanes);
    for (int64_t j = 0; j < keys; j++) {
      const int64_t at = j * block_queries + v * lanes;
      const Vec p = masked(probability<Op>((load(w.p + at) - top) * scale - log), there);
      const Vec ds = masked(p * (load(w.ds + at) - delta), there);
#if defined(PVDM_ISA_AVX512BF16)
      if constexpr (Op::step == 2) {
        const auto halves = [&](float* to, Vec x) {
          const __m256bh rounded = _mm512_cvtneps_pbh(bit_cast<__m512>(x));
          memcpy(reinterpret_cast<char*>(to) + at * 2, &rounded, sizeof rounded);
        };
        halves(w.p_pairs, p);
        halves(w.ds_pairs, ds);
        if (j % 2) store(w.ds_along + j / 2 * block_queries + v * lanes, paired(load(w.ds + at - block_queries), ds));
        else if (j + 1 == keys) store(w.ds_along + j / 2 * block_queries + v * lanes, paired(ds, Vec{}));
        else store(w.ds + at, ds);
        continue;
      }
#endif
      store(w.p + at, p);
      store(w.ds + at, ds);
    }
  }
}

template <class Op, class T>
struct Backward {
  const TensorView &grad, &qkv, &out, &lse, &dqkv;
  Rotation rotation;
  float scale;
  int64_t width;

  // The log-sum-exp is saved in float32. Its rounding, and the change from base e to 2, make a probability wrong by up
  // to 2e-7 of the log-sum-exp's size. Above this limit the error would exceed the dtype's own rounding, and
  // `find_logs` computes it again.
  static constexpr float exact_logs = sizeof(T) == 2 ? 4096 : 64;

  // Packs everything that is per query. Returns whether a log-sum-exp is too large to be exact.
  bool prepare(const Problem& p, const Workspace& w) const {
    bool large = false;
    const auto queries = tokens_of<const T>(qkv, p);
    const auto grads = tokens_of<const T>(grad, p), outs = tokens_of<const T>(out, p);
    const Rotation turn = rotation.from(p.start);
    const float* logs = logs_of(lse, p);
    pack_rows<Op>(queries, p.count, width, turn, w.queries);
    pack_rows<Op>(grads, p.count, width, Rotation{}, w.grads);
    for (int64_t n = 0; n < p.count; n += lanes) {
      const int count = count_at(n, p.count);
      const int64_t at = n / block_queries * words<Op>(width) * block_queries + n % block_queries;
      pack_panel<Op>(queries.from(n), count, width, turn.from(n), w.queries_across + at, block_queries);
      pack_panel<Op>(grads.from(n), count, width, Rotation{}, w.grads_across + at, block_queries);
      store(w.tops + n, Vec{});
      store(w.logs + n, load_n(logs + n, count) * log2_e);
      for (int i = 0; i < count; i++) large = large || logs[n + i] > exact_logs || logs[n + i] < -exact_logs;
      Vec products[lanes] = {}, sum = {};
      for (int i = 0; i < count; i++)
        for (int64_t c = 0; c < width; c += lanes)
          products[i] += piece(grads, n + i, c, width) * piece(outs, n + i, c, width);
      transpose(products);  // turns sums over rows into one sum of vectors
      for (const Vec& part : products) sum += part;
      store(w.deltas + n, sum);
    }
    return large;
  }

  void pack_keys(const Problem& p, int64_t first, int64_t count, const Workspace& w) const {
    pack_panels<Op>(tokens_of<const T>(qkv, p, 1).from(first), count, width, rotation.from(p.start + first), w.keys_across);
  }

  void scores(int64_t query, int64_t vectors, int64_t keys, const Workspace& w) const {
    const int64_t depth = words<Op>(width);
    multiply<Op>(keys, vectors, Panels{w.keys_across, depth * lanes, lanes},
                 {w.queries_across + query * depth, block_queries}, {w.p, block_queries}, depth);
  }

  // Recomputes the largest score and log-sum-exp of every query, as the forward pass does. It costs one more product on
  // top of five.
  void find_logs(const Problem& p, const Workspace& w) const {
    const float size = scale < 0 ? -scale : scale;
    alignas(64) float factor[block_queries];
    for (int64_t first = 0; first < p.count; first += block_keys) {
      const int64_t count = p.count - first < block_keys ? p.count - first : block_keys;
      pack_keys(p, first, count, w);
      for (int64_t q = 0; q < p.count; q += block_queries) {
        const int64_t queries = p.count - q < block_queries ? p.count - q : block_queries;
        const int64_t vectors = (queries + lanes - 1) / lanes;
        scores(q, vectors, count, w);
        if (scale < 0) negate<Floats>(w.p, count * block_queries);
        exponentials<Op>(w.p, count, vectors, size * log2_e, first == 0, w.tops + q, w.logs + q, factor);
      }
    }
    for (int64_t n = 0; n < p.count; n += lanes) store(w.logs + n, log2(load(w.logs + n)));
    if (scale < 0) negate<Floats>(w.tops, padded(p.count));
  }

  // Goes through key blocks begin ... end of a problem. Writes their dK and dV, and leaves their dQ in `dqueries`.
  void run(const Problem& p, int64_t begin, int64_t end, const Workspace& w, float* dqueries) const {
    if (prepare(p, w)) find_logs(p, w);
    const Rotation turn = rotation.from(p.start);
    for (int64_t b = begin; b < end; b++) {
      const int64_t first = b * block_keys, count = p.count - first < block_keys ? p.count - first : block_keys;
      const auto keys = tokens_of<const T>(qkv, p, 1).from(first), values = tokens_of<const T>(qkv, p, 2).from(first);
      pack_keys(p, first, count, w);
      pack_left_rows<Op>(keys, count, width, turn.from(first), w.keys);
      pack_panels<Op>(values, count, width, Rotation{}, w.values_across);
      for (int64_t q = 0; q < p.count; q += block_queries)
        block(q, p.count - q < block_queries ? p.count - q : block_queries, count, b > begin, w, dqueries);
      write_rows(w.dkeys, count, width, scale, turn.from(first), tokens_of<T>(dqkv, p, 1).from(first));
      write_rows(w.dvalues, count, width, 1.0f, Rotation{}, tokens_of<T>(dqkv, p, 2).from(first));
    }
  }

  void block(int64_t query, int64_t queries, int64_t keys, bool add, const Workspace& w, float* dqueries) const {
    constexpr int row = block_queries / Op::step;
    const int64_t vectors = (queries + lanes - 1) / lanes, padding = padded(width), depth = words<Op>(width);
    scores(query, vectors, keys, w);
    multiply<Op>(keys, vectors, Panels{w.values_across, depth * lanes, lanes},
                 {w.grads_across + query * depth, block_queries}, {w.ds, block_queries}, depth);
    weights<Op>(w, query, queries, keys, scale * log2_e);
    const Lines<row> p{Op::step == 2 ? w.p_pairs : w.p}, ds{Op::step == 2 ? w.ds_pairs : w.ds};
    const int64_t rows = query / Op::step * padding;
    multiply<Op>(keys, padding / lanes, p, {w.grads + rows, padding}, {w.dvalues, padding, query > 0}, words<Op>(queries));
    multiply<Op>(keys, padding / lanes, ds, {w.queries + rows, padding}, {w.dkeys, padding, query > 0}, words<Op>(queries));
    multiply<Op>(width, vectors, Panels{w.keys, lanes, padding}, {Op::step == 2 ? w.ds_along : w.ds, block_queries},
                 {dqueries + query * padding, block_queries, add}, words<Op>(keys));
  }

  void write_dqueries(const Problem& p, const float* dqueries) const {
    const auto to = tokens_of<T>(dqkv, p);
    const Rotation turn = rotation.from(p.start);
    for (int64_t n = 0; n < p.count; n += lanes) {
      const float* from = dqueries + n / block_queries * padded(width) * block_queries + n % block_queries;
      write_columns(from, block_queries, count_at(n, p.count), width, splat(scale), turn.from(n), to.from(n));
    }
  }

  // Thread `t` may start in the middle of a problem. Then this adds the dQ of all threads that share the problem. Only
  // the first such thread does it.
  void join(const Plan& plan, int64_t t, float* memory, int64_t size, int64_t longest) const {
    const Cursor at = plan.start(t);
    const auto same = [&](const Cursor& other) { return other.row == at.row && other.segment == at.segment; };
    const Cursor before = plan.start(t - 1);
    if (at.block == 0 || (same(before) && before.block > 0)) return;
    const Problem p = plan.problem(at);
    const int64_t count = (p.count + block_queries - 1) / block_queries * padded(width) * block_queries;
    float* sum = nullptr;
    for (int64_t other = t - 1; other < plan.threads; other++) {
      const Cursor begin = plan.start(other), end = plan.start(other + 1);
      if (begin.row == end.row && begin.segment == end.segment && begin.block == end.block) continue;
      if (other >= t && !same(begin)) break;
      const Workspace w({memory + other * size}, longest, width, true);
      const float* part = w.dqueries[same(begin) && begin.block > 0 ? 0 : 1];
      if (!sum)
        sum = const_cast<float*>(part);
      else
        for (int64_t i = 0; i < count; i += lanes) store(sum + i, load(sum + i) + load(part + i));
    }
    write_dqueries(p, sum);
  }
};

template <class Op, class T>
void backward(const TensorView& grad, const TensorView& qkv, const Tables& tables, const TensorView& out,
              const TensorView& lse, const TensorView& dqkv, const AttentionOptions& o) {
  const Plan plan(qkv, o, false, key_blocks);
  const int64_t width = qkv.size[5], longest = plan.longest();
  const bool shared = plan.threads > 1;
  const int64_t size = Workspace({nullptr}, longest, width, shared).size;
  const Buffer memory(plan.threads * size * 4);
  const Backward<Op, T> op{grad, qkv, out, lse, dqkv, tables.rotation(), static_cast<float>(o.scale), width};
  parallel_for(plan.threads, plan.threads, [&](int64_t begin, int64_t end, int) {
    [[maybe_unused]] const typename Op::Session session{};
    for (int64_t t = begin; t < end; t++) {
      const Workspace w({memory.floats() + t * size}, longest, width, shared);
      plan.run(t, [&](const Problem& p, const Problem& next, int64_t first, int64_t last, int64_t all) {
        for (int part = 0; part < 3; part++) prefetch(tokens_of<const T>(qkv, next, part), next.count, width);
        prefetch(tokens_of<const T>(grad, next), next.count, width);
        prefetch(tokens_of<const T>(out, next), next.count, width);
        float* dqueries = w.dqueries[first == 0];
        op.run(p, first, last, w, dqueries);
        if (first == 0 && last == all) op.write_dqueries(p, dqueries);
      });
    }
  });
  if (shared)
    parallel_for(plan.threads - 1, plan.threads - 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin + 1; t < end + 1; t++) op.join(plan, t, memory.floats(), size, longest);
    });
}

}  // namespace

void attention_backward(const TensorView& grad, const TensorView& qkv, const TensorView& sin, const TensorView& cos,
                        const TensorView& out, const TensorView& lse, const TensorView& dqkv, const AttentionOptions& o) {
#if defined(PVDM_ISA_AMX)
  if (!use_pairs(qkv, o)) return avx512bf16::attention_backward(grad, qkv, sin, cos, out, lse, dqkv, o);
  backward<Tiles, bf16>(grad, qkv, Tables(sin, cos), out, lse, dqkv, o);
#else
  const Tables tables(sin, cos);
#if defined(PVDM_ISA_AVX512BF16)
  if (use_pairs(qkv, o)) return backward<Pairs, bf16>(grad, qkv, tables, out, lse, dqkv, o);
#endif
  PVDM_WITH_TYPE(qkv.dtype, T, backward<Floats, T>(grad, qkv, tables, out, lse, dqkv, o))
#endif
}

}  // namespace pvdm::PVDM_ISA
