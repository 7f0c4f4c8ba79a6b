// The encoder's kernels against plain loops in double, at every level.
#include <cmath>
#include <limits>

#include "kernels/conv.h"
#include "levels.h"

namespace crpt {

// The kernels of tiles with plain loops in their place, for CPUs without.
namespace plain_tiles {
void conv_forward(const ConvForwardArgs& args);
void conv_backward(const ConvBackwardArgs& args);
}  // namespace plain_tiles

namespace {

using testing::coarse;
using Values = std::vector<double>;

struct Shape {
  int64_t batch, channels, height, width, layers;
};

// One layer and several; odd and even sizes; a single pixel; rows of every remainder by a tile;
// more images than chunks; bands of every remainder; pixels that fill their last step.
const Shape kShapes[] = {{2, 9, 84, 84, 1},  {1, 9, 41, 37, 4}, {3, 3, 20, 23, 3},
                         {1, 1, 3, 3, 1},    {35, 2, 9, 8, 2},  {1, 2, 33, 25, 2},
                         {2, 16, 66, 12, 2}, {1, 17, 5, 64, 1}};

double to_bf16(double x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(x));
  return __builtin_bit_cast(float, (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

// What a kernel is given, and what it gives: float weights, layers one after the other.
struct Encoder {
  Shape s;
  bool channels_last;
  std::vector<uint8_t> images;
  std::vector<std::vector<float>> weights, biases;
  std::vector<std::vector<BFloat16>> outs;

  explicit Encoder(const Shape& shape, bool last = false) : s(shape), channels_last(last) {
    std::mt19937 random(1);
    for (int64_t i = 0; i < s.batch * s.channels * s.height * s.width; ++i) {
      images.push_back(static_cast<uint8_t>(random()));
    }
    for (int64_t l = 0; l < s.layers; ++l) {
      const double scale = l == 0 ? 1 : 0.2;
      weights.push_back(testing::as<float>(coarse(32 * in(l) * 9, 2 + l, scale)));
      biases.push_back(testing::as<float>(coarse(32, 20 + l, 0.5)));
      outs.emplace_back(s.batch * pixels(l) * 32, BFloat16{0x7FFF});
    }
  }
  int64_t in(int64_t layer) const { return layer == 0 ? s.channels : 32; }
  int64_t height(int64_t layer) const { return conv_size(s.height, layer); }
  int64_t width(int64_t layer) const { return conv_size(s.width, layer); }
  int64_t pixels(int64_t layer) const { return height(layer) * width(layer); }
  // Of [o, i, y, x], contiguous or with channels last.
  int64_t place(int64_t l, int64_t o, int64_t i, int64_t y, int64_t x) const {
    return channels_last ? ((o * 3 + y) * 3 + x) * in(l) + i : ((o * in(l) + i) * 3 + y) * 3 + x;
  }
  // As it is multiplied: rounded, and that of the first layer over 255 before.
  double weight(int64_t l, int64_t o, int64_t i, int64_t y, int64_t x) const {
    const float w = weights[l][place(l, o, i, y, x)];
    return to_bf16(l == 0 ? w / 255 : w);
  }
  // What layer l reads: bytes, or what the layer before it gave.
  double input(int64_t l, int64_t b, int64_t i, int64_t y, int64_t x) const {
    if (l == 0) return images[((b * s.channels + i) * s.height + y) * s.width + x];
    return testing::value(outs[l - 1][((b * height(l - 1) + y) * width(l - 1) + x) * 32 + i]);
  }
  // visit(b, y, x, o, i, dy, dx) for every product of a layer.
  template <typename Visit>
  void for_each_product(int64_t l, const Visit& visit) const {
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t y = 0; y < height(l); ++y) {
        for (int64_t x = 0; x < width(l); ++x) {
          for (int64_t o = 0; o < 32; ++o) {
            for (int64_t i = 0; i < in(l); ++i) {
              for (int64_t tap = 0; tap < 9; ++tap) visit(b, y, x, o, i, tap / 3, tap % 3);
            }
          }
        }
      }
    }
  }

  std::vector<ConvLayer> layers(bool keep = true) {
    std::vector<ConvLayer> found;
    for (int64_t l = 0; l < s.layers; ++l) {
      found.push_back({.weight = weights[l].data(),
                       .stride_o = place(l, 1, 0, 0, 0),
                       .stride_i = place(l, 0, 1, 0, 0),
                       .stride_y = place(l, 0, 0, 1, 0),
                       .stride_x = place(l, 0, 0, 0, 1),
                       .bias = biases[l].data(),
                       .out = keep || l + 1 == s.layers ? outs[l].data() : nullptr});
    }
    return found;
  }
  ConvForwardArgs forward(const std::vector<ConvLayer>& found, int threads) const {
    return {.images = images.data(),
            .layers = found.data(),
            .layer_count = s.layers,
            .batch = s.batch,
            .channels = s.channels,
            .height = s.height,
            .width = s.width,
            .threads = threads};
  }
  int64_t gradients() const {
    int64_t total = 0;
    for (int64_t l = 0; l < s.layers; ++l) total += conv_gradients(s.channels, l);
    return total;
  }
  ConvBackwardArgs backward(const std::vector<ConvLayer>& found, const BFloat16* grad, float* out,
                            int threads) const {
    return {.grad = grad,
            .images = images.data(),
            .layers = found.data(),
            .layer_count = s.layers,
            .batch = s.batch,
            .channels = s.channels,
            .height = s.height,
            .width = s.width,
            .gradients = out,
            .threads = threads};
  }
};

enum class Level { baseline, avx512bf16, plain_tiles, amx };

std::vector<Level> conv_levels() {
  std::vector found{Level::baseline, Level::plain_tiles};
#if defined(CRPT_AVX512BF16)
  if (isa_supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16")) {
    found.push_back(Level::avx512bf16);
  }
#endif
  if (isa_supported(Isa::amx) && tiles_granted()) found.push_back(Level::amx);
  return found;
}

class Conv : public ::testing::TestWithParam<Level> {
 protected:
  static void forward(const ConvForwardArgs& args) {
#if defined(CRPT_AVX512BF16)
    if (GetParam() == Level::avx512bf16) return avx512bf16::conv_forward(args);
#endif
#if defined(CRPT_AMX)
    if (GetParam() == Level::amx) return amx::conv_forward(args);
#endif
    if (GetParam() == Level::plain_tiles) return plain_tiles::conv_forward(args);
    baseline::conv_forward(args);
  }
  static void backward(const ConvBackwardArgs& args) {
#if defined(CRPT_AVX512BF16)
    if (GetParam() == Level::avx512bf16) return avx512bf16::conv_backward(args);
#endif
#if defined(CRPT_AMX)
    if (GetParam() == Level::amx) return amx::conv_backward(args);
#endif
    if (GetParam() == Level::plain_tiles) return plain_tiles::conv_backward(args);
    baseline::conv_backward(args);
  }
};
const char* level_name(const ::testing::TestParamInfo<Level>& info) {
  constexpr const char* names[] = {"baseline", "avx512bf16", "plain_tiles", "amx"};
  return names[static_cast<int>(info.param)];
}
INSTANTIATE_TEST_SUITE_P(Levels, Conv, ::testing::ValuesIn(conv_levels()), level_name);

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool same(const std::vector<BFloat16>& a, const std::vector<BFloat16>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(BFloat16)) == 0;
}

TEST_P(Conv, EveryLayerIsTheSumOverItsWindow) {
  for (const Shape& shape : kShapes) {
    for (const bool last : {false, true}) {
      Encoder e(shape, last);
      forward(e.forward(e.layers(), 2));
      for (int64_t l = 0; l < shape.layers; ++l) {
        Values sums(e.outs[l].size());
        for (size_t i = 0; i < sums.size(); ++i) sums[i] = e.biases[l][i % 32];
        e.for_each_product(l, [&](auto b, auto y, auto x, auto o, auto i, auto dy, auto dx) {
          const int64_t stride = l == 0 ? 2 : 1;
          sums[((b * e.height(l) + y) * e.width(l) + x) * 32 + o] +=
              e.weight(l, o, i, dy, dx) * e.input(l, b, i, stride * y + dy, stride * x + dx);
        });
        for (size_t i = 0; i < sums.size(); ++i) {
          const double wanted = std::max(sums[i], 0.0);
          ASSERT_NEAR(testing::value(e.outs[l][i]), wanted, 0x1p-8 * wanted + 1e-5)
              << "layer " << l << " at " << i << " of " << shape.width;
        }
      }
    }
  }
}

TEST_P(Conv, LayersThatAreNotKeptChangeNothing) {
  for (const Shape& shape : kShapes) {
    Encoder kept(shape), other(shape);
    forward(kept.forward(kept.layers(), 1));
    forward(other.forward(other.layers(false), 1));
    EXPECT_TRUE(same(kept.outs.back(), other.outs.back()));
    for (int64_t l = 0; l + 1 < shape.layers; ++l) EXPECT_EQ(other.outs[l][0].bits, 0x7FFF);
  }
}

// The gradients by hand, from the last layer to the first, rounded where the kernels round.
std::vector<Values> gradients_by_hand(const Encoder& e, const std::vector<BFloat16>& grad) {
  std::vector<Values> found(e.s.layers);
  Values above;
  for (const BFloat16 g : grad) above.push_back(testing::value(g));
  for (int64_t l = e.s.layers - 1; l >= 0; --l) {
    for (size_t i = 0; i < above.size(); ++i) {
      if (testing::value(e.outs[l][i]) <= 0) above[i] = 0;
    }
    Values& gradients = found[l];
    gradients.resize(conv_gradients(e.s.channels, l));
    Values below(l == 0 ? 0 : e.outs[l - 1].size());
    e.for_each_product(l, [&](auto b, auto y, auto x, auto o, auto i, auto dy, auto dx) {
      const double g = above[((b * e.height(l) + y) * e.width(l) + x) * 32 + o];
      const int64_t stride = l == 0 ? 2 : 1, in_y = stride * y + dy, in_x = stride * x + dx;
      const int64_t at =
          l == 0 ? ((i * 3 + dy) * 3 + dx) * 32 + o : ((o * 3 + dy) * 3 + dx) * 32 + i;
      gradients[at] += g * e.input(l, b, i, in_y, in_x) / (l == 0 ? 255 : 1);
      if (l == 0) return;
      below[((b * e.height(l - 1) + in_y) * e.width(l - 1) + in_x) * 32 + i] +=
          g * e.weight(l, o, i, dy, dx);
    });
    for (size_t i = 0; i < above.size(); ++i) {
      gradients[gradients.size() - 32 + i % 32] += above[i];
    }
    for (double& x : below) x = to_bf16(x);
    above = below;
  }
  return found;
}

TEST_P(Conv, TheGradientsOfWeightsAndBiases) {
  for (const Shape& shape : kShapes) {
    Encoder e(shape, true);
    forward(e.forward(e.layers(), 2));
    const auto grad = testing::as_bf16(coarse(e.outs.back().size(), 5));
    std::vector<float> got(e.gradients(), NAN);
    backward(e.backward(e.layers(), grad.data(), got.data(), 2));
    const auto wanted = gradients_by_hand(e, grad);
    size_t at = 0;
    for (int64_t l = 0; l < shape.layers; ++l) {
      double norm = 0, error = 0;
      for (const double x : wanted[l]) {
        ASSERT_TRUE(std::isfinite(got[at])) << "layer " << l;
        norm += x * x;
        error += (got[at] - x) * (got[at] - x);
        ++at;
      }
      // The last layer's rounds nothing but sums; one before it rounds to bf16, here and there the
      // other way.
      const double most = l + 1 == shape.layers ? 1e-5 : 1e-3;
      EXPECT_LE(std::sqrt(error), most * std::sqrt(norm)) << "layer " << l << " of " << shape.width;
    }
    EXPECT_EQ(at, got.size());
  }
}

TEST_P(Conv, TheSameOnAnyNumberOfThreads) {
  for (const Shape& shape : kShapes) {
    Encoder first(shape);
    forward(first.forward(first.layers(), 1));
    const auto grad = testing::as_bf16(coarse(first.outs.back().size(), 5));
    std::vector<float> alone(first.gradients(), NAN);
    backward(first.backward(first.layers(), grad.data(), alone.data(), 1));
    for (const int threads : {2, 3, 40}) {
      Encoder e(shape);
      forward(e.forward(e.layers(), threads));
      for (int64_t l = 0; l < shape.layers; ++l) EXPECT_TRUE(same(e.outs[l], first.outs[l]));
      std::vector<float> together(e.gradients(), NAN);
      backward(e.backward(e.layers(), grad.data(), together.data(), threads));
      EXPECT_TRUE(same(alone, together)) << threads;
    }
  }
}

TEST_P(Conv, ANaNStaysOne) {
  Encoder e({1, 3, 7, 7, 2});
  e.biases[0][4] = std::numeric_limits<float>::quiet_NaN();
  forward(e.forward(e.layers(), 1));
  for (const BFloat16 x : e.outs[1]) EXPECT_TRUE(std::isnan(testing::value(x)));
}

// A NaN in the gradient of one channel is one of that channel's weights, of all of them in the last
// layer, and of no other's.
TEST_P(Conv, ANaNInTheGradientStaysWithItsChannel) {
  for (const Shape& shape : {Shape{3, 3, 20, 23, 1}, Shape{3, 3, 20, 23, 3}}) {
    Encoder e(shape);
    forward(e.forward(e.layers(), 1));
    const int64_t last = shape.layers - 1, channel = 5;
    auto grad = testing::as_bf16(coarse(e.outs[last].size(), 5));
    size_t at = channel;
    while (testing::value(e.outs[last][at]) <= 0) at += 32;
    grad[at].bits = 0x7FC0;
    std::vector<float> got(e.gradients(), 0);
    backward(e.backward(e.layers(), grad.data(), got.data(), 2));
    const int64_t in = 9 * e.in(last), begin = e.gradients() - 32 * (in + 1);
    for (int64_t i = 0; i < 32 * in; ++i) {
      const int64_t o = last == 0 ? i % 32 : i / in;
      EXPECT_EQ(std::isnan(got[begin + i]), o == channel) << i;
    }
    for (int64_t o = 0; o < 32; ++o) {
      EXPECT_EQ(std::isnan(got[begin + 32 * in + o]), o == channel) << o;
    }
  }
}

TEST_P(Conv, NoImages) {
  Encoder e({0, 9, 84, 84, 4});
  forward(e.forward(e.layers(), 2));
  std::vector<float> gradients(e.gradients(), NAN);
  backward(e.backward(e.layers(), nullptr, gradients.data(), 2));
  for (const float g : gradients) ASSERT_EQ(g, 0);
}

#if defined(CRPT_AMX)
// Of this thread, by the processor's own account.
bool tiles_in_use() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return (low >> 18 & 1) != 0;
}

TEST(ConvDispatch, TilesWhereTheyAreChosenAndNoneLeftBehind) {
  if (isa() != Isa::amx) GTEST_SKIP() << "this CPU has none, or another level was asked for";
  ASSERT_TRUE(tiles_granted());
  Encoder e({2, 9, 84, 84, 2});
  const auto found = e.layers();
  const auto gradients = [&](void (*forward)(const ConvForwardArgs&),
                             void (*backward)(const ConvBackwardArgs&)) {
    forward(e.forward(found, 1));
    const auto grad = testing::as_bf16(coarse(e.outs.back().size(), 5));
    std::vector<float> got(e.gradients());
    backward(e.backward(found, grad.data(), got.data(), 1));
    EXPECT_FALSE(tiles_in_use());
    return got;
  };
  const auto chosen = gradients(conv_forward, conv_backward);
  EXPECT_TRUE(same(chosen, gradients(amx::conv_forward, amx::conv_backward)));
  // These sum in another order.
  EXPECT_FALSE(same(chosen, gradients(avx512bf16::conv_forward, avx512bf16::conv_backward)));
}
#endif

}  // namespace
}  // namespace crpt
