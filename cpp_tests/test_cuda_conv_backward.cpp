#include "conv_samples.h"

namespace crpt::cuda {
namespace {

// Bands of one block and of several, cut unevenly; results that no 16 pixels are a multiple of.
const Conv kConvs[] = {{2, 32, 3, 5, 1}, {1, 32, 33, 31, 1}, {3, 32, 1, 1, 1}};
const Conv kFirsts[] = {{2, 9, 9, 9, 2}, {1, 16, 35, 33, 2}, {1, 3, 2, 5, 2}};

constexpr int64_t kApart = 3;  // floats between two rows
constexpr int64_t kWideRow = 32 * 9 * 32 + 32 + kApart, kNarrowRow = 32 * 9 * 16 + 32 + kApart;

// The sum over blocks, some of which may have had nothing to do.
std::vector<float> sum_of(const std::vector<float>& partial, int64_t blocks) {
  const std::size_t row = partial.size() / static_cast<std::size_t>(blocks);
  std::vector<float> sum(row - kApart);
  for (std::size_t i = 0; i < partial.size(); ++i) {
    if (i % row < sum.size()) {
      sum[i % row] += partial[i];
    } else {
      EXPECT_TRUE(std::isnan(partial[i]));  // another's
    }
  }
  return sum;
}

TEST(CudaConvBackward, TheGradientOfTheWeights) {
  for (const Conv& conv : kConvs) {
    const Values grad = sample(conv.pixels() * 32, 1, 1), in = sample(conv.in_size(), 1, 2);
    const auto grad_ = bf16_of(grad), in_ = bf16_of(in);
    for (int64_t blocks : {1, 2, 7}) {
      std::vector<float> partial = unwritten<float>(blocks * kWideRow);
      ASSERT_LAUNCHED(launch_conv_backward_weight(grad_.data(), in_.data(), partial.data(),
                                                  kWideRow, conv.batch, conv.height, conv.width,
                                                  blocks, nullptr));
      expect_near(sum_of(partial, blocks), conv.backward_weight(grad, in, 32), 1e-5, 1e-3);
    }
  }
}

TEST(CudaConvBackward, OfPixels) {
  for (const Conv& conv : kFirsts) {
    for (int64_t more : {0, 1}) {
      if (more == 1 && conv.batch > 1) continue;
      Conv wider = conv;
      wider.in_height += more;
      wider.in_width += more;
      const Pixels pixels(wider);
      const Values grad = sample(conv.pixels() * 32, 1, 1);
      const auto grad_ = bf16_of(grad);
      std::vector<float> partial = unwritten<float>(2 * kNarrowRow);
      ASSERT_LAUNCHED(launch_conv_pixels_backward_weight(
          grad_.data(), pixels.planes.data(), partial.data(), kNarrowRow, conv.batch, conv.channels,
          wider.in_height, wider.in_width, 2, nullptr));
      expect_near(sum_of(partial, 2), wider.backward_weight(grad, pixels.last, 16), 1e-5, 1e-3);
    }
  }
}

TEST(CudaConvBackward, TheSameInEveryOrder) {
  const Conv conv = kConvs[0];
  const auto grad = bf16_of(sample(conv.pixels() * 32, 1, 1));
  const auto in = bf16_of(sample(conv.in_size(), 1, 2));
  for (const auto order : {emulation::Order::kAscending, emulation::Order::kShuffled}) {
    emulation::set_order(order);
    static std::vector<float> first;
    std::vector<float> partial = unwritten<float>(2 * kWideRow);
    ASSERT_LAUNCHED(launch_conv_backward_weight(grad.data(), in.data(), partial.data(), kWideRow,
                                                conv.batch, conv.height, conv.width, 2, nullptr));
    if (first.empty()) first = partial;
    EXPECT_EQ(0, std::memcmp(first.data(), partial.data(), partial.size() * sizeof(float)));
  }
  emulation::set_order(emulation::Order::kAscending);
}

}  // namespace
}  // namespace crpt::cuda
