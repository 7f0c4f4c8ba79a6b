#include "kernels/row_normalize.h"
#include "levels.h"

namespace crpt {
namespace {

using testing::coarse;
CRPT_AT_EVERY_LEVEL(RowNormalize);

TEST_P(RowNormalize, UnitRowsAndLengths) {
  for (const int D : {1, 7, 16, 33, 128}) {
    const int R = 5;
    auto rows = coarse(R * D, D);
    for (int d = 0; d < D; ++d) rows[2 * D + d] = 0;  // a zero row stays zero
    const auto stored = testing::as_bf16(rows);
    std::vector<float> unit(R * D), norm(R);
    CRPT_AT(GetParam(), row_normalize)({.rows = stored.data(),
                                        .stride = D,
                                        .unit = unit.data(),
                                        .norm = norm.data(),
                                        .dtype = DType::bf16,
                                        .count = R,
                                        .dim = D,
                                        .threads = 2});
    for (int r = 0; r < R; ++r) {
      double square = 0;
      for (int d = 0; d < D; ++d) square += rows[r * D + d] * rows[r * D + d];
      ASSERT_NEAR(norm[r], std::sqrt(square), 1e-6 * std::sqrt(square));
      for (int d = 0; d < D; ++d) {
        ASSERT_NEAR(unit[r * D + d], rows[r * D + d] / std::max(std::sqrt(square), 1e-12), 3e-7);
      }
    }
  }
}

TEST_P(RowNormalize, GradientMatchesFiniteDifferences) {
  const int D = 19;
  const auto row = coarse(D, 1), grad = coarse(D, 2);
  const auto loss = [&](const std::vector<double>& x) {
    double square = 0, sum = 0;
    for (int d = 0; d < D; ++d) square += x[d] * x[d];
    for (int d = 0; d < D; ++d) sum += grad[d] * x[d] / std::sqrt(square);
    return sum;
  };
  std::vector<double> unit(D), norm(1), got(D);
  CRPT_AT(GetParam(), row_normalize)({.rows = row.data(),
                                      .stride = D,
                                      .unit = unit.data(),
                                      .norm = norm.data(),
                                      .dtype = DType::f64,
                                      .count = 1,
                                      .dim = D,
                                      .threads = 1});
  CRPT_AT(GetParam(), row_normalize_backward)({.grad = grad.data(),
                                               .unit = unit.data(),
                                               .norm = norm.data(),
                                               .grad_rows = got.data(),
                                               .dtype = DType::f64,
                                               .count = 1,
                                               .dim = D,
                                               .threads = 1});
  for (int d = 0; d < D; ++d) {
    auto up = row, down = row;
    up[d] += 1e-5;
    down[d] -= 1e-5;
    ASSERT_NEAR(got[d], (loss(up) - loss(down)) / 2e-5, 1e-8);
  }
}

TEST_P(RowNormalize, RowsMayLieApart) {
  const int64_t R = 9, D = 21, stride = 30;
  const auto rows = testing::as<float>(coarse(R * D, 1));
  const auto computed = [&](const std::vector<float>& laid, int64_t from_row_to_row) {
    std::pair got{std::vector<float>(R * D), std::vector<float>(R)};
    CRPT_AT(GetParam(), row_normalize)({.rows = laid.data(),
                                        .stride = from_row_to_row,
                                        .unit = got.first.data(),
                                        .norm = got.second.data(),
                                        .dtype = DType::f32,
                                        .count = R,
                                        .dim = D,
                                        .threads = 2});
    return got;
  };
  EXPECT_EQ(computed(testing::apart(rows, D, stride), stride), computed(rows, D));
}

// Enough elements that three threads do start.
TEST_P(RowNormalize, BitsDoNotDependOnThreads) {
  const int64_t R = 501, D = 129;
  const auto rows = testing::as<float>(coarse(R * D, 1)),
             grad = testing::as<float>(coarse(R * D, 2));
  const auto computed = [&](int threads) {
    std::vector<std::vector<float>> got = {std::vector<float>(R * D, 42.0f),
                                           std::vector<float>(R, 42.0f),
                                           std::vector<float>(R * D, 42.0f)};
    CRPT_AT(GetParam(), row_normalize)({.rows = rows.data(),
                                        .stride = D,
                                        .unit = got[0].data(),
                                        .norm = got[1].data(),
                                        .dtype = DType::f32,
                                        .count = R,
                                        .dim = D,
                                        .threads = threads});
    CRPT_AT(GetParam(), row_normalize_backward)({.grad = grad.data(),
                                                 .unit = got[0].data(),
                                                 .norm = got[1].data(),
                                                 .grad_rows = got[2].data(),
                                                 .dtype = DType::f32,
                                                 .count = R,
                                                 .dim = D,
                                                 .threads = threads});
    return got;
  };
  EXPECT_EQ(computed(3), computed(1));
}

TEST_P(RowNormalize, BelowTheShortestLengthTheDivisorIsConstant) {
  const double unit[2] = {0, 0}, norm[1] = {0}, grad[2] = {3, -4};
  double got[2];
  CRPT_AT(GetParam(), row_normalize_backward)({.grad = grad,
                                               .unit = unit,
                                               .norm = norm,
                                               .grad_rows = got,
                                               .dtype = DType::f64,
                                               .count = 1,
                                               .dim = 2,
                                               .threads = 1});
  EXPECT_DOUBLE_EQ(got[0], 3e12);
  EXPECT_DOUBLE_EQ(got[1], -4e12);
}

}  // namespace
}  // namespace crpt
