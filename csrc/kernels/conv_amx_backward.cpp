#include "kernels/conv_amx_layout.h"
#include "kernels/conv_gradients.h"

namespace crpt::CRPT_ISA {
namespace {

// Pixels for which all taps are taken before the next: what they need fits the first-level cache.
constexpr int64_t kBand = 256;
inline void zero_pixels(BFloat16* pixels, int64_t count) {
  memset(pixels, 0, count * kConvChannels * sizeof(BFloat16));
}

class Backward {
 public:
  explicit Backward(const ConvBackwardArgs& args)
      : a_(args),
        windows_(args.layer_count),
        layout_{args.channels, args.layer_count, conv_size(args.height, 0),
                conv_size(args.width, 0)} {
    for (int64_t l = 1; l < a_.layer_count; ++l) {
      pack_tiles(BackwardWeights{a_.layers[l]}, windows_.get()[l]);
    }
  }

  // Floats of all layers' gradients as they are summed up: those of the first layer's weight as
  // [dx, dy, channel, o], whole tiles of the rows (dy, channel).
  int64_t sums() const {
    int64_t total = first_sums();
    for (int64_t l = 1; l < a_.layer_count; ++l) total += conv_gradients(a_.channels, l);
    return total;
  }
  // The same as the arguments have them.
  void put(const float* sums) const {
    float* out = a_.gradients;
    for (int64_t c = 0; c < a_.channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap, out += kConvChannels) {
        const float* from =
            sums + (tap % 3 * tile_rows(a_.channels) + tap / 3 * a_.channels + c) * kConvChannels;
        // Pixels were counted as bytes.
        for (int64_t o = 0; o < kConvChannels; ++o) out[o] = from[o] / 255;
      }
    }
    // Behind it lies the bias's, and then what other layers have, in order.
    const int64_t bias = first_sums() - kConvChannels;
    memcpy(out, sums + bias, (this->sums() - bias) * sizeof(float));
  }
  // Bytes, a multiple of a cache line's.
  int64_t workspace() const { return layout_.lay_out(nullptr, nullptr); }

  // Adds the gradients from one image.
  void run(int64_t b, char* memory, float* sums) const {
    const TilesInUse tiles;
    Workspace work;
    layout_.lay_out(memory, &work);
    const int64_t last = a_.layer_count - 1;
    BFloat16 *grad = work.grad[0], *before = work.grad[1];
    begin(a_.grad + b * layout_.image(last), out(last, b), grad, last);
    sums += this->sums();
    for (int64_t l = last; l > 0; --l) {
      sums -= conv_gradients(a_.channels, l);
      weights(l, grad, out(l - 1, b), work, sums);
      in_gradient(l, grad, out(l - 1, b), before);
      BFloat16* const done = grad;
      grad = before;
      before = done;
    }
    sums -= first_sums();
    pixel_weights(grad, a_.images + b * a_.channels * a_.height * a_.width, work, sums);
  }

 private:
  const BFloat16* out(int64_t layer, int64_t b) const {
    return a_.layers[layer].out + b * layout_.image(layer);
  }
  int64_t first_sums() const { return (3 * tile_rows(a_.channels) + 1) * kConvChannels; }

  // Zeros around a layer's gradient, to the end of all that is read of it.
  void clear_margins(BFloat16* grad, int64_t layer) const {
    const int64_t pitch = layout_.pitch(layer), width = layout_.width(layer);
    const int64_t first = layout_.inside(layer), right = pitch - width;
    zero_pixels(grad, first);
    for (int64_t y = 0; y + 1 < layout_.height(layer); ++y) {
      zero_pixels(grad + (first + y * pitch + width) * kConvChannels, right);
    }
    const int64_t end = first + (layout_.height(layer) - 1) * pitch + width;
    zero_pixels(grad + end * kConvChannels, layout_.reads(layer) - end);
  }
  BFloat16* pixel(BFloat16* grad, int64_t layer, int64_t y, int64_t x) const {
    return grad + (layout_.inside(layer) + y * layout_.pitch(layer) + x) * kConvChannels;
  }

  // The gradient of the last layer's sums.
  void begin(const BFloat16* grad, const BFloat16* given, BFloat16* padded, int64_t layer) const {
    clear_margins(padded, layer);
    const int64_t width = layout_.width(layer);
    for (int64_t y = 0; y < layout_.height(layer); ++y) {
      BFloat16* to = pixel(padded, layer, y, 0);
      for (int64_t i = 0; i < width * kConvChannels; i += kConvChannels) {
        Elements g;
        load(grad + y * width * kConvChannels + i, g);
        pass_relu(given + y * width * kConvChannels + i, g);
        store(g, to + i);
      }
    }
  }

  // From the gradient of a layer's sums that of the sums of the layer before it, which gave
  // `given`.
  void in_gradient(int64_t layer, const BFloat16* grad, const BFloat16* given,
                   BFloat16* before) const {
    constexpr float no_bias[kConvChannels] = {0};
    const int64_t width = layout_.width(layer - 1);
    clear_margins(before, layer - 1);
    window_image(grad, layout_.height(layer) + 2 * kMargin, layout_.pitch(layer), width,
                 windows_.get()[layer], no_bias,
                 [&](int64_t y, int64_t x, int64_t count, const float* sums) {
                   const BFloat16* mask = given + (y * width + x) * kConvChannels;
                   BFloat16* to = pixel(before, layer - 1, y, x);
                   for (int64_t i = 0; i < count * kConvChannels; i += kConvChannels) {
                     Floats low, high;
                     load(sums + i, low);
                     load(sums + i + kLanes, high);
                     store_gradient(low, high, mask + i, to + i);
                   }
                 });
  }

