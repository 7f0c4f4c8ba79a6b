#include "kernels/conv_pixels.h"
#include "kernels/parallel.h"

namespace crpt::CRPT_ISA {
namespace {

// Of the first layer, for one channel: pairs of columns 0 and 1 for each of three rows; of column 2
// the pair of rows 0 and 1, and row 2 with nothing.
constexpr int64_t kPixelPairs = 5;
struct PixelWeights {
  Pairs weights[kPixelPairs][2];
};

void pack_pixels(const ConvLayer& layer, int64_t channel, PixelWeights& packed) {
  for (int64_t out = 0; out < kConvChannels; ++out) {
    const auto at = [&](int64_t dy, int64_t dx) {
      return weight_at(layer, out, channel, dy, dx) / 255;
    };
    const uint32_t pairs[kPixelPairs] = {pair_of(at(0, 0), at(0, 1)), pair_of(at(1, 0), at(1, 1)),
                                         pair_of(at(2, 0), at(2, 1)), pair_of(at(0, 2), at(1, 2)),
                                         pair_of(at(2, 2), 0)};
    for (int64_t j = 0; j < kPixelPairs; ++j) {
      packed.weights[j][out / kLanes][out % kLanes] = pairs[j];
    }
  }
}

struct Relu {
  BFloat16* out;
  void operator()(int64_t pixel, const Floats& low, const Floats& high) const {
    store_relu(low, high, out + pixel * kPixel);
  }
};

// One row of the first layer's result: `in` its three rows of pairs of the first channel, `columns`
// the pairs of rows 0 and 1 in even columns; those of the next channel lie `in_channel` and
// `columns_channel` behind.
template <int P>
inline void pixel_tile(const uint32_t* in, int64_t pitch, int64_t in_channel,
                       const uint32_t* columns, int64_t columns_channel, int64_t channels,
                       const PixelWeights* packed, const Begin& begin, int64_t x,
                       const Relu& finish) {
  Floats low[P], high[P];
  for (int p = 0; p < P; ++p) {
    low[p] = begin.low;
    high[p] = begin.high;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const uint32_t* rows = in + c * in_channel + x;
    const uint32_t* starts[kPixelPairs] = {rows, rows + pitch, rows + 2 * pitch,
                                           columns + c * columns_channel + x + 1,
                                           rows + 2 * pitch + 1};
    for (int64_t j = 0; j < kPixelPairs; ++j) {
      const Pairs weights_low = packed[c].weights[j][0], weights_high = packed[c].weights[j][1];
      const uint32_t* pairs = starts[j];
#pragma GCC unroll 14
      for (int p = 0; p < P; ++p) {
        Pairs pixel;
        spread(pairs + p, pixel);
        add_products(pixel, weights_low, low[p]);
        add_products(pixel, weights_high, high[p]);
      }
    }
  }
  for (int p = 0; p < P; ++p) finish(x + p, low[p], high[p]);
}

// (row 0's, row 1's) of each even column; whole vectors of them, to `pitch`, more than there are.
inline int64_t columns_pitch(int64_t width) {
  return (pixel_pitch(width) + kLanes - 1) / kLanes * kLanes;
}
inline void pair_columns(const uint32_t* first, const uint32_t* second, int64_t pitch,
                         uint32_t* out) {
  for (int64_t i = 0; i < pitch; i += kLanes) {
    Pairs even, odd;
    load(first + i, even);
    load(second + i, odd);
    store((even & 0xFFFFu) | odd << 16, out + i);
  }
}

struct Workspace {
  uint32_t *pairs, *columns;
  BFloat16* between[2];  // what a layer gives that is not kept
};

class Forward {
 public:
  explicit Forward(const ConvForwardArgs& args)
      : a_(args), windows_(args.layer_count), begins_(args.layer_count), pixels_(args.channels) {
    for (int64_t c = 0; c < a_.channels; ++c) pack_pixels(a_.layers[0], c, pixels_.get()[c]);
    for (int64_t l = 0; l < a_.layer_count; ++l) {
      const ConvLayer& layer = a_.layers[l];
      load(layer.bias, begins_.get()[l].low);
      load(layer.bias + kLanes, begins_.get()[l].high);
      if (l == 0) continue;
      pack_window(ForwardWeights{layer}, windows_.get()[l]);
    }
  }

