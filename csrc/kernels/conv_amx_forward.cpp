#include "kernels/conv_amx_pixels.h"
#include "kernels/conv_amx_window.h"
#include "kernels/parallel.h"
#include "kernels/transpose_tile.h"

namespace crpt::CRPT_ISA {
namespace {

// The first layer's products have the weights first and pixels second: sums[o][x]. Rows of the
// second are channels of three rows of bytes, 16 pairs of columns long; from the pair on that a
// result begins with, and from the next, of which its third column is the first.
struct PixelTile {
  Pairs weights[2][2][kTileRows];  // [pair, half of the channels out, channel out]
};

class PixelWindow {
 public:
  PixelWindow(const ConvLayer& layer, int64_t channels)
      : count_(tile_rows(channels) / kTileRows), tiles_(count_) {
    memset(tiles_.get(), 0, count_ * sizeof(PixelTile));
    for (int64_t row = 0; row < 3 * channels; ++row) {
      PixelTile& tile = tiles_.get()[row / kTileRows];
      const int64_t c = row % channels, dy = row / channels, pair = row % kTileRows;
      for (int64_t o = 0; o < kConvChannels; ++o) {
        const int64_t half = o / kTileRows, m = o % kTileRows;
        const auto at = [&](int64_t dx) { return weight_at(layer, o, c, dy, dx) / 255; };
        tile.weights[0][half][m][pair] = pair_of(at(0), at(1));
        tile.weights[1][half][m][pair] = pair_of(at(2), 0);
      }
    }
    for (int64_t o = 0; o < kConvChannels; ++o) {
      for (int64_t x = 0; x < kTileRows; ++x) bias_[o][x] = layer.bias[o];
    }
  }
  // sums[o][x] for two tiles of a row's results, or the first alone. `in` and `next` are the first
  // of the rows that they need, from their pair on and from the one behind it.
  void multiply_two(const uint32_t* in, const uint32_t* next, int64_t pitch, float* sums) const {
    begin<0, 2>();
    begin<1, 3>();
    const PixelTile* tile = tiles_.get();
    for (int64_t i = 0; i < count_;
         ++i, ++tile, in += kTileRows * pitch, next += kTileRows * pitch) {
      const Factor weights{tile->weights[0][0], tile->weights[0][1], kTileBytes};
      const Factor next_weights{tile->weights[1][0], tile->weights[1][1], kTileBytes};
      multiply_tiles(weights, {in, in + kLanes, pitch * 4});
      multiply_tiles(next_weights, {next, next + kLanes, pitch * 4});
    }
    end<0, 2>(sums);
    end<1, 3>(sums + kConvChannels * kLanes);
  }
  void multiply_one(const uint32_t* in, const uint32_t* next, int64_t pitch, float* sums) const {
    begin<0, 2>();
    const PixelTile* tile = tiles_.get();
    for (int64_t i = 0; i < count_;
         ++i, ++tile, in += kTileRows * pitch, next += kTileRows * pitch) {
      tile_load<4>(tile->weights[0][0], kTileBytes);
      tile_load<5>(tile->weights[0][1], kTileBytes);
      tile_load<6>(in, pitch * 4);
      tile_multiply<0, 4, 6>();
      tile_multiply<2, 5, 6>();
      tile_load<4>(tile->weights[1][0], kTileBytes);
      tile_load<5>(tile->weights[1][1], kTileBytes);
      tile_load<6>(next, pitch * 4);
      tile_multiply<0, 4, 6>();
      tile_multiply<2, 5, 6>();
    }
    end<0, 2>(sums);
  }

 private:
  template <int First, int Second>
  void begin() const {
    tile_load<First>(bias_[0], kTileBytes);
    tile_load<Second>(bias_[kTileRows], kTileBytes);
  }
  template <int Low, int High>
  static void end(float* sums) {
    tile_store<Low>(sums, kTileBytes);
    tile_store<High>(sums + kTileRows * kLanes, kTileBytes);
  }

  int64_t count_;
  Scratch<PixelTile> tiles_;
  alignas(64) float bias_[kConvChannels][kTileRows];
};

// From sums[o][x] the pixels of a row.
inline void finish_pixels(const float* sums, int64_t count, BFloat16* out) {
  TileRow pixels[kTile];
  for (int64_t o = 0; o < kConvChannels; o += 2) {
    Floats first, second;
    load(sums + o * kLanes, first);
    load(sums + (o + 1) * kLanes, second);
    relu(first);
    relu(second);
    round_pairs(first, second, pixels[o / 2]);
  }
  transpose_tile(pixels);
  for (int64_t x = 0; x < count; ++x) store(pixels[x], out + x * kConvChannels);
}

// Neighbours of a row from sums[x][o].
inline void finish_row(const float* sums, int64_t count, BFloat16* out) {
  for (int64_t i = 0; i < count * kConvChannels; i += kConvChannels) {
    Floats low, high;
    load(sums + i, low);
    load(sums + i + kLanes, high);
    store_relu(low, high, out + i);
  }
}

class Forward {
 public:
  explicit Forward(const ConvForwardArgs& args)
      : a_(args),
        pixels_(args.layers[0], args.channels),
        windows_(args.layer_count),
        pitch_(round_up(conv_size(args.width, 0) + 1, kLanes)) {
    for (int64_t l = 1; l < a_.layer_count; ++l) {
      pack_tiles(ForwardWeights{a_.layers[l]}, windows_.get()[l]);
    }
  }

