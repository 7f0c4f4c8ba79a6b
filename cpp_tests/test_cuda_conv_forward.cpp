#include "conv_samples.h"

namespace crpt::cuda {
namespace {

using Bf16s = std::vector<__nv_bfloat16>;

constexpr double kHalf = 0x1p-8;  // a unit of bf16

// Bands of one block and of several, cut unevenly; results that no 64 pixels are a multiple of.
const Conv kConvs[] = {{2, 32, 3, 5, 1}, {1, 32, 33, 31, 1}, {3, 32, 1, 1, 1}};
const Conv kFirsts[] = {{2, 9, 9, 9, 2}, {1, 16, 35, 33, 2}, {1, 3, 2, 5, 2}, {1, 1, 1, 1, 2}};

TEST(CudaConvForward, TheSumOverTheWindow) {
  for (const Conv& conv : kConvs) {
    const Values in = sample(conv.in_size(), 1, 1), weights = sample(conv.weights(), 0.1, 2);
    const Values bias = sample(32, 1, 3);
    const auto in_ = bf16_of(in);
    const auto weights_ = floats_of(weights), bias_ = floats_of(bias);
    const Bf16s got = in_every_order([&] {
      Bf16s out = unwritten<__nv_bfloat16>(conv.pixels() * 32);
      EXPECT_LAUNCHED(launch_conv(in_.data(), weights_.data(), 9 * 32, 9, 3, 1, bias_.data(),
                                  out.data(), conv.batch, conv.height, conv.width, 3, nullptr));
      return out;
    });
    expect_near(got, conv.forward(in, weights, bias), kHalf, 1e-4);
  }
}

TEST(CudaConvForward, WeightsOfAnyStrides) {
  const Conv conv = kConvs[0];
  const Values in = sample(conv.in_size(), 1, 1), weights = sample(conv.weights(), 0.1, 2);
  const Values bias(32, 0.0);
  Values last(weights.size());  // [o, y, x, i]
  for (int64_t w = 0; w < conv.weights(); ++w) {
    last.at((w / 9 / 32 * 9 + w % 9) * 32 + w / 9 % 32) = weights.at(w);
  }
  const auto in_ = bf16_of(in);
  const auto weights_ = floats_of(last), bias_ = floats_of(bias);
  Bf16s got = unwritten<__nv_bfloat16>(conv.pixels() * 32);
  ASSERT_LAUNCHED(launch_conv(in_.data(), weights_.data(), 9 * 32, 1, 3 * 32, 32, bias_.data(),
                              got.data(), conv.batch, conv.height, conv.width, 1, nullptr));
  expect_near(got, conv.forward(in, weights, bias), kHalf, 1e-4);
}

TEST(CudaConvForward, OfPixels) {
  for (const Conv& conv : kFirsts) {
    // An image may have a row and a column that no window reaches.
    for (int64_t more : {0, 1}) {
      if (more == 1 && conv.batch > 1) continue;
      Conv wider = conv;
      const Values weights = sample(conv.weights(), 0.3, 2), bias = sample(32, 1, 3);
      wider.in_height += more;
      wider.in_width += more;
      const Pixels pixels(wider);
      const auto weights_ = floats_of(weights), bias_ = floats_of(bias);
      const Bf16s got = in_every_order([&] {
        Bf16s out = unwritten<__nv_bfloat16>(conv.pixels() * 32);
        EXPECT_LAUNCHED(launch_conv_pixels(
            pixels.planes.data(), weights_.data(), 9 * conv.channels, 9, 3, 1, bias_.data(),
            out.data(), conv.batch, conv.channels, wider.in_height, wider.in_width, 2, nullptr));
        return out;
      });
      // The weights over 255 are rounded.
      expect_near(got, wider.forward(pixels.last, weights, bias), kHalf, 0.02);
    }
  }
}

TEST(CudaConvForward, TheGradientOfWhatWentIn) {
  for (const Conv& conv : kConvs) {
    const Values grad = sample(conv.pixels() * 32, 1, 1), weights = sample(conv.weights(), 0.1, 2);
    const Values in = sample(conv.in_size(), 1, 3);
    const auto grad_ = bf16_of(grad), in_ = bf16_of(in);
    const auto weights_ = floats_of(weights);
    const Bf16s got = in_every_order([&] {
      Bf16s out = unwritten<__nv_bfloat16>(conv.in_size());
      EXPECT_LAUNCHED(launch_conv_backward_in(grad_.data(), in_.data(), weights_.data(), 9 * 32, 9,
                                              3, 1, out.data(), conv.batch, conv.height, conv.width,
                                              3, nullptr));
      return out;
    });
    expect_near(got, conv.backward_in(grad, in, weights), kHalf, 1e-4);
  }
}

TEST(CudaConvForward, ANaNStaysOne) {
  const Conv conv = kConvs[2];
  Values in = sample(conv.in_size(), 1, 1);
  in[5] = std::numeric_limits<double>::quiet_NaN();
  const auto in_ = bf16_of(in);
  const std::vector<float> weights(static_cast<std::size_t>(conv.weights()), 0.5F), bias(32);
  Bf16s got = unwritten<__nv_bfloat16>(conv.pixels() * 32);
  for (auto& x : got) x = Element<__nv_bfloat16>::write(0);
  ASSERT_LAUNCHED(launch_conv(in_.data(), weights.data(), 9 * 32, 9, 3, 1, bias.data(), got.data(),
                              conv.batch, conv.height, conv.width, 1, nullptr));
  for (int64_t o = 0; o < 32; ++o) EXPECT_TRUE(std::isnan(__bfloat162float(got[o])));
}

TEST(CudaConvForward, NoImagesAndRowsThatAreTooLong) {
  EXPECT_EQ(cudaSuccess,
            launch_conv(nullptr, nullptr, 1, 1, 1, 1, nullptr, nullptr, 0, 3, 3, 0, nullptr));
  EXPECT_EQ(cudaErrorInvalidValue, launch_conv(nullptr, nullptr, 1, 1, 1, 1, nullptr, nullptr, 1, 3,
                                               kLongestConvRow + 1, 1, nullptr));
}

}  // namespace
}  // namespace crpt::cuda
