// Softmax attention and its tangent, in one pass: segment_attention and axial_attention in forward-mode differentiation.
// Formula: `jvp` of pvdm_fast/backends/reference/{segment,axial}_attention.py. With a dot for tangents, P = softmax(S):
//   O. = P . (S. - <S.>) V + P V. = (P . S.) V + P V. - <S.> O,   <S.> = rowsum(P . S.),   S. = scale (Q. K' + Q K.').
//
// Works like attention_forward.cpp: blocks of queries go through blocks of keys with a running maximum, which scales all
// three sums. It takes 6 products instead of 2, in float32 for every storage type. Workspace per thread: four packed
// copies of the longest segment, O(N d).
#include "attention_jvp.h"

#include "attention.h"

namespace pvdm::PVDM_ISA {
namespace {

int64_t query_blocks(int64_t tokens) { return (tokens + block_queries - 1) / block_queries; }

// Two products and their sum become one product of twice the length. So both operands lie one behind the other.
struct Workspace {
  float *keys, *values;     // panels of tangents, then keys; per block of keys: rows of values, then tangents
  float* queries;           // panels of a block, side by side: queries, then tangents
  float* scores;            // keys x queries: P . S., then P
  float *sums, *dsums;      // width x queries
  float *maximum, *total, *factor, *mean;  // per query; `mean` is of the scores' tangents, times `total`
  Workspace(Arena arena, int64_t longest, int64_t width) {
    const int64_t tokens = padded(longest), padding = padded(width);
    for (float** part : {&keys, &values}) *part = arena.floats(2 * tokens * padding);
    queries = arena.floats(2 * padding * block_queries);
    scores = arena.floats((2 * block_keys + lanes) * block_queries);
    for (float** part : {&sums, &dsums}) *part = arena.floats(padding * block_queries);
    for (float** part : {&maximum, &total, &factor, &mean}) *part = arena.floats(block_queries);
    size = arena.used;
  }
  int64_t size;
};

template <class T>
struct WithTangents {
  const TensorView &qkv, &tangent, &out, &lse, &dout;
  Rotation rotation;
  float scale;  // of the scores
  int64_t width;

  void run(const Problem& p, int64_t begin, int64_t end, const Workspace& w) const {
    const Rotation turn = rotation.from(p.start);
    pack_keys(tokens_of<const T>(qkv, p, 1), tokens_of<const T>(tangent, p, 1), p.count, turn, w.keys);
    pack_values(tokens_of<const T>(qkv, p, 2), tokens_of<const T>(tangent, p, 2), p.count, w.values);
    for (int64_t b = begin; b < end; b++) {
      const int64_t at = b * block_queries, rest = p.count - at;
      block(p, at, rest < block_queries ? rest : block_queries, turn.from(at), w);
    }
  }

  void pack_keys(const Tokens<const T>& keys, const Tokens<const T>& tangents, int64_t count, const Rotation& turn,
                 float* to) const {
    for (int64_t n = 0; n < count; n += lanes, to += 2 * width * lanes) {
      pack_panel<Floats>(tangents.from(n), count_at(n, count), width, turn.from(n), to, lanes);
      pack_panel<Floats>(keys.from(n), count_at(n, count), width, turn.from(n), to + width * lanes, lanes);
    }
  }

  void pack_values(const Tokens<const T>& values, const Tokens<const T>& tangents, int64_t count, float* to) const {
    for (int64_t j = 0; j < count; j += block_keys) {
      const int64_t part = count - j < block_keys ? count - j : block_keys;
      for (const auto* tokens : {&values, &tangents}) {
        pack_rows<Floats>(tokens->from(j), part, width, Rotation{}, to);
        to += part * padded(width);
      }
    }
  }

  void pack_queries(const Tokens<const T>& queries, int64_t count, const Rotation& turn, float* to) const {
    for (int64_t n = 0; n < count; n += lanes)
      pack_panel<Floats>(queries.from(n), count_at(n, count), width, turn.from(n), to + n, block_queries);
    if (scale < 0) negate<Floats>(to, width * block_queries);  // then maxima of the scores are maxima
  }

