#include "kernels/amx_gradients.h"
#include "kernels/amx_pixels.h"
#include "kernels/amx_window.h"
#include "kernels/conv_gradients.h"

namespace crpt::CRPT_ISA {
namespace {

// Pixels for which all taps are taken before the next: what they need fits the first-level cache.
constexpr int64_t kBand = 256;
// The gradient that a layer's input gets reads 2 pixels beyond that of its output on each side.
constexpr int64_t kMargin = 2;

inline void zero_pixels(BFloat16* pixels, int64_t count) {
  memset(pixels, 0, count * kConvChannels * sizeof(BFloat16));
}

struct Workspace {
  BFloat16* grad[2];  // of a layer's sums and of the one's before it, zeros around them
  BFloat16* transposed;
  Pairs *even_pairs, *odd_pairs;
  uint16_t* columns[3];  // the first, second and third that the window sees of each row
};

class Backward {
 public:
  explicit Backward(const ConvBackwardArgs& args)
      : a_(args),
        windows_(args.layer_count),
        height_(conv_size(args.height, 0)),
        width_(conv_size(args.width, 0)) {
    for (int64_t l = 1; l < a_.layer_count; ++l) {
      const ConvLayer& layer = a_.layers[l];
      // What a pixel of the result took from a pixel, that one's gradient takes back from it.
      pack_tiles(
          [&](int64_t i, int64_t o, int64_t dy, int64_t dx) {
            return layer.weight[o * layer.stride_o + i * layer.stride_i +
                                (2 - dy) * layer.stride_y + (2 - dx) * layer.stride_x];
          },
          windows_.get()[l]);
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
    const int64_t rest = this->sums() - first_sums() + kConvChannels;
    memcpy(out, sums + first_sums() - kConvChannels, rest * sizeof(float));
  }
  // Bytes, a multiple of a cache line's.
  int64_t workspace() const { return lay_out(nullptr, nullptr); }

  // Adds the gradients from one image.
  void run(int64_t b, char* memory, float* sums) const {
    const TilesInUse tiles;
    Workspace work;
    lay_out(memory, &work);
    const int64_t last = a_.layer_count - 1;
    BFloat16 *grad = work.grad[0], *before = work.grad[1];
    begin(a_.grad + b * image(last), out(last, b), grad, last);
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
  int64_t height(int64_t layer) const { return height_ - 2 * layer; }
  int64_t width(int64_t layer) const { return width_ - 2 * layer; }
  int64_t image(int64_t layer) const { return height(layer) * width(layer) * kConvChannels; }
  const BFloat16* out(int64_t layer, int64_t b) const {
    return a_.layers[layer].out + b * image(layer);
  }
  int64_t first_sums() const { return (3 * tile_rows(a_.channels) + 1) * kConvChannels; }

  // Pixels of a row of a layer's gradient with its margins, even so that pairs begin with rows, ...
  int64_t pitch(int64_t layer) const { return round_up(width(layer) + 2 * kMargin, 2); }
  // ... of all of it, ...
  int64_t padded(int64_t layer) const { return (height(layer) + 2 * kMargin) * pitch(layer); }
  // ... of it without its margins, in whole steps, ...
  int64_t steps(int64_t layer) const {
    return round_up((height(layer) - 1) * pitch(layer) + width(layer), kStep);
  }
  int64_t inside(int64_t layer) const { return kMargin * pitch(layer) + kMargin; }
  // ... and of all that is read of it.
  int64_t reads(int64_t layer) const {
    const int64_t end = inside(layer) + steps(layer);
    return end > padded(layer) ? end : padded(layer);
  }
  // Elements between the rows of the transposed gradient: an odd number of cache lines, for rows
  // that compete for none.
  int64_t stride(int64_t layer) const { return round_up(steps(layer), 2 * kStep) + kStep; }
  // Pairs of pixels, from even or odd ones on: those of all rows, and all that the last tap reads.
  int64_t pairs(int64_t layer) const { return steps(layer) / 2 + pitch(layer) + 2; }
  // Elements between rows of columns.
  int64_t columns() const { return round_up(width_ + 1, kStep); }
  int64_t column_rows() const { return kBandIn * a_.channels + kTileRows; }

  int64_t lay_out(char* memory, Workspace* work) const {
    constexpr int64_t pixel = kConvChannels * sizeof(BFloat16), pair = 2 * pixel;
    const int64_t most = window_reads(height_ + 2 * kMargin, pitch(0));
    const int64_t grad = (most > reads(0) ? most : reads(0)) * pixel;
    const int64_t row_pairs = kBandRows * round_up(width_, kStep) / 2;
    const int64_t pairs =
        a_.layer_count > 1 && this->pairs(1) > row_pairs ? this->pairs(1) : row_pairs;
    // A line before the columns, for what is stored one before them.
    const int64_t columns = column_rows() * this->columns() * sizeof(uint16_t) + 64;
    const int64_t sizes[] = {grad,         grad,         kConvChannels * stride(0) * 2,
                             pairs * pair, pairs * pair, columns,
                             columns,      columns};
    constexpr int64_t parts = sizeof(sizes) / sizeof(sizes[0]);
    int64_t offsets[parts + 1] = {0};
    for (int64_t i = 0; i < parts; ++i) offsets[i + 1] = offsets[i] + round_up(sizes[i], 64);
    if (work != nullptr) {
      const auto at = [&](int64_t i) { return static_cast<void*>(memory + offsets[i]); };
      const auto columns_at = [&](int64_t i) { return static_cast<uint16_t*>(at(i)) + 32; };
      *work = {{static_cast<BFloat16*>(at(0)), static_cast<BFloat16*>(at(1))},
               static_cast<BFloat16*>(at(2)),
               static_cast<Pairs*>(at(3)),
               static_cast<Pairs*>(at(4)),
               {columns_at(5), columns_at(6), columns_at(7)}};
    }
    return offsets[parts];
  }

  // Zeros around a layer's gradient, to the end of all that is read of it.
  void clear_margins(BFloat16* grad, int64_t layer) const {
    const int64_t pitch = this->pitch(layer), width = this->width(layer);
    const int64_t first = inside(layer), right = pitch - width;
    zero_pixels(grad, first);
    for (int64_t y = 0; y + 1 < height(layer); ++y) {
      zero_pixels(grad + (first + y * pitch + width) * kConvChannels, right);
    }
    const int64_t end = first + (height(layer) - 1) * pitch + width;
    zero_pixels(grad + end * kConvChannels, reads(layer) - end);
  }
  BFloat16* pixel(BFloat16* grad, int64_t layer, int64_t y, int64_t x) const {
    return grad + (inside(layer) + y * pitch(layer) + x) * kConvChannels;
  }

  // The gradient of the last layer's sums.
  void begin(const BFloat16* grad, const BFloat16* given, BFloat16* padded, int64_t layer) const {
    clear_margins(padded, layer);
    const int64_t width = this->width(layer);
    for (int64_t y = 0; y < height(layer); ++y) {
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
    const int64_t width = this->width(layer - 1);
    clear_margins(before, layer - 1);
    window_image(grad, height(layer) + 2 * kMargin, pitch(layer), width, windows_.get()[layer],
                 no_bias, [&](int64_t y, int64_t x, int64_t count, const float* sums) {
                   const BFloat16* mask = given + (y * width + x) * kConvChannels;
                   BFloat16* to = pixel(before, layer - 1, y, x);
                   for (int64_t i = 0; i < count * kConvChannels; i += kConvChannels) {
                     Floats low, high;
                     load(sums + i, low);
                     load(sums + i + kLanes, high);
                     Elements g;
                     round_to(low, high, g);
                     pass_relu(mask + i, g);
                     store(g, to + i);
                   }
                 });
  }

  void weights(int64_t layer, const BFloat16* grad, const BFloat16* in, const Workspace& work,
               float* sums) const {
    const int64_t pitch = this->pitch(layer), stride = this->stride(layer),
                  steps = this->steps(layer);
    transpose_pixels(grad + inside(layer) * kConvChannels, steps, work.transposed, stride,
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
    const int64_t pitch = this->pitch(layer), width = this->width(layer) + 2;
    Pairs *even = work.even_pairs, *odd = work.odd_pairs;
    for (int64_t y = 0; y < height(layer) + 2; ++y, even += pitch, odd += pitch) {
      pair_row(in + y * width * kConvChannels, width, pitch / 2, even);
      pair_row(in + (y * width + 1) * kConvChannels, width - 1, pitch / 2, odd);
    }
    const int64_t rest = pairs(layer) * 2 - (even - work.even_pairs);
    memset(even, 0, rest * sizeof(Pairs));
    memset(odd, 0, rest * sizeof(Pairs));
  }

  void pixel_weights(BFloat16* grad, const uint8_t* image, const Workspace& work,
                     float* sums) const {
    const int64_t columns = this->columns(), channels = a_.channels;
    const int64_t count = round_up(width_, kStep), tiles = tile_rows(channels);
    bias_sums(grad, sums + 3 * tiles * kConvChannels);
    const uint8_t* const end = a_.images + a_.batch * channels * a_.height * a_.width;
    for (int64_t y = 0; y < height_; y += kBandRows) {
      const int64_t rows = height_ - y < kBandRows ? height_ - y : kBandRows;
      for_band(image, channels, a_.height, a_.width, y, rows,
               [&](const uint8_t* bytes, int64_t row) {
                 const int64_t at = row * columns;
                 part_bytes(bytes, a_.width, end, work.columns[0] + at, work.columns[1] + at,
                            work.columns[2] + at);
               });
      // Products with zeros behind the last column: only finite numbers give none.
      work.columns[2][(2 * rows + 1) * channels * columns - 1] = 0;
      for (int64_t r = 0; r < rows; ++r) {
        pair_row(pixel(grad, 0, y + r, 0), width_, count / 2, work.even_pairs + r * count);
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
    for (int64_t y = 0; y < height_; ++y) {
      // Zeros on the right make a pair of the last pixel.
      const BFloat16* row = pixel(grad, 0, y, 0);
      for (int64_t x = 0; x < width_; x += 2) {
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
  int64_t height_, width_;
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