  void weights(int64_t layer, const BFloat16* grad, const BFloat16* in, const Workspace& work,
               float* sums) const {
    const int64_t pitch = layout_.pitch(layer), stride = layout_.stride(layer),
                  steps = layout_.steps(layer);
    transpose_pixels(grad + layout_.inside(layer) * kConvChannels, steps, work.transposed, stride,
                     sums + kConvChannels * kGradRow);
    pair_pixels(layer, in, work);
    for (int64_t begin = 0; begin < steps; begin += kBand) {
      const int64_t count = steps - begin < kBand ? steps - begin : kBand;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t seen = begin + tap / 3 * pitch + tap % 3;
        multiply_tap(work.transposed + begin, stride,
                     (seen % 2 == 0 ? work.even_pairs : work.odd_pairs) + seen / 2 * 2, count,
                     sums + tap * kConvChannels);
      }
    }
  }

  // Pairs of a layer's input from even pixels on and from odd ones, with zeros behind each row and
  // the last.
  void pair_pixels(int64_t layer, const BFloat16* in, const Workspace& work) const {
    const int64_t pitch = layout_.pitch(layer), width = layout_.width(layer) + 2;
    Pairs *even = work.even_pairs, *odd = work.odd_pairs;
    for (int64_t y = 0; y < layout_.height(layer) + 2; ++y, even += pitch, odd += pitch) {
      pair_row(in + y * width * kConvChannels, width, pitch / 2, even);
      pair_row(in + (y * width + 1) * kConvChannels, width - 1, pitch / 2, odd);
    }
    // Never negative: pitch is width + 2 or + 3 here, and even as steps are.
    const int64_t rest = layout_.pairs(layer) * 2 - (even - work.even_pairs);
    memset(even, 0, rest * sizeof(Pairs));
    memset(odd, 0, rest * sizeof(Pairs));
  }

  void pixel_weights(BFloat16* grad, const uint8_t* image, const Workspace& work,
                     float* sums) const {
    const int64_t columns = layout_.columns(), channels = a_.channels;
    const int64_t height = layout_.height(0), width = layout_.width(0);
    const int64_t count = round_up(width, kStep), tiles = tile_rows(channels);
    bias_sums(grad, sums + 3 * tiles * kConvChannels);
    const uint8_t* const end = a_.images + a_.batch * channels * a_.height * a_.width;
    for (int64_t y = 0; y < height; y += kBandRows) {
      const int64_t rows = height - y < kBandRows ? height - y : kBandRows;
      for_band(image, channels, a_.height, a_.width, y, rows,
               [&](const uint8_t* bytes, int64_t row) {
                 const int64_t at = row * columns;
                 part_bytes(bytes, a_.width, end, work.columns[0] + at, work.columns[1] + at,
                            work.columns[2] + at);
               });
      // Products with zeros behind the last column: only finite numbers give none.
      work.columns[2][(2 * rows + 1) * channels * columns - 1] = 0;
      for (int64_t r = 0; r < rows; ++r) {
        pair_row(pixel(grad, 0, y + r, 0), width, count / 2, work.even_pairs + r * count);
      }
      for (int64_t dx = 0; dx < 3; ++dx) {
        for (int64_t row = 0; row < tiles; row += 2 * kTileRows) {
          const uint16_t* const from = work.columns[dx] + row * columns;
          float* const to = sums + (dx * tiles + row) * kConvChannels;
          const auto multiply = tiles - row > kTileRows ? multiply_pixels<2> : multiply_pixels<1>;
          multiply(from, columns, 2 * channels * columns, work.even_pairs, rows, count, to);
        }
      }
    }
  }

  void bias_sums(BFloat16* grad, float* bias) const {
    const Pairs ones = Pairs{} + 0x3F803F80u;
    Floats low, high;
    load(bias, low);
    load(bias + kLanes, high);
    for (int64_t y = 0; y < layout_.height(0); ++y) {
      // Zeros on the right make a pair of the last pixel.
      const BFloat16* row = pixel(grad, 0, y, 0);
      for (int64_t x = 0; x < layout_.width(0); x += 2) {
        Elements first, second;
        load(row + x * kConvChannels, first);
        load(row + (x + 1) * kConvChannels, second);
        Pairs pair_low, pair_high;
        interleave(first, second, pair_low, pair_high);
        add_products(pair_low, ones, low);
        add_products(pair_high, ones, high);
      }
    }
    store(low, bias);
    store(high, bias + kLanes);
  }

  const ConvBackwardArgs& a_;
  Scratch<TileWindow> windows_;
  GradientLayout layout_;
};

}  // namespace

void conv_backward(const ConvBackwardArgs& args) {
  const Backward backward(args);
  const int64_t size = backward.sums();
  const Scratch<float> sums(size);
  sum_over_images(
      args.batch, args.threads, size, backward.workspace(),
      [&](int64_t image, char* memory, float* own) { backward.run(image, memory, own); },
      sums.get());
  backward.put(sums.get());
}

}  // namespace crpt::CRPT_ISA
