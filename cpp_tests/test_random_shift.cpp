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

// Arguments for contiguous images.
RandomShiftArgs forward(const void* images, void* out, const int64_t* shifts, int64_t batch,
                        int64_t planes, int64_t height, int64_t width, int64_t pixel_bytes,
                        int threads) {
  return {.images = images,
          .stride_b = planes * height * width * pixel_bytes,
          .stride_plane = height * width * pixel_bytes,
          .stride_h = width * pixel_bytes,
          .stride_w = pixel_bytes,
          .out = out,
          .shifts = shifts,
          .batch = batch,
          .planes = planes,
          .height = height,
          .width = width,
          .pixel_bytes = pixel_bytes,
          .pad = kPad,
          .threads = threads};
}

RandomShiftBackwardArgs backward(const void* grad, void* grad_images, const int64_t* shifts,
                                 DType dtype, int64_t batch, int64_t planes, int64_t height,
                                 int64_t width, int threads) {
  return {.grad = grad,
          .stride_b = planes * height * width,
          .stride_plane = height * width,
          .stride_h = width,
          .stride_w = 1,
          .grad_images = grad_images,
          .shifts = shifts,
          .dtype = dtype,
          .batch = batch,
          .planes = planes,
          .height = height,
          .width = width,
          .pixel = 1,
          .pad = kPad,
          .threads = threads};
}

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
    const BadValue bad = CRPT_AT(GetParam(), random_shift)(
        forward(images.data(), out.data(), kShifts.data(), kB, kPlanes, kH, kW, bytes, 2));
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
    ASSERT_EQ(CRPT_AT(GetParam(), random_shift)(
                  forward(images.data(), to, shifts.data(), c.B, 1, c.H, c.W, c.bytes, 2))
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
  const BadValue bad = CRPT_AT(GetParam(), random_shift_backward)(
      backward(grad.data(), got.data(), kShifts.data(), DType::f64, kB, kPlanes, kH, kW, 2));
  ASSERT_EQ(bad.argument, nullptr);
  ASSERT_EQ(got, expected);
}

struct Strides {
  int64_t b, plane, h, w;  // in elements
};

// Every layout of pixels of `pixel` elements: with gaps, planes first or last, and one row, plane
// or image that stands for all.
std::vector<Strides> layouts(int64_t pixel) {
  return {{kPlanes * kH * kW * pixel + 5, kH * kW * pixel + 3, kW * pixel + 2, pixel},
          {kPlanes * kH * kW * pixel * 2, kH * kW * pixel * 2, kW * pixel * 2, pixel * 2},
          {kPlanes * kH * kW * pixel, pixel, kW * kPlanes * pixel, kPlanes * pixel},
          {kH * pixel, kB * kH * pixel, pixel, kB * kPlanes * kH * pixel},
          {0, kH * kW * pixel, kW * pixel, pixel},
          {kH * kW * pixel, 0, 0, pixel},
          {kH * kW * pixel, kW * pixel, pixel, 0}};
}

// The pixel that lies at place `at` of contiguous images, in elements.
int64_t place(const Strides& strides, int64_t at) {
  return at % kW * strides.w + at / kW % kH * strides.h + at / (kW * kH) % kPlanes * strides.plane +
         at / (kW * kH * kPlanes) * strides.b;
}

TEST_P(RandomShift, ReadsAnyStrides) {
  for (const int64_t bytes : {1, 2, 3, 4, 8}) {
    for (const Strides& strides : layouts(bytes)) {
      std::vector<uint8_t> images(kB * kPlanes * kH * kW * bytes * 2 + 100);
      std::vector<uint8_t> out(kB * kPlanes * kH * kW * bytes);
      for (size_t i = 0; i < images.size(); ++i) images[i] = static_cast<uint8_t>(i * 37 + i / 251);
      RandomShiftArgs args =
          forward(images.data(), out.data(), kShifts.data(), kB, kPlanes, kH, kW, bytes, 2);
      args.stride_b = strides.b;
      args.stride_plane = strides.plane;
      args.stride_h = strides.h;
      args.stride_w = strides.w;
      ASSERT_EQ(CRPT_AT(GetParam(), random_shift)(args).argument, nullptr);
      for_each_pixel([&](int64_t to, int64_t from) {
        const uint8_t* pixel = images.data() + place(strides, from);
        for (int64_t k = 0; k < bytes; ++k) ASSERT_EQ(out[to * bytes + k], pixel[k]);
      });
    }
  }
}

