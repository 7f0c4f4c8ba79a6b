// Bytes as bf16, which holds all of them exactly, as the first layer's products by tiles take them:
// rows of all channels after each other, so that the 3 C rows that a row of results needs are those
// of a factor. Behind the last one is room for a tile that begins in it.
#pragma once

#include "kernels/amx_tiles.h"
#include "kernels/conv_values.h"

namespace crpt::CRPT_ISA {
namespace {

constexpr int64_t kBandIn = 2 * kBandRows + 1;

inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Of the factor: 3 C, in whole tiles.
inline int64_t tile_rows(int64_t channels) { return round_up(3 * channels, kTileRows); }

// visit(bytes, i) for Step bytes at a time: behind the last of `count` are those that follow in
// memory, which products take times zero, or zeros where `end` comes before.
template <int64_t Step, typename Visit>
inline void for_bytes(const uint8_t* from, int64_t count, const uint8_t* end, const Visit& visit) {
  for (int64_t i = 0; i < count; i += Step) {
    if (end - from - i >= Step) {
      visit(from + i, i);
      continue;
    }
    uint8_t rest[Step] = {0};
    memcpy(rest, from + i, end - from - i);
    visit(rest, i);
  }
}

// Pairs of neighbours, (0, 1), (2, 3), ..., to a multiple of 16 of them; and the same from the
// second pair on.
inline void pair_bytes(const uint8_t* from, int64_t count, const uint8_t* end, uint32_t* pairs,
                       uint32_t* next) {
  for_bytes<32>(from, count, end, [&](const uint8_t* bytes, int64_t i) {
    Elements elements;
    widen_bytes(bytes, elements);
    store(elements, pairs + i / 2);
    store(elements, next + i / 2 - 1);
  });
}

// Even and odd columns apart, to a multiple of 32 of each; and the even ones from the second on.
inline void part_bytes(const uint8_t* from, int64_t count, const uint8_t* end, uint16_t* even,
                       uint16_t* odd, uint16_t* next) {
  for_bytes<64>(from, count, end, [&](const uint8_t* bytes, int64_t i) {
    Elements first, second, even_columns, odd_columns;
    widen_bytes(bytes, first);
    widen_bytes(bytes + 32, second);
    part(first, second, even_columns, odd_columns);
    store(even_columns, even + i / 2);
    store(odd_columns, odd + i / 2);
    store(even_columns, next + i / 2 - 1);
  });
}

// read(bytes of a row, row in the band) for those that `rows` results from row `begin` on need, in
// order [row, channel].
template <typename Read>
inline void for_band(const uint8_t* image, int64_t channels, int64_t height, int64_t width,
                     int64_t begin, int64_t rows, const Read& read) {
  for (int64_t r = 0; r <= 2 * rows; ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      read(image + (c * height + 2 * begin + r) * width, r * channels + c);
    }
  }
}

}  // namespace
}  // namespace crpt::CRPT_ISA
