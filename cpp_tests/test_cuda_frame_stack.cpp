#include <array>

#include "kernels/frame_stack.cuh"
#include "testing.h"

namespace crpt::cuda {
namespace {

// Rows of 16 bytes are read as words, others as bytes.
constexpr int64_t N = 11, C = 3, H = 9, B = 5, K = 2, kPad = 3;
constexpr int64_t kWidths[] = {14, 16};
constexpr int64_t kLargestOut = B * K * C * H * kWidths[1];

using Strides = std::array<int64_t, 4>;

const std::vector<int64_t> kIndex{10, 0, 3, 3, 7, 1, 0, 10, 5, 6};
const std::vector<int64_t> kShifts{0, 0, -3, 3, 3, -3, 1, 2, -1, 0};

// The strides of [N, C, H, W] stored contiguously, and with channels last.
constexpr Strides contiguous(int64_t W) { return {C * H * W, H * W, W, 1}; }
constexpr Strides channels_last(int64_t W) { return {C * H * W, 1, W * C, C}; }

// Their words are whole, wherever they begin.
std::vector<uint8_t> frames_of() {
  std::mt19937 engine(7);
  std::vector<uint8_t> frames(N * C * H * kWidths[1] + 8);
  for (uint8_t& pixel : frames) pixel = static_cast<uint8_t>(engine());
  return frames;
}

std::vector<double> expected_of(const uint8_t* frames, int64_t W, const Strides& strides,
                                bool shifted, double scale) {
  std::vector<double> out;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t y = 0; y < H; ++y) {
          for (int64_t x = 0; x < W; ++x) {
            const int64_t row = std::clamp<int64_t>(y + (shifted ? kShifts[2 * b] : 0), 0, H - 1);
            const int64_t column =
                std::clamp<int64_t>(x + (shifted ? kShifts[2 * b + 1] : 0), 0, W - 1);
            out.push_back(frames[kIndex[b * K + k] * strides[0] + c * strides[1] +
                                 row * strides[2] + column * strides[3]] /
                          scale);
          }
        }
      }
    }
  }
  return out;
}

cudaError_t stack(Dtype dtype, const uint8_t* frames, int64_t W, const Strides& strides,
                  const std::vector<int64_t>& index, const int64_t* shifts, void* out) {
  return launch_frame_stack(dtype, frames, index.data(), shifts, out, N, C, H, W, strides[0],
                            strides[1], strides[2], strides[3],
                            static_cast<int64_t>(index.size()) / K, K, kPad, nullptr);
}

TEST(CudaFrameStack, PixelsAsTheyAre) {
  const auto frames = frames_of();
  for (const int64_t W : kWidths) {
    for (const Strides& strides : {contiguous(W), channels_last(W)}) {
      for (const bool shifted : {false, true}) {
        for (const int begin : {0, 1, 2, 3}) {
          const auto out = in_every_order([&] {
            std::vector<uint8_t> result(B * K * C * H * W);
            EXPECT_LAUNCHED(stack(Dtype::kUInt8, frames.data() + begin, W, strides, kIndex,
                                  shifted ? kShifts.data() : nullptr, result.data()));
            return result;
          });
          const auto expected = expected_of(frames.data() + begin, W, strides, shifted, 1);
          for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], expected[i]) << "at " << i;
        }
      }
    }
  }
}

template <class T>
class CudaFrameStackFloating : public ::testing::Test {};
TYPED_TEST_SUITE(CudaFrameStackFloating, FloatingTypes);

TYPED_TEST(CudaFrameStackFloating, PixelsOver255RoundedOnce) {
  std::vector<uint8_t> frames = frames_of();
  for (int i = 0; i < 256; ++i) frames[kIndex[0] * C * H * kWidths[0] + i] = uint8_t(i);
  for (const int64_t W : kWidths) {
    for (const int begin : {0, 1}) {  // of the result: with it in packs, and not
      const auto out = in_every_order([&] {
        auto result = unwritten<TypeParam>(B * K * C * H * W + begin);
        EXPECT_LAUNCHED(stack(Element<TypeParam>::kDtype, frames.data(), W, contiguous(W), kIndex,
                              kShifts.data(), result.data() + begin));
        return result;
      });
      const auto expected = expected_of(frames.data(), W, contiguous(W), true, 255);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        const double rounded = Element<TypeParam>::read(Element<TypeParam>::write(expected[i]));
        ASSERT_EQ(Element<TypeParam>::read(out[begin + i]), rounded) << "at " << i;
      }
    }
  }
}

TEST(CudaFrameStackValues, AnIndexOrShiftOutOfRangeStopsTheKernel) {
  const auto frames = frames_of();
  std::vector<uint8_t> out(kLargestOut);
  for (const int64_t W : kWidths) {
    for (const int64_t bad : {int64_t{-1}, N, std::numeric_limits<int64_t>::max()}) {
      std::vector<int64_t> index = kIndex;
      index.back() = bad;
      EXPECT_EQ(cudaErrorAssert,
                stack(Dtype::kUInt8, frames.data(), W, contiguous(W), index, nullptr, out.data()));
      EXPECT_NE(emulation::last_failure().find("index should be in [0, N)"), std::string::npos);
    }
    std::vector<int64_t> shifts = kShifts;
    shifts.back() = kPad + 1;
    EXPECT_EQ(cudaErrorAssert, stack(Dtype::kUInt8, frames.data(), W, contiguous(W), kIndex,
                                     shifts.data(), out.data()));
  }
}

TEST(CudaFrameStackValues, NoSamples) {
  ASSERT_LAUNCHED(stack(Dtype::kUInt8, nullptr, 14, contiguous(14), {}, nullptr, nullptr));
}

}  // namespace
}  // namespace crpt::cuda
