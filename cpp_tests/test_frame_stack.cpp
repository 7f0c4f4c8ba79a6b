#include <algorithm>

#include "kernels/frame_stack.h"
#include "levels.h"

namespace crpt {
namespace {

CRPT_AT_EVERY_LEVEL(FrameStack);

constexpr int64_t kN = 5, kC = 3, kH = 7, kW = 37, kB = 4, kK = 3, kPad = 4;
const std::vector<int64_t> kIndex = {0, 0, 1, 4, 3, 2, 2, 2, 2, 1, 4, 0};
const std::vector<int64_t> kShifts = {0, 0, -4, 4, 3, -2, 1, 1};

std::vector<uint8_t> make_frames() {
  std::vector<uint8_t> frames(kN * kC * kH * kW);
  for (size_t i = 0; i < frames.size(); ++i) frames[i] = static_cast<uint8_t>(i * 97 + i / 256);
  return frames;
}

FrameStackArgs arguments(const std::vector<uint8_t>& frames, void* out) {
  return {.frames = frames.data(),
          .stride_n = kC * kH * kW,
          .stride_c = kH * kW,
          .stride_h = kW,
          .stride_w = 1,
          .index = kIndex.data(),
          .shifts = kShifts.data(),
          .out = out,
          .out_bytes = 1,
          .dtype = DType::f32,
          .frame_count = kN,
          .batch = kB,
          .stack = kK,
          .channels = kC,
          .height = kH,
          .width = kW,
          .pad = kPad,
          .threads = 2};
}

template <typename Visit>
void for_each_pixel(const FrameStackArgs& args, const Visit& visit) {
  int64_t to = 0;
  for (int64_t b = 0; b < kB; ++b) {
    for (int64_t k = 0; k < kK; ++k) {
      for (int64_t c = 0; c < kC; ++c) {
        for (int64_t y = 0; y < kH; ++y) {
          for (int64_t x = 0; x < kW; ++x) {
            const int64_t from_y =
                std::clamp<int64_t>(y + (args.shifts ? kShifts[2 * b] : 0), 0, kH - 1);
            const int64_t from_x =
                std::clamp<int64_t>(x + (args.shifts ? kShifts[2 * b + 1] : 0), 0, kW - 1);
            visit(to++, args.frames[kIndex[b * kK + k] * args.stride_n + c * args.stride_c +
                                    from_y * args.stride_h + from_x * args.stride_w]);
          }
        }
      }
    }
  }
}

TEST_P(FrameStack, GathersStacksAndShifts) {
  const auto frames = make_frames();
  std::vector<uint8_t> out(kB * kK * kC * kH * kW);
  for (const bool shifted : {true, false}) {
    FrameStackArgs args = arguments(frames, out.data());
    if (!shifted) args.shifts = nullptr;
    ASSERT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
    for_each_pixel(args, [&](int64_t to, uint8_t pixel) { ASSERT_EQ(out[to], pixel); });
  }
}

TEST_P(FrameStack, ReadsAnyStrides) {
  const auto frames = make_frames();
  std::vector<uint8_t> out(kB * kK * kC * kH * kW);
  FrameStackArgs args = arguments(frames, out.data());
  args.stride_c = 1;  // channels last
  args.stride_w = kC;
  args.stride_h = kC * kW;
  ASSERT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
  for_each_pixel(args, [&](int64_t to, uint8_t pixel) { ASSERT_EQ(out[to], pixel); });
}

// All 256 pixels occur: the division is correctly rounded for each.
TEST_P(FrameStack, CastsToTheNearestFloat) {
  const auto frames = make_frames();
  std::vector<float> f32(kB * kK * kC * kH * kW);
  std::vector<double> f64(f32.size());
  std::vector<BFloat16> bf16(f32.size());
  FrameStackArgs args = arguments(frames, f32.data());
  args.out_bytes = 4;
  ASSERT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
  args.out = f64.data();
  args.out_bytes = 8;
  args.dtype = DType::f64;
  ASSERT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
  args.out = bf16.data();
  args.out_bytes = 2;
  args.dtype = DType::bf16;
  ASSERT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
  std::vector<int> seen(256, 0);
  for_each_pixel(args, [&](int64_t to, uint8_t pixel) {
    seen[pixel] = 1;
    ASSERT_EQ(f32[to], pixel / 255.0f);
    ASSERT_EQ(f64[to], pixel / 255.0);
    ASSERT_NEAR(testing::value(bf16[to]), pixel / 255.0, pixel / 255.0 / 256);
  });
  EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), 256);
}

