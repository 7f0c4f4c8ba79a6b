#include <numeric>

#include "kernels/random_shift.cuh"
#include "kernels/shift.cuh"
#include "testing.h"

namespace crpt::cuda {
namespace {

struct Sizes {
  int64_t batch, planes, height, width, pixel, pad;
  int64_t elements() const { return batch * planes * height * width * pixel; }
};

// How far apart images, planes and rows lie, in elements.
struct Apart {
  int64_t image, plane, row;
};

Apart contiguous(const Sizes& s) {
  const int64_t row = s.width * s.pixel;
  return {s.planes * s.height * row, s.height * row, row};
}

// What contiguous images have at i.
int64_t place(const Sizes& s, const Apart& apart, int64_t i) {
  const int64_t row = s.width * s.pixel;
  return i % row + i / row % s.height * apart.row + i / row / s.height % s.planes * apart.plane +
         i / row / s.height / s.planes * apart.image;
}

cudaError_t shift(int64_t element_size, const void* images, const int64_t* shifts, void* out,
                  const Sizes& s, const Apart& apart) {
  return launch_random_shift(element_size, images, shifts, out, s.batch, s.planes, s.height,
                             s.width, s.pixel, apart.image, apart.plane, apart.row, s.pad, nullptr);
}

cudaError_t shift_back(Dtype dtype, const void* grad, const int64_t* shifts, void* out,
                       const Sizes& s, const Apart& apart) {
  return launch_random_shift_backward(dtype, grad, shifts, out, s.batch, s.planes, s.height,
                                      s.width, s.pixel, apart.image, apart.plane, apart.row, s.pad,
                                      nullptr);
}

constexpr Sizes kSizes[] = {{1, 1, 1, 1, 1, 2},
                            {3, 2, 7, 5, 1, 4},
                            {2, 3, 20, 17, 1, 4},
                            {4, 1, 6, 9, 3, 2},
                            {2, 1, 3, 4, 1, 9},
                            {5, 2, 1, 8, 1, 3},
                            {3, 1, 12, 1, 2, 1},
                            {2, 2, 5, 5, 1, 0},
                            // planes that are made of 16 bytes: of words, of packs of several rows,
                            // of pixels, and of two bands
                            {3, 2, 8, 12, 1, 4},
                            {4, 1, 4, 4, 1, 9},
                            {2, 2, 16, 5, 1, 7},
                            {3, 1, 16, 6, 3, 2},
                            {2, 1, 300, 64, 1, 4}};

std::vector<int64_t> shifts_of(const Sizes& size) {
  std::mt19937 engine(static_cast<unsigned>(size.elements()));
  std::uniform_int_distribution<int64_t> distribution(-size.pad, size.pad);
  std::vector<int64_t> shifts(2 * size.batch);
  for (int64_t& shift : shifts) shift = distribution(engine);
  shifts[0] = -size.pad;  // the extremes are always there
  shifts[1] = size.pad;
  return shifts;
}

// from[i] is the element that out[i] reads.
std::vector<int64_t> sources(const Sizes& s, const std::vector<int64_t>& shifts) {
  std::vector<int64_t> from;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t plane = 0; plane < s.planes; ++plane) {
      for (int64_t y = 0; y < s.height; ++y) {
        for (int64_t x = 0; x < s.width; ++x) {
          const int64_t row = std::clamp<int64_t>(y + shifts[2 * b], 0, s.height - 1);
          const int64_t column = std::clamp<int64_t>(x + shifts[2 * b + 1], 0, s.width - 1);
          for (int64_t e = 0; e < s.pixel; ++e) {
            from.push_back(
                (((b * s.planes + plane) * s.height + row) * s.width + column) * s.pixel + e);
          }
        }
      }
    }
  }
  return from;
}

template <class T>
class CudaRandomShift : public ::testing::Test {};
using Bits = ::testing::Types<uint8_t, uint16_t, uint32_t, uint64_t>;
TYPED_TEST_SUITE(CudaRandomShift, Bits);

