// Launches every CUDA kernel once on small buffers from malloc, so that a sanitizer knows where they end. It uses
// neither Python nor PyTorch, whose threads aren't under test. test_cuda_sanitized.py builds it. Other tests compare
// results.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "cuda/attention.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

using namespace pvdm;

namespace {

const cuda::LaunchTarget here{0, nullptr};
constexpr Dtype f32 = Dtype::f32;

// Numbers between -1 and 1. The memory ends with the last one, and is never freed.
TensorView make(Dtype dtype, std::initializer_list<int64_t> sizes) {
  TensorView t;
  t.dtype = dtype;
  int64_t count = 1;
  for (int64_t size : sizes) t.size[t.dims++] = size;
  for (int i = t.dims - 1; i >= 0; i--) t.stride[i] = count, count *= t.size[i];
  t.data = malloc(static_cast<size_t>(count) * (dtype == f32 ? 4 : 2));
  static unsigned state = 1;
  for (int64_t i = 0; i < count; i++) {
    state = state * 1664525u + 1013904223u;
    const float value = static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
    if (dtype == f32) t.as<float>()[i] = value;
    if (dtype == Dtype::bf16) cuda::narrow(value, t.as<__nv_bfloat16>()[i]);
    if (dtype == Dtype::f16) cuda::narrow(value, t.as<__half>()[i]);
  }
  return t;
}

void expand(Dtype dtype, const Layout& l, int64_t channels) {
  const int64_t lattice = l.time * l.height * l.width;
  const auto workspace = make(f32, {cuda::triplane_expand_workspace(1, channels, l)});
  cuda::triplane_expand_forward(make(dtype, {1, l.tokens(), 3}), make(f32, {3, channels, 3}), make(f32, {3, channels}),
                                make(dtype, {1, lattice, channels}), workspace, l, here);
  cuda::triplane_expand_sums(make(dtype, {1, lattice, channels}), make(f32, {1, l.tokens(), channels}), workspace, l,
                             here);
}

void slice(Dtype dtype, const Layout& l, int64_t channels) {
  const int64_t lattice = l.time * l.height * l.width, lengths[] = {l.time, l.height, l.width};
  for (int plane = 0; plane < 3; plane++) {
    const int64_t length = lengths[plane];
    const auto sequences = make(dtype, {1, lattice / length, length + 1, channels});
    const auto x = make(dtype, {1, lattice, channels}), positions = make(f32, {length + 1, channels});
    cuda::triplane_slice_forward(x, make(f32, {channels}), positions, sequences, plane, l, here);
    cuda::triplane_slice_backward(sequences, x, positions,
                                  make(f32, {cuda::triplane_slice_workspace(1, channels, plane, l)}), plane, l, here);
  }
}

void norm(Dtype dtype, std::vector<int64_t> sizes, int64_t channels, bool scale_shift, int resample) {
  const Planes planes{sizes.data(), static_cast<int64_t>(sizes.size()) / 2};
  const int64_t tokens = planes.offset(planes.count), groups = 2;
  const int64_t after = resample > 0 ? 4 * tokens : resample < 0 ? tokens / 4 : tokens;
  const TensorView none, both = make(f32, {1, 2 * channels});
  const PlaneNormTensors tensors{make(dtype, {1, tokens, channels}), make(f32, {channels}), make(f32, {channels}),
                                 scale_shift ? both : none, make(f32, {1, planes.count, groups}),
                                 make(f32, {1, planes.count, groups})};
  const PlaneNormInputs in{tensors, planes, groups, scale_shift, resample};
  const auto workspace = make(f32, {cuda::plane_norm_workspace(1, channels, groups, planes)});
  const auto y = make(dtype, {1, after, channels});
  cuda::plane_norm_forward(in, y, workspace, 1e-5f, here);
  cuda::plane_norm_backward(in, {y, make(dtype, {1, tokens, channels}), make(f32, {channels}), make(f32, {channels}),
                                 scale_shift ? make(f32, {1, 2 * channels}) : none}, workspace, here);
}

// Several segments, or one with rotation (`rotate`), or one query per sequence (`single`).
void attention(Dtype dtype, std::vector<int64_t> offsets, int64_t width, bool rotate, bool single, bool tensor_cores) {
  const int64_t tokens = offsets.back(), queries = single ? 1 : tokens;
  const TensorView none, qkv = make(dtype, {1, 1, tokens, single ? 2 : 3, 2, width});
  const auto table = [&] { return rotate ? make(f32, {tokens, width}) : none; };
  const auto queried = [&] { return single ? make(dtype, {1, 1, 1, 2, width}) : none; };
  const cuda::AttentionInputs in{qkv, queried(), table(), table(), offsets.data(),
                                 static_cast<int64_t>(offsets.size()) - 1, 0.3f};
  const auto out = make(dtype, {1, 1, queries, 2, width}), lse = make(f32, {1, 1, 2, queries});
  (tensor_cores ? cuda::matrix_attention_forward : cuda::vector_attention_forward)(in, out, lse, here);
  const TensorView dqkv = make(dtype, {1, 1, tokens, single ? 2 : 3, 2, width});
  (tensor_cores ? cuda::matrix_attention_backward : cuda::vector_attention_backward)(
      in, {make(dtype, {1, 1, queries, 2, width}), out, lse, make(f32, {1, 1, 2, queries}), dqkv, queried()}, here);
}

// Two layers over the sequences of a plane, on two blocks.
void project(Dtype dtype, const Layout& l, int plane, const cuda::ProjectTile& tile, int64_t heads) {
  const int64_t lattice = l.time * l.height * l.width, length = l.length(plane), c = 24, inner = 16 * heads, hidden = 48;
  const ProjectTensors p{make(f32, {c}), make(f32, {length + 1, c}), make(f32, {2, c}), make(f32, {2, c}),
                         make(dtype, {2, 3 * inner, c}), make(dtype, {2, c, inner}), make(f32, {2, c}), make(f32, {2, c}),
                         make(f32, {2, c}), make(dtype, {2, hidden, c}), make(f32, {2, hidden}),
                         make(dtype, {2, c, hidden}), make(f32, {2, c}), make(dtype, {3, c}), make(f32, {3})};
  cuda::triplane_project_forward(make(f32, {1, lattice, c}), p, make(dtype, {1, lattice / length, 3}),
                                 make(f32, {2, tile.rows, c}), {l, plane, heads, 1e-5, 0}, tile, here);
}

}  // namespace

