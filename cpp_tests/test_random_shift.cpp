#include <string.h>

#include <algorithm>
#include <numeric>

#include "kernels/random_shift.h"
#include "levels.h"

namespace crpt {
namespace {

CRPT_AT_EVERY_LEVEL(RandomShift);

constexpr int kPad = 6;
constexpr int kB = 7, kPlanes = 2, kH = 5, kW = 9;  // shifts beyond the height as well
const std::vector<int64_t> kShifts = {0, 0, -4, 3, 6, -6, 4, 4, -6, 6, 1, 0, 0, -1};

int64_t source(int b, int plane, int y, int x) {
  const int64_t from_y = std::clamp<int64_t>(y + kShifts[2 * b], 0, kH - 1);
  const int64_t from_x = std::clamp<int64_t>(x + kShifts[2 * b + 1], 0, kW - 1);
  return ((b * kPlanes + plane) * kH + from_y) * kW + from_x;
}

template <typename Visit>
void for_each_pixel(const Visit& visit) {
  int64_t to = 0;
  for (int b = 0; b < kB; ++b) {
    for (int plane = 0; plane < kPlanes; ++plane) {
      for (int y = 0; y < kH; ++y) {
        for (int x = 0; x < kW; ++x) visit(to++, source(b, plane, y, x));
      }
    }
  }
}

TEST_P(RandomShift, MovesPixelsOfEverySize) {
  for (const int bytes : {1, 2, 3, 4, 8, 12}) {
    std::vector<uint8_t> images(kB * kPlanes * kH * kW * bytes), out(images.size());
    for (size_t i = 0; i < images.size(); ++i) images[i] = static_cast<uint8_t>(i * 37 + i / 251);
    const BadValue bad = CRPT_AT(GetParam(), random_shift)({.images = images.data(),
                                                            .out = out.data(),
                                                            .shifts = kShifts.data(),
                                                            .batch = kB,
                                                            .planes = kPlanes,
                                                            .height = kH,
                                                            .width = kW,
                                                            .pixel_bytes = bytes,
                                                            .pad = kPad,
                                                            .threads = 2});
    ASSERT_EQ(bad.argument, nullptr);
    for_each_pixel([&](int64_t to, int64_t from) {
      for (int k = 0; k < bytes; ++k) ASSERT_EQ(out[to * bytes + k], images[from * bytes + k]);
    });
  }
}

// Large results are written past the caches, by lines: at any address, in rows longer than a stage,
// and with nothing written beside them.
TEST_P(RandomShift, MovesImagesLargerThanTheCaches) {
  struct Case {
    int64_t B, H, W, bytes;
  };
  for (const Case c : {Case{23, 301, 311, 4}, Case{2, 7, 700001, 1}, Case{3, 501, 1999, 3}}) {
    const int64_t row = c.W * c.bytes, size = c.B * c.H * row;
    ASSERT_GE(size, 8 << 20);
    std::vector<uint8_t> images(size), out(size + 130, 42);
    for (int64_t i = 0; i < size; ++i) images[i] = static_cast<uint8_t>(i * 37 + i / 251);
    std::vector<int64_t> shifts;
    for (int64_t b = 0; b < c.B; ++b) shifts.insert(shifts.end(), {b * 5 % 13 - 6, b * 3 % 11 - 5});
    uint8_t* to = out.data() + 65;
    ASSERT_EQ(CRPT_AT(GetParam(), random_shift)({.images = images.data(),
                                                 .out = to,
                                                 .shifts = shifts.data(),
                                                 .batch = c.B,
                                                 .planes = 1,
                                                 .height = c.H,
                                                 .width = c.W,
                                                 .pixel_bytes = c.bytes,
                                                 .pad = kPad,
                                                 .threads = 2})
                  .argument,
              nullptr);
    for (int64_t b = 0; b < c.B; ++b) {
      for (int64_t y = 0; y < c.H; ++y) {
        const int64_t from_y = std::clamp<int64_t>(y + shifts[2 * b], 0, c.H - 1);
        const uint8_t* from = images.data() + (b * c.H + from_y) * row;
        for (int64_t x = 0; x < c.W; ++x) {
          const int64_t from_x = std::clamp<int64_t>(x + shifts[2 * b + 1], 0, c.W - 1);
          for (int64_t k = 0; k < c.bytes; ++k) {
            ASSERT_EQ(*to++, from[from_x * c.bytes + k]);
          }
        }
      }
    }
    EXPECT_EQ(std::count(out.begin(), out.begin() + 65, 42), 65);
    EXPECT_EQ(std::count(out.end() - 65, out.end(), 42), 65);
  }
}

TEST_P(RandomShift, BackwardIsTheAdjoint) {
  std::vector<double> grad(kB * kPlanes * kH * kW), expected(grad.size(), 0.0), got(grad.size());
  std::iota(grad.begin(), grad.end(), 1.0);
  for_each_pixel([&](int64_t to, int64_t from) { expected[from] += grad[to]; });
  const BadValue bad = CRPT_AT(GetParam(), random_shift_backward)({.grad = grad.data(),
                                                                   .grad_images = got.data(),
                                                                   .shifts = kShifts.data(),
                                                                   .dtype = DType::f64,
                                                                   .batch = kB,
                                                                   .planes = kPlanes,
                                                                   .height = kH,
                                                                   .width = kW,
                                                                   .pad = kPad,
                                                                   .threads = 2});
  ASSERT_EQ(bad.argument, nullptr);
  ASSERT_EQ(got, expected);
}

// Enough pixels that three threads do start.
TEST_P(RandomShift, BitsDoNotDependOnThreads) {
  const int64_t planes = 9, H = 43, W = 47;
  std::vector<float> images(kB * planes * H * W);
  for (size_t i = 0; i < images.size(); ++i) images[i] = static_cast<float>(i % 1009) / 1009.0f;
  const auto moved = [&](bool backward, int threads) {
    std::vector<float> out(images.size(), 42.0f);
    const BadValue bad =
        backward ? CRPT_AT(GetParam(), random_shift_backward)({.grad = images.data(),
                                                               .grad_images = out.data(),
                                                               .shifts = kShifts.data(),
                                                               .dtype = DType::f32,
                                                               .batch = kB,
                                                               .planes = planes,
                                                               .height = H,
                                                               .width = W,
                                                               .pad = kPad,
                                                               .threads = threads})
                 : CRPT_AT(GetParam(), random_shift)({.images = images.data(),
                                                      .out = out.data(),
                                                      .shifts = kShifts.data(),
                                                      .batch = kB,
                                                      .planes = planes,
                                                      .height = H,
                                                      .width = W,
                                                      .pixel_bytes = 4,
                                                      .pad = kPad,
                                                      .threads = threads});
    EXPECT_EQ(bad.argument, nullptr);
    return out;
  };
  for (const bool backward : {false, true}) EXPECT_EQ(moved(backward, 3), moved(backward, 1));
}

// Others may write the shifts meanwhile. Here the kernel itself does: they lie in the result, and
// the first sample's image covers those of all the others.
TEST_P(RandomShift, UsesTheShiftsThatItChecked) {
  std::vector<double> images(kB * kPlanes * kH * kW);
  std::iota(images.begin(), images.end(), 1.0);
  for (const bool backward : {false, true}) {
    const auto moved = [&](std::vector<double>& out, const int64_t* shifts) {
      const BadValue bad =
          backward ? CRPT_AT(GetParam(), random_shift_backward)({.grad = images.data(),
                                                                 .grad_images = out.data(),
                                                                 .shifts = shifts,
                                                                 .dtype = DType::f64,
                                                                 .batch = kB,
                                                                 .planes = kPlanes,
                                                                 .height = kH,
                                                                 .width = kW,
                                                                 .pad = kPad,
                                                                 .threads = 1})
                   : CRPT_AT(GetParam(), random_shift)({.images = images.data(),
                                                        .out = out.data(),
                                                        .shifts = shifts,
                                                        .batch = kB,
                                                        .planes = kPlanes,
                                                        .height = kH,
                                                        .width = kW,
                                                        .pixel_bytes = 8,
                                                        .pad = kPad,
                                                        .threads = 1});
      ASSERT_EQ(bad.argument, nullptr);
    };
    std::vector<double> expected(images.size()), out(images.size());
    moved(expected, kShifts.data());
    memcpy(out.data(), kShifts.data(), kShifts.size() * sizeof(int64_t));
    moved(out, reinterpret_cast<const int64_t*>(out.data()));
    EXPECT_EQ(out, expected);
  }
}

TEST_P(RandomShift, NamesTheShiftThatIsOutOfRange) {
  auto shifts = kShifts;
  shifts[9] = kPad + 1;
  std::vector<uint8_t> images(kB * kPlanes * kH * kW), out(images.size(), 42);
  const BadValue bad = CRPT_AT(GetParam(), random_shift)({.images = images.data(),
                                                          .out = out.data(),
                                                          .shifts = shifts.data(),
                                                          .batch = kB,
                                                          .planes = kPlanes,
                                                          .height = kH,
                                                          .width = kW,
                                                          .pixel_bytes = 1,
                                                          .pad = kPad,
                                                          .threads = 2});
  ASSERT_STREQ(bad.argument, "shifts");
  EXPECT_EQ(bad.position, 9);
  EXPECT_EQ(bad.value, kPad + 1);
  EXPECT_EQ(out, std::vector<uint8_t>(out.size(), 42));  // nothing was written
}

}  // namespace
}  // namespace crpt
