// triplane_project, forward: each tile of sequences goes through all layers while it lies in the second cache.
// Formula: pvdm_fast/backends/reference/triplane_project.py.
#include "triplane_project.h"

namespace pvdm::PVDM_ISA {
namespace {

template <class Op>
constexpr int64_t tile_size = Op::step == 2 ? 256 : 128;  // rows

template <class Op>
void forward(const TensorView& x, const ProjectTensors& p, const TensorView& out, const ProjectOptions& o) {
  const Sizes s(p, o.heads);
  const Weights<Op> weights(p, s, false, o.threads);
  const int64_t units = out.size[0] * out.size[1];
  const int64_t each = sequences_of_tile(tile_size<Op>, s.length, units, o.threads), tiles = (units + each - 1) / each;
  const auto lay_out = [&](Arena& arena, Kept* kept) {
    *kept = Kept(arena, s, each * s.length, each);
    return Tile<Op>(arena, p, s, weights, o, each * s.length);
  };
  Arena count{nullptr};
  Kept kept;
  lay_out(count, &kept);
  const int threads = threads_for(o.threads, tiles);
  const Buffer memory(threads * count.used * 4);
  parallel_for(threads, tiles, [&](int64_t begin, int64_t end, int thread) {
    [[maybe_unused]] const typename Op::Session session{};
    Arena arena{memory.floats() + thread * count.used};
    Kept k;
    const Tile<Op> tile = lay_out(arena, &k);
    for (int64_t t = begin; t < end; t++) {
      const int64_t first = t * each, sequences = units - first < each ? units - first : each;
      tile.gather(x, first, sequences, k.total1);
      for (int64_t l = 0; l < s.depth; l++) tile.layer(l, k, l ? &k : nullptr, sequences);
      tile.finish(k, sequences, out.as<float>() + first * s.latent);
    }
  });
}

}  // namespace

void triplane_project_forward(const TensorView& x, const ProjectTensors& parameters, const TensorView& out,
                              const ProjectOptions& options) {
#if defined(PVDM_ISA_AMX)
  if (parameters.qkv_weight.dtype != Dtype::bf16)
    return avx512bf16::triplane_project_forward(x, parameters, out, options);
  forward<Tiles>(x, parameters, out, options);
#else
#if defined(PVDM_ISA_AVX512BF16)
  if (parameters.qkv_weight.dtype == Dtype::bf16) return forward<Pairs>(x, parameters, out, options);
#endif
  forward<Floats>(x, parameters, out, options);
#endif
}

}  // namespace pvdm::PVDM_ISA