// The half types round the float that float32 gives, to nearest even.
TEST_P(FrameStack, CastsToHalfTypes) {
  std::vector<uint8_t> frames(kN * kC * kH * kW);
  for (size_t i = 0; i < frames.size(); ++i) frames[i] = static_cast<uint8_t>(i);
  std::vector<BFloat16> bf16(kB * kK * kC * kH * kW);
  std::vector<Half> f16(bf16.size());
  FrameStackArgs args = arguments(frames, bf16.data());
  args.out_bytes = 2;
  args.dtype = DType::bf16;
  ASSERT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
  args.out = f16.data();
  args.dtype = DType::f16;
  ASSERT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
  // A float of `bits` significant bits and no more than -`lowest` as the exponent of its last one.
  const auto rounded = [](float x, int bits, int lowest) {
    if (x == 0) return x;
    int exponent;
    std::frexp(x, &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent - bits, lowest));
    return static_cast<float>(std::nearbyint(x / unit) * unit);
  };
  for_each_pixel(args, [&](int64_t to, uint8_t pixel) {
    ASSERT_EQ(testing::value(bf16[to]), rounded(pixel / 255.0f, 8, -133));
    const uint16_t half = f16[to].bits;
    const double value = half >> 10 == 0 ? std::ldexp(half, -24)
                                         : std::ldexp(1024 + (half & 1023), (half >> 10) - 25);
    ASSERT_EQ(value, rounded(pixel / 255.0f, 11, -24));
  });
}

// Enough pixels that three threads do start; rows with a stride use a buffer of each thread.
TEST_P(FrameStack, BitsDoNotDependOnThreads) {
  const int64_t H = 61, W = 67, pixels = kN * kC * H * W;
  std::vector<uint8_t> frames(pixels);
  for (size_t i = 0; i < frames.size(); ++i) frames[i] = static_cast<uint8_t>(i * 97 + i / 256);
  const auto stacked = [&](bool channels_last, int threads) {
    std::vector<float> out(kB * kK * kC * H * W, 42.0f);
    FrameStackArgs args = arguments(frames, out.data());
    args.height = H;
    args.width = W;
    args.stride_n = kC * H * W;
    args.stride_c = channels_last ? 1 : H * W;
    args.stride_h = channels_last ? kC * W : W;
    args.stride_w = channels_last ? kC : 1;
    args.out_bytes = 4;
    args.threads = threads;
    EXPECT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
    return out;
  };
  for (const bool channels_last : {false, true}) {
    EXPECT_EQ(stacked(channels_last, 3), stacked(channels_last, 1));
  }
}