TYPED_TEST(CudaRandomShift, CopiesTheBits) {
  for (const Sizes& s : kSizes) {
    std::mt19937_64 engine(1);
    std::vector<TypeParam> images(s.elements());
    for (TypeParam& x : images) x = static_cast<TypeParam>(engine());
    const auto shifts = shifts_of(s);
    const auto out = in_every_order([&] {
      std::vector<TypeParam> result(s.elements());
      EXPECT_LAUNCHED(
          shift(sizeof(TypeParam), images.data(), shifts.data(), result.data(), s, contiguous(s)));
      return result;
    });
    const auto from = sources(s, shifts);
    for (int64_t i = 0; i < s.elements(); ++i) ASSERT_EQ(out[i], images[from[i]]) << "at " << i;
  }
}

// Where images and results begin decides how they are read and written, never what.
TYPED_TEST(CudaRandomShift, AtAnyAddress) {
  const Sizes s{3, 1, 8, 12, 1, 4};
  const auto shifts = shifts_of(s);
  const auto from = sources(s, shifts);
  std::mt19937_64 engine(2);
  std::vector<TypeParam> images(s.elements() + 4);
  for (TypeParam& x : images) x = static_cast<TypeParam>(engine());
  for (const int in : {0, 1, 3}) {
    for (const int to : {0, 1}) {
      std::vector<TypeParam> out(s.elements() + 1);
      ASSERT_LAUNCHED(shift(sizeof(TypeParam), images.data() + in, shifts.data(), out.data() + to,
                            s, contiguous(s)));
      for (int64_t i = 0; i < s.elements(); ++i) ASSERT_EQ(out[to + i], images[in + from[i]]);
    }
  }
}

// Rows beside which something lies, also such as are no whole words; one image that stands for all.
TYPED_TEST(CudaRandomShift, OfPartsOfLargerImages) {
  for (const Sizes& s : {Sizes{3, 2, 8, 12, 1, 4}, Sizes{4, 1, 6, 9, 3, 2}}) {
    const auto shifts = shifts_of(s);
    const auto from = sources(s, shifts);
    const int64_t row = s.width * s.pixel, plane = s.height * (row + 4);
    for (const Apart& apart : {Apart{s.planes * plane + 1, plane + 3, row + 4},
                               Apart{2 * s.planes * plane, plane, row + 1}, Apart{0, 0, row}}) {
      std::mt19937_64 engine(4);
      std::vector<TypeParam> images(2 * s.batch * s.planes * plane + 8);
      for (TypeParam& x : images) x = static_cast<TypeParam>(engine());
      std::vector<TypeParam> out(s.elements());
      ASSERT_LAUNCHED(shift(sizeof(TypeParam), images.data(), shifts.data(), out.data(), s, apart));
      for (int64_t i = 0; i < s.elements(); ++i) {
        ASSERT_EQ(out[i], images[place(s, apart, from[i])]) << "at " << i;
      }
    }
  }
}

__global__ void divide_kernel(Divider divider, const int* n, int* quotients, int* remainders) {
  quotients[global_thread()] = divider.quotient(n[global_thread()]);
  remainders[global_thread()] = divider.remainder(n[global_thread()]);
}

TEST(CudaShift, DividerDivides) {
  std::mt19937 engine(3);
  for (const int divisor : {1, 2, 3, 7, 21, 64, 84, 4095, 65537, 1 << 26, (1 << 26) - 1}) {
    std::vector<int> n(kThreads), quotients(kThreads), remainders(kThreads);
    for (int& x : n) x = static_cast<int>(engine() >> 1);
    const int edges[] = {0, 1, divisor - 1, divisor, divisor + 1, 2147483647, 2147483646};
    std::copy(std::begin(edges), std::end(edges), n.begin());
    for (int i = 7; i < 100; ++i) n[i] = n[i] / divisor * divisor - i % 2 * (n[i] >= divisor);
    ASSERT_LAUNCHED(launch(nullptr, 1, divide_kernel, Divider(divisor), n.data(), quotients.data(),
                           remainders.data()));
    for (int i = 0; i < kThreads; ++i) {
      ASSERT_EQ(quotients[i], n[i] / divisor) << n[i] << " / " << divisor;
      ASSERT_EQ(remainders[i], n[i] % divisor);
    }
  }
}

