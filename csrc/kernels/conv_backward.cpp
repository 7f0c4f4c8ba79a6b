#include "kernels/conv_gradients.h"
#include "kernels/conv_pixels.h"

namespace crpt::CRPT_ISA {
namespace {

// Channels of the gradient in a tile of the weights': 8 x 3 sums, 3 vectors of pixels and a pair of
// gradients fill 28 registers.
constexpr int64_t kTileChannels = 8;

inline int64_t padded_row(int64_t width) { return (width + 2 * kMargin) * kPixel; }

// Of the weights from kTileChannels channels of the gradient and three neighbours of 16 channels
// in: sums[o][dx][lane] += the products over `rows` of `pairs` pairs of pixels.
inline void weight_tile(const Pairs* in, int64_t in_row, const uint32_t* grad, int64_t grad_row,
                        int64_t rows, int64_t pairs, float* sums) {
  Floats sum[kTileChannels][3];
  for (int64_t o = 0; o < kTileChannels; ++o) {
    for (int64_t dx = 0; dx < 3; ++dx) load(sums + (o * 9 + dx) * kConvChannels, sum[o][dx]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Pairs* x = in + r * in_row;
    const uint32_t* g = grad + r * grad_row;
    for (int64_t j = 0; j < pairs; ++j, x += 4, g += kConvChannels) {
      const Pairs left = x[0], middle = x[2], right = x[4];
#pragma GCC unroll 8
      for (int64_t o = 0; o < kTileChannels; ++o) {
        Pairs pair;
        spread(g + o, pair);
        add_products(left, pair, sum[o][0]);
        add_products(middle, pair, sum[o][1]);
        add_products(right, pair, sum[o][2]);
      }
    }
  }
  for (int64_t o = 0; o < kTileChannels; ++o) {
    for (int64_t dx = 0; dx < 3; ++dx) store(sum[o][dx], sums + (o * 9 + dx) * kConvChannels);
  }
}

// The same of the first layer, from one channel of pixels: sums[dy][dx][o]. `even` and `odd` are
// its columns, three rows of them to begin with; a row of results is two of theirs on.
inline void pixel_weight_tile(const uint16_t* even, const uint16_t* odd, int64_t pitch,
                              const Pairs* grad, int64_t grad_row, int64_t rows, int64_t pairs,
                              float* sums) {
  Floats low[9], high[9];
  for (int64_t tap = 0; tap < 9; ++tap) {
    load(sums + tap * kConvChannels, low[tap]);
    load(sums + tap * kConvChannels + kLanes, high[tap]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t *e = even + 2 * r * pitch, *o = odd + 2 * r * pitch;
    const Pairs* g = grad + r * grad_row;
    for (int64_t j = 0; j < pairs; ++j, e += 2, o += 2, g += 2) {
      const Pairs grad_low = g[0], grad_high = g[1];
#pragma GCC unroll 3
      for (int64_t dy = 0; dy < 3; ++dy) {
        Pairs left, middle, right;
        spread(e + dy * pitch, left);
        spread(o + dy * pitch, middle);
        spread(e + dy * pitch + 1, right);
        add_products(left, grad_low, low[3 * dy]);
        add_products(left, grad_high, high[3 * dy]);
        add_products(middle, grad_low, low[3 * dy + 1]);
        add_products(middle, grad_high, high[3 * dy + 1]);
        add_products(right, grad_low, low[3 * dy + 2]);
        add_products(right, grad_high, high[3 * dy + 2]);
      }
    }
  }
  for (int64_t tap = 0; tap < 9; ++tap) {
    store(low[tap], sums + tap * kConvChannels);
    store(high[tap], sums + tap * kConvChannels + kLanes);
  }
}

// (row[p], row[p + 1]) for p = 0, step, 2 step, ... below count; the last of all has no partner.
inline void pair_pixels(const BFloat16* row, int64_t count, int64_t step, Pairs* out) {
  for (int64_t p = 0; p < count; p += step, out += 2) {
    Elements first, second{};
    load(row + p * kPixel, first);
    if (p + 1 < count) load(row + (p + 1) * kPixel, second);
    interleave(first, second, out[0], out[1]);
  }
}

// Even and odd columns apart, and behind the last one zeros for a pair that begins in it.
inline void part_columns(const uint32_t* pairs, int64_t count, uint16_t* __restrict even,
                         uint16_t* __restrict odd) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    even[i] = static_cast<uint16_t>(pairs[i]);
    odd[i] = static_cast<uint16_t>(pairs[i] >> 16);
  }
  for (int64_t i = count; i < count + 2; ++i) even[i] = odd[i] = 0;
}

struct Workspace {
  BFloat16* grad[2];  // of a layer's sums and of the one's before it, with margins
  Pairs *in, *out;    // pairs of pixels, and of gradients, of a band
  uint32_t* pixels;
  uint16_t *even, *odd;
};

class Backward {
 public:
  explicit Backward(const ConvBackwardArgs& args)
      : a_(args),
        windows_(args.layer_count),
        height_(conv_size(args.height, 0)),
        width_(conv_size(args.width, 0)) {
    for (int64_t l = 1; l < a_.layer_count; ++l) {
      pack_window(BackwardWeights{a_.layers[l]}, windows_.get()[l]);
    }
  }