// Large results are cast in the first-level cache and written past the others.
TEST_P(FrameStack, StacksMoreThanTheCachesHold) {
  const int64_t H = 503, W = 467, pixels = kN * kC * H * W;
  std::vector<uint8_t> frames(pixels);
  for (size_t i = 0; i < frames.size(); ++i) frames[i] = static_cast<uint8_t>(i * 97 + i / 256);
  const int64_t count = kB * kK * kC * H * W;
  const auto check = [&]<typename T>(const T*, bool channels_last, bool shifted, DType dtype) {
    ASSERT_GE(count * static_cast<int64_t>(sizeof(T)), 8 << 20);
    std::vector<T> out(count + 2, T(42));
    FrameStackArgs args = arguments(frames, out.data() + 1);
    args.height = H;
    args.width = W;
    args.stride_n = kC * H * W;
    args.stride_c = channels_last ? 1 : H * W;
    args.stride_h = channels_last ? kC * W : W;
    args.stride_w = channels_last ? kC : 1;
    args.out_bytes = sizeof(T);
    args.dtype = dtype;
    if (!shifted) args.shifts = nullptr;
    ASSERT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
    const T* to = out.data() + 1;
    for (int64_t i = 0; i < kB * kK * kC; ++i) {
      const int64_t b = i / (kK * kC), dy = shifted ? kShifts[2 * b] : 0,
                    dx = shifted ? kShifts[2 * b + 1] : 0;
      const uint8_t* plane =
          frames.data() + kIndex[i / kC] * args.stride_n + i % kC * args.stride_c;
      for (int64_t y = 0; y < H; ++y) {
        const uint8_t* row = plane + std::clamp<int64_t>(y + dy, 0, H - 1) * args.stride_h;
        for (int64_t x = 0; x < W; ++x) {
          const uint8_t pixel = row[std::clamp<int64_t>(x + dx, 0, W - 1) * args.stride_w];
          ASSERT_EQ(*to++, sizeof(T) == 1 ? T(pixel) : T(pixel / T(255)));
        }
      }
    }
    EXPECT_EQ(out.front(), T(42));
    EXPECT_EQ(out.back(), T(42));
  };
  for (const bool channels_last : {false, true}) {
    for (const bool shifted : {false, true}) {
      check(static_cast<uint8_t*>(nullptr), channels_last, shifted, DType::f32);
      check(static_cast<float*>(nullptr), channels_last, shifted, DType::f32);
      check(static_cast<double*>(nullptr), channels_last, shifted, DType::f64);
    }
  }
}

// Others may write index and shifts meanwhile. Here the kernel itself does: they lie in the result,
// which becomes 255 all over.
TEST_P(FrameStack, UsesTheValuesThatItChecked) {
  const std::vector<uint8_t> frames(kN * kC * kH * kW, 255);
  std::vector<int64_t> out(kB * kK * kC * kH * kW / sizeof(int64_t) + 1);
  std::copy(kIndex.begin(), kIndex.end(), out.begin());
  std::copy(kShifts.begin(), kShifts.end(), out.begin() + kB * kK);
  FrameStackArgs args = arguments(frames, out.data());
  args.index = out.data();
  args.shifts = out.data() + kB * kK;
  args.threads = 1;
  ASSERT_EQ(CRPT_AT(GetParam(), frame_stack)(args).argument, nullptr);
  EXPECT_EQ(std::count(out.begin(), out.end() - 1, -1), static_cast<int64_t>(out.size()) - 1);
}

TEST_P(FrameStack, NamesTheValueThatIsOutOfRange) {
  const auto frames = make_frames();
  std::vector<uint8_t> out(kB * kK * kC * kH * kW, 42);
  for (const int64_t wrong : {int64_t{-1}, kN, INT64_MAX, INT64_MIN}) {
    auto index = kIndex;
    index[7] = wrong;
    FrameStackArgs args = arguments(frames, out.data());
    args.index = index.data();
    const BadValue bad = CRPT_AT(GetParam(), frame_stack)(args);
    ASSERT_STREQ(bad.argument, "index");
    EXPECT_EQ(bad.position, 7);
    EXPECT_EQ(bad.value, wrong);
    EXPECT_EQ(bad.high, kN - 1);
  }
  auto shifts = kShifts;
  shifts[3] = -kPad - 1;
  FrameStackArgs args = arguments(frames, out.data());
  args.shifts = shifts.data();
  const BadValue bad = CRPT_AT(GetParam(), frame_stack)(args);
  ASSERT_STREQ(bad.argument, "shifts");
  EXPECT_EQ(bad.position, 3);
  EXPECT_EQ(out, std::vector<uint8_t>(out.size(), 42));  // nothing was written
}

}  // namespace
}  // namespace crpt