  void block(const Problem& p, int64_t at, int64_t count, const Rotation& turn, const Workspace& w) const {
    const int64_t vectors = (count + lanes - 1) / lanes, padding = padded(width), panel = 2 * width * lanes;
    const float size = scale < 0 ? -scale : scale;
    pack_queries(tokens_of<const T>(qkv, p, 0).from(at), count, turn, w.queries);
    pack_queries(tokens_of<const T>(tangent, p, 0).from(at), count, turn, w.queries + width * block_queries);
    for (int64_t j = 0; j < p.count; j += block_keys) {
      const int64_t part = p.count - j < block_keys ? p.count - j : block_keys;
      const bool first = j == 0;
      const float *keys = w.keys + 2 * j * width, *values = w.values + 2 * j * padding;
      float* scores = w.scores + part * block_queries;
      // Tangents first: whole panels are written, and their padding runs into the place of the scores.
      multiply<Floats>(part, vectors, Panels{keys, panel, lanes}, {w.queries, block_queries}, {w.scores, block_queries},
                       2 * width);
      multiply<Floats>(part, vectors, Panels{keys + width * lanes, panel, lanes}, {w.queries, block_queries},
                       {scores, block_queries}, width);
      exponentials<Floats>(scores, part, vectors, size * log2_e, first, w.maximum, w.total, w.factor);
      weigh(scores, w.scores, part, vectors, size, first, w);
      const float* factor = first ? nullptr : w.factor;
      multiply<Floats>(width, vectors, Panels{values, lanes, padding}, {scores, block_queries},
                       {w.sums, block_queries, !first, factor}, part);
      multiply<Floats>(width, vectors, Panels{values, lanes, padding}, {w.scores, block_queries},
                       {w.dsums, block_queries, !first, factor}, 2 * part);
    }
    finish(p, at, count, vectors, w);
  }

  // Turns the scores' tangents into P . S., in place, and sums them.
  void weigh(const float* scores, float* tangents, int64_t keys, int64_t vectors, float size, bool first,
             const Workspace& w) const {
    for (int64_t v = 0; v < vectors; v++) {
      const float* p = scores + v * lanes;
      float *d = tangents + v * lanes, *mean = w.mean + v * lanes;
      Vec sums[2] = {};
      int64_t j = 0;
      for (; j + 2 <= keys; j += 2)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          const Vec product = load(p + (j + i) * block_queries) * (load(d + (j + i) * block_queries) * size);
          store(d + (j + i) * block_queries, product);
          sums[i] += product;
        }
      if (j < keys) {
        const Vec product = load(p + j * block_queries) * (load(d + j * block_queries) * size);
        store(d + j * block_queries, product);
        sums[0] += product;
      }
      const Vec sum = sums[0] + sums[1];
      store(mean, first ? sum : load(mean) * load(w.factor + v * lanes) + sum);
    }
  }

  void finish(const Problem& p, int64_t at, int64_t count, int64_t vectors, const Workspace& w) const {
    const auto results = tokens_of<T>(out, p).from(at), tangents = tokens_of<T>(dout, p).from(at);
    float* logs = logs_of(lse, p) + at;
    const float size = scale < 0 ? -scale : scale;
    for (int64_t v = 0; v < vectors; v++) {
      const Vec total = load(w.total + v * lanes), inverse = 1.0f / total;
      const Vec mean = load(w.mean + v * lanes) * inverse;
      for (int64_t c = 0; c < width; c++) {
        float* d = w.dsums + c * block_queries + v * lanes;
        store(d, load(d) - mean * load(w.sums + c * block_queries + v * lanes));
      }
      const int lane_count = count_at(v * lanes, count);
      const auto write = [&](const float* from, const Tokens<T>& to) {
        write_columns(from + v * lanes, block_queries, lane_count, width, inverse, Rotation{}, to.from(v * lanes));
      };
      write(w.sums, results);
      write(w.dsums, tangents);
      store_n(logs + v * lanes, load(w.maximum + v * lanes) * size + log2(total) * ln_2, lane_count);
    }
  }
};

template <class T>
void with_tangents(const TensorView& qkv, const TensorView& tangent, const Tables& tables, const TensorView& out,
                   const TensorView& lse, const TensorView& dout, const AttentionOptions& o) {
  const Plan plan(qkv, o, false, query_blocks);
  const int64_t width = qkv.size[5], longest = plan.longest(), size = Workspace({nullptr}, longest, width).size;
  const Buffer memory(plan.threads * size * 4);
  const WithTangents<T> op{qkv, tangent, out, lse, dout, tables.rotation(), static_cast<float>(o.scale), width};
  parallel_for(plan.threads, plan.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; t++) {
      const Workspace workspace({memory.floats() + t * size}, longest, width);
      plan.run(t, [&](const Problem& p, const Problem&, int64_t first, int64_t last, int64_t) {
        op.run(p, first, last, workspace);
      });
    }
  });
}

}  // namespace

void attention_jvp(const TensorView& qkv, const TensorView& tangent, const TensorView& sin, const TensorView& cos,
                   const TensorView& out, const TensorView& lse, const TensorView& dout, const AttentionOptions& o) {
  const Tables tables(sin, cos);
  PVDM_WITH_TYPE(qkv.dtype, T, with_tangents<T>(qkv, tangent, tables, out, lse, dout, o))
}

}  // namespace pvdm::PVDM_ISA