  int64_t workspace() const {
    return PixelBand::size(a_.channels, a_.width) + a_.channels * columns_pitch(a_.width) +
           2 * image(0) / 2;
  }
  // Elements of a layer's result for one image.
  int64_t image(int64_t layer) const {
    return conv_size(a_.height, layer) * conv_size(a_.width, layer) * kPixel;
  }

  void run(int64_t b, uint32_t* memory) const {
    Workspace work;
    work.pairs = memory;
    work.columns = work.pairs + PixelBand::size(a_.channels, a_.width);
    work.between[0] =
        reinterpret_cast<BFloat16*>(work.columns + a_.channels * columns_pitch(a_.width));
    work.between[1] = work.between[0] + image(0);
    const BFloat16* in = nullptr;
    for (int64_t l = 0; l < a_.layer_count; ++l) {
      BFloat16* kept = a_.layers[l].out;
      BFloat16* out = kept == nullptr ? work.between[l % 2] : kept + b * image(l);
      if (l == 0) {
        first(a_.images + b * a_.channels * a_.height * a_.width, work, out);
      } else {
        next(l, in, out);
      }
      in = out;
    }
  }

 private:
  void first(const uint8_t* image, const Workspace& work, BFloat16* out) const {
    const int64_t height = conv_size(a_.height, 0), width = conv_size(a_.width, 0);
    const int64_t pitch = pixel_pitch(a_.width), columns = columns_pitch(a_.width);
    PixelBand band(work.pairs, a_.channels, a_.height, a_.width);
    for (int64_t y = 0; y < height; y += kBandRows) {
      const int64_t rows = height - y < kBandRows ? height - y : kBandRows;
      band.read(image, y, rows);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < a_.channels; ++c) {
          pair_columns(band.row(c, 2 * r), band.row(c, 2 * r + 1), columns,
                       work.columns + c * columns);
        }
        const Relu relu{out + (y + r) * width * kPixel};
        const uint32_t* in = band.row(0, 2 * r);
        for_tiles(width, [&](auto tile, int64_t x) {
          pixel_tile<decltype(tile)::size>(in, pitch, (2 * kBandRows + 1) * pitch, work.columns,
                                           columns, a_.channels, pixels_.get(), begins_.get()[0], x,
                                           relu);
        });
      }
    }
  }

  void next(int64_t layer, const BFloat16* in, BFloat16* out) const {
    const int64_t height = conv_size(a_.height, layer), width = conv_size(a_.width, layer);
    const int64_t row = (width + 2) * kPixel;
    for (int64_t y = 0; y < height; ++y) {
      window_row(in + y * row, row, 0, 3, windows_.get()[layer], begins_.get()[layer], width,
                 Relu{out + y * width * kPixel});
    }
  }

  const ConvForwardArgs& a_;
  Scratch<Window> windows_;
  Scratch<Begin> begins_;
  Scratch<PixelWeights> pixels_;
};

}  // namespace

void conv_forward(const ConvForwardArgs& args) {
  if (args.batch == 0) return;
  const int threads = static_cast<int>(args.threads < args.batch ? args.threads : args.batch);
  const Forward forward(args);
  const int64_t size = (forward.workspace() + kLanes - 1) / kLanes * kLanes;
  const Scratch<uint32_t> memory(threads * size);
  for_each_item(args.batch, threads, [&](int64_t image, int64_t worker) {
    forward.run(image, memory.get() + worker * size);
  });
}

}  // namespace crpt::CRPT_ISA
