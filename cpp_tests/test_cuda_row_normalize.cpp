#include "kernels/row_normalize.cuh"
#include "testing.h"

namespace crpt::cuda {
namespace {

template <class T>
class CudaRowNormalize : public ::testing::Test {};
TYPED_TEST_SUITE(CudaRowNormalize, FloatingTypes);

// Rows of a warp and of a block, in vectors and one by one, in registers and too long for them.
constexpr int64_t kShapes[][2] = {{1, 1},   {3, 5},   {9, 32},   {17, 33},  {2, 701},
                                  {9, 128}, {2, 516}, {1, 2052}, {1, 2051}, {2, 4100}};

TYPED_TEST(CudaRowNormalize, UnitRowsAndLengths) {
  using A = compute_t<TypeParam>;
  for (const auto& [count, width] : kShapes) {
    std::vector<double> values = normal(count * width, 2, unsigned(width));
    for (int64_t d = 0; d < width; ++d)
      values[(count - 1) * width + d] = 0;  // a zero row stays zero
    const auto rows = write_all<TypeParam>(values);
    std::vector<double> norms, units;
    for (int64_t r = 0; r < count; ++r) {
      double sum = 0;
      for (int64_t d = 0; d < width; ++d) {
        sum += std::pow(Element<TypeParam>::read(rows[r * width + d]), 2);
      }
      norms.push_back(std::sqrt(sum));
      for (int64_t d = 0; d < width; ++d) {
        units.push_back(Element<TypeParam>::read(rows[r * width + d]) / std::max(norms[r], 1e-12));
      }
    }
    auto norm = unwritten<A>(count);
    const auto unit = in_every_order([&, count = count, width = width] {
      auto out = unwritten<A>(count * width);
      EXPECT_LAUNCHED(launch_row_normalize(Element<TypeParam>::kDtype, rows.data(), out.data(),
                                           norm.data(), count, width, nullptr));
      return out;
    });
    expect_near(unit, units, 10 * Element<A>::kEpsilon, 0);
    expect_near(norm, norms, 10 * Element<A>::kEpsilon, 0);
  }
}

template <class A>
class CudaRowNormalizeBackward : public ::testing::Test {};
using ComputeTypes = ::testing::Types<float, double>;
TYPED_TEST_SUITE(CudaRowNormalizeBackward, ComputeTypes);

TYPED_TEST(CudaRowNormalizeBackward, IsTheProjectionOverTheLength) {
  using A = TypeParam;
  for (const auto& [count, width] : kShapes) {
    const auto grad = write_all<A>(normal(count * width, 1, 1));
    std::vector<double> rows = normal(count * width, 2, 2);
    std::vector<double> norms(count);
    for (int64_t r = 0; r < count; ++r) {
      double sum = 0;
      for (int64_t d = 0; d < width; ++d) sum += rows[r * width + d] * rows[r * width + d];
      norms[r] = std::sqrt(sum);
      for (int64_t d = 0; d < width; ++d) rows[r * width + d] /= norms[r];
    }
    norms[0] = 1e-13;  // shorter than 1e-12: the row was divided by a constant
    const auto unit = write_all<A>(rows);
    const auto norm = write_all<A>(norms);
    std::vector<double> expected;
    for (int64_t r = 0; r < count; ++r) {
      double along = 0;
      for (int64_t d = 0; d < width && r > 0; ++d) {
        along += double(unit[r * width + d]) * grad[r * width + d];
      }
      for (int64_t d = 0; d < width; ++d) {
        const double projected = grad[r * width + d] - along * unit[r * width + d];
        expected.push_back(projected / (r > 0 ? double(norm[r]) : 1e-12));
      }
    }
    const auto out = in_every_order([&, count = count, width = width] {
      auto result = unwritten<A>(count * width);
      EXPECT_LAUNCHED(launch_row_normalize_backward(Element<A>::kDtype, grad.data(), unit.data(),
                                                    norm.data(), result.data(), count, width,
                                                    nullptr));
      return result;
    });
    expect_near(out, expected, 20 * Element<A>::kEpsilon, 20 * Element<A>::kEpsilon);
  }
}

TEST(CudaRowNormalizeDtype, BackwardTakesTheComputeTypesOnly) {
  EXPECT_EQ(cudaErrorInvalidValue, launch_row_normalize_backward(Dtype::kFloat16, nullptr, nullptr,
                                                                 nullptr, nullptr, 1, 1, nullptr));
}

TYPED_TEST(CudaRowNormalize, NoRows) {
  ASSERT_LAUNCHED(
      launch_row_normalize(Element<TypeParam>::kDtype, nullptr, nullptr, nullptr, 0, 5, nullptr));
}

}  // namespace
}  // namespace crpt::cuda