// Every row is in one band, whatever the sizes, and what is counted in 32 bits fits.
TEST(CudaShift, BandsCoverThePlanes) {
  const int64_t sizes[][2] = {
      {1, 1}, {84, 84}, {84, 756}, {300, 64}, {2160, 3840}, {17, 1 << 26}, {int64_t{1} << 33, 8}};
  for (const auto& [height, row] : sizes) {
    const Bands bands(6, height, row);
    EXPECT_EQ(bands.count, 6 * bands.per_plane);
    EXPECT_GE(bands.rows * bands.per_plane, height);
    EXPECT_LT(bands.rows * (bands.per_plane - 1), height);
    EXPECT_LT(bands.rows * row, int64_t{1} << 31);
    EXPECT_TRUE(bands.per_plane == 1 || bands.rows % 16 == 0);
  }
  EXPECT_EQ(Bands(4608, 84, 84).per_plane, 1);
}

template <class T>
class CudaRandomShiftBackward : public ::testing::Test {};
TYPED_TEST_SUITE(CudaRandomShiftBackward, FloatingTypes);

TYPED_TEST(CudaRandomShiftBackward, ReturnsEveryGradientToItsSource) {
  using T = TypeParam;
  for (const Sizes& s : kSizes) {
    const int64_t row = s.width * s.pixel + 3, plane = s.height * row + 1;
    const auto shifts = shifts_of(s);
    const auto from = sources(s, shifts);
    for (const Apart& apart : {contiguous(s), Apart{s.planes * plane + 2, plane, row}}) {
      const auto grad = write_all<T>(normal(s.batch * (s.planes * plane + 2), 1, 4));
      std::vector<double> expected(s.elements());
      for (int64_t i = 0; i < s.elements(); ++i) {
        expected[from[i]] += Element<T>::read(grad[place(s, apart, i)]);
      }
      const auto out = in_every_order([&] {
        auto result = unwritten<T>(s.elements());
        EXPECT_LAUNCHED(
            shift_back(Element<T>::kDtype, grad.data(), shifts.data(), result.data(), s, apart));
        return result;
      });
      expect_near(out, expected, tolerance<T>(20), 20 * Element<compute_t<T>>::kEpsilon);
    }
  }
}

TEST(CudaRandomShiftValues, AShiftOutOfRangeStopsTheKernel) {
  const std::vector<float> images(4);
  std::vector<float> out(4);
  const Sizes s{1, 1, 2, 2, 1, 2};
  for (const std::vector<int64_t>& shifts : {std::vector<int64_t>{3, 0}, {0, -3}}) {
    EXPECT_EQ(cudaErrorAssert,
              shift(4, images.data(), shifts.data(), out.data(), s, contiguous(s)));
    EXPECT_NE(emulation::last_failure().find("shifts should be in [-pad, pad]"), std::string::npos);
    EXPECT_EQ(cudaErrorAssert, shift_back(Dtype::kFloat32, images.data(), shifts.data(), out.data(),
                                          s, contiguous(s)));
  }
}

TEST(CudaRandomShiftValues, NoImagesAndUnknownSizes) {
  const auto unread = [](int64_t element_size, const Sizes& s) {
    return shift(element_size, nullptr, nullptr, nullptr, s, contiguous(s));
  };
  ASSERT_LAUNCHED(unread(4, {0, 3, 5, 5, 1, 4}));
  EXPECT_EQ(cudaErrorInvalidValue, unread(16, {1, 3, 5, 5, 1, 4}));
  // A row that 32 bits could not count.
  EXPECT_EQ(cudaErrorInvalidValue, unread(4, {1, 3, 5, int64_t{1} << 25, 3, 4}));
}

}  // namespace
}  // namespace crpt::cuda