  int64_t gradients() const {
    int64_t total = 0;
    for (int64_t l = 0; l < a_.layer_count; ++l) total += conv_gradients(a_.channels, l);
    return total;
  }
  // Bytes, a multiple of a vector's.
  int64_t workspace() const { return lay_out(nullptr, nullptr); }

  // Adds the gradients from one image.
  void run(int64_t b, char* memory, float* sums) const {
    Workspace work;
    lay_out(memory, &work);
    const int64_t last = a_.layer_count - 1;
    BFloat16 *grad = work.grad[0], *before = work.grad[1];
    begin(a_.grad + b * image(last), out(last, b), grad, last);
    sums += gradients();
    for (int64_t l = last; l > 0; --l) {
      sums -= conv_gradients(a_.channels, l);
      weights(l, grad, out(l - 1, b), work, sums);
      in_gradient(l, grad, out(l - 1, b), before);
      BFloat16* const done = grad;
      grad = before;
      before = done;
    }
    sums -= conv_gradients(a_.channels, 0);
    pixel_weights(grad, a_.images + b * a_.channels * a_.height * a_.width, work, sums);
  }

 private:
  int64_t height(int64_t layer) const { return height_ - 2 * layer; }
  int64_t width(int64_t layer) const { return width_ - 2 * layer; }
  int64_t image(int64_t layer) const { return height(layer) * width(layer) * kPixel; }
  const BFloat16* out(int64_t layer, int64_t b) const {
    return a_.layers[layer].out + b * image(layer);
  }

  int64_t lay_out(char* memory, Workspace* work) const {
    const int64_t sizes[] = {
        height_ * padded_row(width_) * 2,           height_ * padded_row(width_) * 2,
        (kBandRows + 2) * width_ * 2 * 64,          kBandRows * ((width_ + 1) / 2) * 2 * 64,
        PixelBand::size(a_.channels, a_.width) * 4, PixelBand::size(a_.channels, a_.width) * 2,
        PixelBand::size(a_.channels, a_.width) * 2};
    int64_t offsets[8] = {0};
    for (int64_t i = 0; i < 7; ++i) offsets[i + 1] = offsets[i] + (sizes[i] + 63) / 64 * 64;
    if (work != nullptr) {
      const auto at = [&](int64_t i) { return static_cast<void*>(memory + offsets[i]); };
      *work = {{static_cast<BFloat16*>(at(0)), static_cast<BFloat16*>(at(1))},
               static_cast<Pairs*>(at(2)),
               static_cast<Pairs*>(at(3)),
               static_cast<uint32_t*>(at(4)),
               static_cast<uint16_t*>(at(5)),
               static_cast<uint16_t*>(at(6))};
    }
    return offsets[7];
  }

  static void clear_margins(BFloat16* row, int64_t width) {
    memset(row, 0, kMargin * kPixel * sizeof(BFloat16));
    memset(row + (kMargin + width) * kPixel, 0, kMargin * kPixel * sizeof(BFloat16));
  }

  // The gradient of the last layer's sums.
  void begin(const BFloat16* grad, const BFloat16* given, BFloat16* padded, int64_t layer) const {
    const int64_t width = this->width(layer);
    for (int64_t y = 0; y < height(layer); ++y, padded += padded_row(width)) {
      clear_margins(padded, width);
      for (int64_t x = 0; x < width; ++x, grad += kPixel, given += kPixel) {
        Elements g;
        load(grad, g);
        pass_relu(given, g);
        store(g, padded + (kMargin + x) * kPixel);
      }
    }
  }