int main(int count, char** arguments) {
  emulation::schedule() = count > 1 ? atoi(arguments[1]) : 0;
  for (const Dtype dtype : {f32, Dtype::bf16, Dtype::f16}) {
    for (const int64_t channels : {5, 16}) {  // partial and whole packs
      expand(dtype, {9, 5, 2}, channels);
      expand(dtype, {1, 2, 9}, channels);
      slice(dtype, {3, 5, 7}, channels);
    }
    norm(dtype, {3, 5, 5, 7}, 6, false, 0);
    norm(dtype, {41, 1}, 16, true, 0);
    norm(dtype, {2, 2, 4, 2}, 16, true, 1);
    norm(dtype, {4, 6, 2, 2}, 16, true, -1);
    attention(dtype, {0, 3, 40}, 8, false, false, false);
    attention(dtype, {0, 20}, 72, true, false, false);
    attention(dtype, {0, 7}, 48, false, true, false);
    project(dtype, {3, 5, 4}, 0, {32, 3, 1, 32, 0.3f}, 2);
    project(dtype, {3, 2, 33}, 2, {64, 2, 2, 48, 0.3f}, 2);
    if (dtype == f32) continue;
    project(dtype, {2, 17, 6}, 1, {96, 4, 2, 16, 0.3f}, 3);
    project(dtype, {1, 9, 9}, 0, {112, 2, 1, 48, 0.3f}, 1);
    attention(dtype, {0, 3, 70}, 24, false, false, true);
    attention(dtype, {0, 80}, 64, true, false, true);
    attention(dtype, {0, 40}, 104, false, false, true);
  }
  puts("every kernel ran");
}