TEST_P(RandomShift, BackwardReadsAnyStridesAndPixels) {
  for (const int64_t pixel : {1, 3}) {
    for (const Strides& strides : layouts(pixel)) {
      const size_t size = static_cast<size_t>(kB * kPlanes * kH * kW * pixel);
      std::vector<BFloat16> grad(testing::as_bf16(testing::coarse(2 * size + 100, 1)));
      std::vector<double> expected(size, 0.0);
      for_each_pixel([&](int64_t to, int64_t from) {
        for (int64_t c = 0; c < pixel; ++c) {
          expected[from * pixel + c] += testing::value(grad[place(strides, to) + c]);
        }
      });
      std::vector<BFloat16> got(size);
      RandomShiftBackwardArgs args =
          backward(grad.data(), got.data(), kShifts.data(), DType::bf16, kB, kPlanes, kH, kW, 2);
      args.pixel = pixel;
      args.stride_b = strides.b;
      args.stride_plane = strides.plane;
      args.stride_h = strides.h;
      args.stride_w = strides.w;
      ASSERT_EQ(CRPT_AT(GetParam(), random_shift_backward)(args).argument, nullptr);
      for (size_t i = 0; i < size; ++i) {
        ASSERT_NEAR(testing::value(got[i]), expected[i], std::abs(expected[i]) / 256);
      }
    }
  }
}

// Enough pixels that three threads do start.
TEST_P(RandomShift, BitsDoNotDependOnThreads) {
  const int64_t planes = 9, H = 43, W = 47;
  std::vector<float> images(kB * planes * H * W);
  for (size_t i = 0; i < images.size(); ++i) images[i] = static_cast<float>(i % 1009) / 1009.0f;
  const auto moved = [&](bool back, int threads) {
    std::vector<float> out(images.size(), 42.0f);
    const BadValue bad =
        back
            ? CRPT_AT(GetParam(), random_shift_backward)(backward(
                  images.data(), out.data(), kShifts.data(), DType::f32, kB, planes, H, W, threads))
            : CRPT_AT(GetParam(), random_shift)(
                  forward(images.data(), out.data(), kShifts.data(), kB, planes, H, W, 4, threads));
    EXPECT_EQ(bad.argument, nullptr);
    return out;
  };
  for (const bool back : {false, true}) EXPECT_EQ(moved(back, 3), moved(back, 1));
}

// Others may write the shifts meanwhile. Here the kernel itself does: they lie in the result, and
// the first sample's image covers those of all the others.
TEST_P(RandomShift, UsesTheShiftsThatItChecked) {
  std::vector<double> images(kB * kPlanes * kH * kW);
  std::iota(images.begin(), images.end(), 1.0);
  for (const bool back : {false, true}) {
    const auto moved = [&](std::vector<double>& out, const int64_t* shifts) {
      const BadValue bad =
          back ? CRPT_AT(GetParam(), random_shift_backward)(backward(
                     images.data(), out.data(), shifts, DType::f64, kB, kPlanes, kH, kW, 1))
               : CRPT_AT(GetParam(), random_shift)(
                     forward(images.data(), out.data(), shifts, kB, kPlanes, kH, kW, 8, 1));
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
  const BadValue bad = CRPT_AT(GetParam(), random_shift)(
      forward(images.data(), out.data(), shifts.data(), kB, kPlanes, kH, kW, 1, 2));
  ASSERT_STREQ(bad.argument, "shifts");
  EXPECT_EQ(bad.position, 9);
  EXPECT_EQ(bad.value, kPad + 1);
  EXPECT_EQ(out, std::vector<uint8_t>(out.size(), 42));  // nothing was written
}

}  // namespace
}  // namespace crpt
