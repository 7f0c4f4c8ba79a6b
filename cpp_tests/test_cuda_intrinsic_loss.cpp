#include "kernels/intrinsic_loss.cuh"
#include "testing.h"

namespace crpt::cuda {
namespace {

template <class T>
class CudaIntrinsicLoss : public ::testing::Test {};
TYPED_TEST_SUITE(CudaIntrinsicLoss, FloatingTypes);

TYPED_TEST(CudaIntrinsicLoss, LossAndWeights) {
  using T = TypeParam;
  using A = compute_t<T>;
  constexpr double kOffset = 1.5;
  constexpr int64_t kSizes[][2] = {{1, 1}, {1, 2}, {3, 31}, {2, 65}, {2, 128}, {1, 516}};
  for (const auto& [items, m] : kSizes) {
    const auto s = write_all<A>(normal(items * m * m, 0.2, unsigned(m)));
    std::vector<double> losses(items), expected(items * m * m);
    for (int64_t item = 0; item < items; ++item) {
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < m; ++j) {
          const int64_t at = (item * m + i) * m + j;
          expected[at] = i == j ? 0 : 1 / (double(m) * double(m) * (s[at] + kOffset));
          losses[item] += s[at] * expected[at];
        }
      }
    }
    auto loss = unwritten<T>(items);
    const auto weights = in_every_order([&, items = items, m = m] {
      std::vector<A> similarity_to_weights = s;
      auto row_loss = unwritten<A>(items * m);
      EXPECT_LAUNCHED(launch_intrinsic_loss(Element<T>::kDtype, similarity_to_weights.data(),
                                            loss.data(), row_loss.data(), items, m, kOffset,
                                            nullptr));
      return similarity_to_weights;
    });
    expect_near(weights, expected, 10 * Element<A>::kEpsilon, 0);
    expect_near(loss, losses, tolerance<T>(30), 30 * Element<A>::kEpsilon);
  }
}

}  // namespace
}  // namespace crpt::cuda