  // From the gradient of a layer's sums that of the sums of the layer before it, which gave
  // `given`.
  void in_gradient(int64_t layer, const BFloat16* grad, const BFloat16* given,
                   BFloat16* before) const {
    const int64_t height = this->height(layer), width = this->width(layer);
    const int64_t row = padded_row(width);
    for (int64_t y = 0; y < height + 2; ++y) {
      BFloat16* to = before + y * padded_row(width + 2);
      const BFloat16* mask = given + y * (width + 2) * kPixel;
      clear_margins(to, width + 2);
      const int64_t from = y < 2 ? 2 - y : 0, until = height + 2 - y < 3 ? height + 2 - y : 3;
      window_row(grad + (y - 2) * row, row, from, until, windows_.get()[layer], Begin{}, width + 2,
                 [&](int64_t x, const Floats& low, const Floats& high) {
                   store_gradient(low, high, mask + x * kPixel, to + (kMargin + x) * kPixel);
                 });
    }
  }

  // Pairs of the gradients of a band's rows, and their sum, the gradient of the bias.
  void pair_gradients(const BFloat16* grad, int64_t width, int64_t rows, Pairs* out,
                      float* bias) const {
    const Pairs ones = Pairs{} + 0x3F803F80u;
    const int64_t pairs = (width + 1) / 2;
    Floats low, high;
    load(bias, low);
    load(bias + kLanes, high);
    for (int64_t r = 0; r < rows; ++r, out += 2 * pairs) {
      pair_pixels(grad + r * padded_row(width) + kMargin * kPixel, width, 2, out);
      for (int64_t j = 0; j < pairs; ++j) {
        add_products(out[2 * j], ones, low);
        add_products(out[2 * j + 1], ones, high);
      }
    }
    store(low, bias);
    store(high, bias + kLanes);
  }

  void weights(int64_t layer, const BFloat16* grad, const BFloat16* in, const Workspace& work,
               float* sums) const {
    const int64_t height = this->height(layer), width = this->width(layer);
    const int64_t pairs = (width + 1) / 2, in_row = 2 * (width + 2);
    float* bias = sums + kConvChannels * 9 * kConvChannels;
    for (int64_t y = 0; y < height; y += kBandRows) {
      const int64_t rows = height - y < kBandRows ? height - y : kBandRows;
      for (int64_t r = 0; r < rows + 2; ++r) {
        pair_pixels(in + (y + r) * (width + 2) * kPixel, width + 2, 1, work.in + r * in_row);
      }
      pair_gradients(grad + y * padded_row(width), width, rows, work.out, bias);
      const uint32_t* g = reinterpret_cast<const uint32_t*>(work.out);
      for (int64_t dy = 0; dy < 3; ++dy) {
        for (int64_t half = 0; half < 2; ++half) {
          for (int64_t o = 0; o < kConvChannels; o += kTileChannels) {
            weight_tile(work.in + dy * in_row + half, in_row, g + o, pairs * kConvChannels, rows,
                        pairs, sums + (o * 9 + dy * 3) * kConvChannels + half * kLanes);
          }
        }
      }
    }
  }

  void pixel_weights(const BFloat16* grad, const uint8_t* image, const Workspace& work,
                     float* sums) const {
    const int64_t pairs = (width_ + 1) / 2, pitch = pixel_pitch(a_.width);
    float* bias = sums + a_.channels * 9 * kConvChannels;
    PixelBand band(work.pixels, a_.channels, a_.height, a_.width);
    for (int64_t y = 0; y < height_; y += kBandRows) {
      const int64_t rows = height_ - y < kBandRows ? height_ - y : kBandRows;
      band.read(image, y, rows);
      pair_gradients(grad + y * padded_row(width_), width_, rows, work.out, bias);
      for (int64_t c = 0; c < a_.channels; ++c) {
        part_columns(band.row(c, 0), (2 * rows + 1) * pitch, work.even, work.odd);
        pixel_weight_tile(work.even, work.odd, pitch, work.out, 2 * pairs, rows, pairs,
                          sums + c * 9 * kConvChannels);
      }
    }
  }

  const ConvBackwardArgs& a_;
  Scratch<Window> windows_;
  int64_t height_, width_;
};

}  // namespace

void conv_backward(const ConvBackwardArgs& args) {
  const Backward backward(args);
  sum_over_images(
      args.batch, args.threads, backward.gradients(), backward.workspace(),
      [&](int64_t image, char* memory, float* sums) { backward.run(image, memory, sums); },
      args.gradients);
  // Pixels were counted as bytes.
  const int64_t pixel_weights = 9 * args.channels * kConvChannels;
  for (int64_t i = 0; i < pixel_weights; ++i) args.gradients[i] /= 255;
}

}  // namespace crpt::CRPT_ISA
