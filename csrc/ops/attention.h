// segment_attention and axial_attention: checks of both native backends.
#pragma once
#include "sizes.h"

namespace pvdm {

inline void check_offsets(const std::vector<int64_t>& offsets, int64_t tokens) {
  require(offsets.size() > 1 && offsets.front() == 0 && offsets.back() == tokens, "The offsets must span all tokens.");
  for (size_t i = 1; i < offsets.size(); i++) require(offsets[i - 1] < offsets[i], "The offsets must rise.");
}

// Checks what both directions read.
inline void check_attention(const TensorView& qkv, const TensorView& query, const TensorView& sin, const TensorView& cos,
                            const TensorView& out, const TensorView& lse, const std::vector<int64_t>& offsets) {
  require(qkv.dims == 6, "qkv must be (B, sites, L, parts, heads, d).");
  const int64_t batch = qkv.size[0], sites = qkv.size[1], tokens = qkv.size[2], heads = qkv.size[4], width = qkv.size[5];
  const int64_t queries = query.data ? 1 : tokens;
  check("qkv", qkv, {batch, sites, tokens, query.data ? 2 : 3, heads, width});
  require(qkv.dtype != Dtype::f64, "qkv must be float32, bfloat16 or float16.");
  require(batch > 0 && sites > 0 && tokens > 0 && heads > 0 && width > 0, "qkv must not be empty.");
  check("out", out, {batch, sites, queries, heads, width});
  check("lse", lse, {batch, sites, heads, queries});
  check_float("lse", lse);
  require(out.dtype == qkv.dtype, "qkv and out must share a dtype.");
  require(!sin.data == !cos.data, "sin and cos go together.");
  require(!query.data || (!sin.data && offsets.size() == 2), "A single query has neither rotation nor segments.");
  if (query.data) check("query", query, {batch, sites, 1, heads, width});
  require(!query.data || query.dtype == qkv.dtype, "qkv and query must share a dtype.");
  for (const auto* table : {&sin, &cos}) {
    if (!table->data) continue;
    require(width % 2 == 0, "Rotation needs an even width of heads.");
    check("A rotation table", *table, {tokens, width});
    check_float("A rotation table", *table);
  }
}

inline void check_attention_gradients(const TensorView& grad, const TensorView& qkv, const TensorView& query,
                                      const TensorView& out, const TensorView& dqkv, const TensorView& dquery) {
  check("grad", grad, {out.size[0], out.size[1], out.size[2], out.size[3], out.size[4]});
  check("dqkv", dqkv, {qkv.size[0], qkv.size[1], qkv.size[2], qkv.size[3], qkv.size[4], qkv.size[5]});
  require(grad.dtype == qkv.dtype && dqkv.dtype == qkv.dtype, "grad, qkv and dqkv must share a dtype.");
  require(!dquery.data == !query.data, "query and its gradient go together.");
  if (query.data) {
    check("dquery", dquery, {query.size[0], query.size[1], 1, query.size[3], query.size[4]});
    require(dquery.dtype == qkv.dtype, "dquery and qkv must share a dtype.");
  }
}

}  // namespace pvdm
