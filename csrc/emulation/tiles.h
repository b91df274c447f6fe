// A host stand-in for AMX tiles: each instruction is a function, following Intel's manual (SDM, volume 2).
//
// What a CPU would refuse is an error: invalid shapes, tiles that aren't configured, shapes that don't match. This
// project also makes it an error to configure tiles before the last ones were released.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pvdm::emulation {

struct Tile {
  int rows, row_bytes;
  alignas(64) unsigned char data[16][64];
};
struct TileState {
  bool configured = false;
  Tile tiles[8];
};
inline TileState& tile_state() {
  static thread_local TileState state;
  return state;
}

inline void demand(bool held, const char* instruction, const char* what) {
  if (!held) throw std::runtime_error(std::string(instruction) + ": " + what + ".");
}

inline Tile& tile_at(int number, const char* instruction) {
  TileState& state = tile_state();
  demand(state.configured, instruction, "no tiles are configured");
  demand(number >= 0 && number < 8, instruction, "there are eight tiles");
  demand(state.tiles[number].rows > 0, instruction, "this tile is not configured");
  return state.tiles[number];
}

inline void ldtilecfg(const void* config) {
  const char* const name = "LDTILECFG";
  unsigned char bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  TileState& state = tile_state();
  demand(!state.configured, name, "the tiles configured before were not released");
  demand(bytes[0] == 1, name, "the palette must be 1");
  demand(bytes[1] == 0, name, "the first row must be 0");
  for (int i = 2; i < 64; i++)
    demand((i >= 16 && i < 32) || (i >= 48 && i < 56) || bytes[i] == 0, name, "reserved bytes must be 0");
  for (int i = 0; i < 8; i++) {
    const int rows = bytes[48 + i], row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    demand(rows <= 16 && row_bytes <= 64, name, "a tile has at most 16 rows of 64 bytes");
    demand(!rows == !row_bytes, name, "a tile has both rows and bytes, or neither");
    state.tiles[i] = {rows, row_bytes, {}};
  }
  state.configured = true;
}

inline void tilerelease() { tile_state() = {}; }

inline void tilezero(int number) {
  Tile& tile = tile_at(number, "TILEZERO");
  std::memset(tile.data, 0, sizeof tile.data);
}

inline void tileloadd(int number, const void* from, int64_t stride) {
  Tile& tile = tile_at(number, "TILELOADD");
  std::memset(tile.data, 0, sizeof tile.data);
  for (int r = 0; r < tile.rows; r++)
    std::memcpy(tile.data[r], static_cast<const char*>(from) + r * stride, static_cast<size_t>(tile.row_bytes));
}

inline void tilestored(int number, void* to, int64_t stride) {
  const Tile& tile = tile_at(number, "TILESTORED");
  for (int r = 0; r < tile.rows; r++)
    std::memcpy(static_cast<char*>(to) + r * stride, tile.data[r], static_cast<size_t>(tile.row_bytes));
}

// One row of a product. Low and high halves of the words are summed separately with fused multiply-adds, then added.
__attribute__((noipa)) inline void tile_row(float* sum, const uint32_t* a, const Tile& b) {
  float low[16] = {}, high[16] = {};
  const auto number = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  for (int k = 0; k < b.rows; k++) {
    uint32_t right[16];
    std::memcpy(right, b.data[k], sizeof right);
    for (int n = 0; n < 16; n++) low[n] = __builtin_fmaf(number(a[k] << 16), number(right[n] << 16), low[n]);
    for (int n = 0; n < 16; n++)
      high[n] = __builtin_fmaf(number(a[k] & 0xffff0000u), number(right[n] & 0xffff0000u), high[n]);
  }
  for (int n = 0; n < 16; n++) sum[n] += low[n] + high[n];
}

inline void tdpbf16ps(int sum_number, int a_number, int b_number) {
  const char* const name = "TDPBF16PS";
  Tile& sum = tile_at(sum_number, name);
  const Tile &a = tile_at(a_number, name), &b = tile_at(b_number, name);
  demand(sum_number != a_number && sum_number != b_number && a_number != b_number, name, "the tiles must be three");
  demand(sum.row_bytes % 4 == 0 && a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, name, "rows must be whole words");
  demand(sum.rows == a.rows && sum.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows, name, "the shapes don't match");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // denormals count as zero, round to nearest, no exceptions
  for (int m = 0; m < sum.rows; m++) {
    uint32_t left[16];
    float row[16];
    std::memcpy(left, a.data[m], sizeof left);
    std::memcpy(row, sum.data[m], sizeof row);
    tile_row(row, left, b);
    std::memcpy(sum.data[m], row, static_cast<size_t>(sum.row_bytes));
  }
  _mm_setcsr(before);
}

}  // namespace pvdm::emulation