  // Bytes, a multiple of a cache line's.
  int64_t workspace() const { return 2 * 4 * band() + 2 * 2 * between(); }

  void run(int64_t b, char* memory) const {
    const TilesInUse tiles;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(memory);
    BFloat16* room = reinterpret_cast<BFloat16*>(pairs + 2 * band());
    const BFloat16* in = nullptr;
    for (int64_t l = 0; l < a_.layer_count; ++l) {
      BFloat16* const kept = a_.layers[l].out;
      BFloat16* const spare = room + l % 2 * between();
      BFloat16* out = kept == nullptr ? spare : kept + b * image(l);
      if (l == 0) {
        first(a_.images + b * a_.channels * a_.height * a_.width, pairs, out);
      } else {
        next(l, in, out);
      }
      // An image too small for a block is read beyond its end.
      if (kept != nullptr && l + 1 < a_.layer_count && reads(l) > pixels(l)) {
        memcpy(spare, out, image(l) * sizeof(BFloat16));
        out = spare;
      }
      in = out;
    }
  }

 private:
  int64_t height(int64_t layer) const { return conv_size(a_.height, layer); }
  int64_t width(int64_t layer) const { return conv_size(a_.width, layer); }
  int64_t pixels(int64_t layer) const { return height(layer) * width(layer); }
  int64_t image(int64_t layer) const { return pixels(layer) * kConvChannels; }
  int64_t reads(int64_t layer) const { return window_reads(height(layer), width(layer)); }
  int64_t between() const { return reads(0) * kConvChannels; }
  // Pairs of a band, with room for what is stored one before it.
  int64_t band() const { return (kBandIn * a_.channels + kTileRows) * pitch_ + kLanes; }

  void first(const uint8_t* image, uint32_t* pairs, BFloat16* out) const {
    const int64_t height = this->height(0), width = this->width(0);
    const uint8_t* const end = a_.images + a_.batch * a_.channels * a_.height * a_.width;
    uint32_t* const next = pairs + band() + kLanes;
    for (int64_t y = 0; y < height; y += kBandRows) {
      const int64_t rows = height - y < kBandRows ? height - y : kBandRows;
      for_band(image, a_.channels, a_.height, a_.width, y, rows,
               [&](const uint8_t* bytes, int64_t row) {
                 pair_bytes(bytes, a_.width, end, pairs + row * pitch_, next + row * pitch_);
               });
      if (y == 0) {
        // What a tile reads behind the last row it multiplies by 0: it must be finite.
        const int64_t behind = (2 * rows + 1) * a_.channels * pitch_;
        memset(pairs + behind, 0, kTileRows * pitch_ * sizeof(uint32_t));
        memset(next + behind, 0, kTileRows * pitch_ * sizeof(uint32_t));
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t begin = 2 * r * a_.channels * pitch_;
        first_row(pairs + begin, next + begin, out + (y + r) * width * kConvChannels);
      }
    }
  }

  void first_row(const uint32_t* pairs, const uint32_t* next, BFloat16* out) const {
    alignas(64) float sums[2][kConvChannels * kLanes];
    const int64_t width = this->width(0);
    for (int64_t x = 0; x < width; x += 2 * kLanes) {
      const int64_t left = width - x;
      BFloat16* const to = out + x * kConvChannels;
      if (left > kLanes) {
        pixels_.multiply_two(pairs + x, next + x, pitch_, sums[0]);
        finish_pixels(sums[1], left < 2 * kLanes ? left - kLanes : kLanes,
                      to + kLanes * kConvChannels);
      } else {
        pixels_.multiply_one(pairs + x, next + x, pitch_, sums[0]);
      }
      finish_pixels(sums[0], left < kLanes ? left : kLanes, to);
    }
  }

  void next(int64_t layer, const BFloat16* in, BFloat16* out) const {
    const int64_t width = this->width(layer);
    window_image(in, height(layer) + 2, width + 2, width, windows_.get()[layer],
                 a_.layers[layer].bias,
                 [&](int64_t y, int64_t x, int64_t count, const float* sums) {
                   finish_row(sums, count, out + (y * width + x) * kConvChannels);
                 });
  }

  const ConvForwardArgs& a_;
  PixelWindow pixels_;
  Scratch<TileWindow> windows_;
  int64_t pitch_;
};

}  // namespace

void conv_forward(const ConvForwardArgs& args) {
  if (args.batch == 0) return;
  const int threads = static_cast<int>(args.threads < args.batch ? args.threads : args.batch);
  const Forward forward(args);
  const int64_t size = forward.workspace();
  const Scratch<char> memory(threads * size);
  for_each_item(args.batch, threads, [&](int64_t image, int64_t worker) {
    forward.run(image, memory.get() + worker * size);
  });
}

}  // namespace crpt::CRPT_ISA
