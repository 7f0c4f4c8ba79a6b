#include "kernels/sinkhorn.cuh"
#include "testing.h"

namespace crpt::cuda {
namespace {

struct Problem {
  int64_t items, batch, prototypes, iterations;
  double temperature;
};

double log_sum(const std::vector<double>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double value : x) sum += std::exp(value - top);
  return top + std::log(sum);
}

// The algorithm box, in log space, one item.
void expected_item(const double* scores, double* codes, const Problem& p) {
  const int64_t B = p.batch, M = p.prototypes;
  double top = -std::numeric_limits<double>::max();
  for (int64_t i = 0; i < B * M; ++i) top = std::max(top, scores[i]);
  std::vector<double> q(B * M);
  for (int64_t i = 0; i < B * M; ++i) q[i] = std::max((scores[i] - top) / p.temperature, -1e30);
  for (int64_t iteration = 0; iteration < p.iterations; ++iteration) {
    for (int64_t m = 0; m < M; ++m) {
      std::vector<double> column(B);
      for (int64_t b = 0; b < B; ++b) column[b] = q[b * M + m];
      const double sum = log_sum(column);
      for (int64_t b = 0; b < B; ++b) q[b * M + m] = q[b * M + m] - sum - std::log(double(M));
    }
    for (int64_t b = 0; b < B; ++b) {
      const double sum = log_sum({q.begin() + b * M, q.begin() + (b + 1) * M});
      for (int64_t m = 0; m < M; ++m) q[b * M + m] = q[b * M + m] - sum - std::log(double(B));
    }
  }
  for (int64_t b = 0; b < B; ++b) {
    const double sum = log_sum({q.begin() + b * M, q.begin() + (b + 1) * M});
    for (int64_t m = 0; m < M; ++m) codes[b * M + m] = std::exp(q[b * M + m] - sum);
  }
}

template <class T>
std::vector<double> expected_codes(const std::vector<T>& scores, const Problem& p) {
  const std::vector<double> s = read_all(scores);
  std::vector<double> codes(s.size());
  const int64_t size = p.batch * p.prototypes;
  for (int64_t item = 0; item < p.items; ++item) {
    expected_item(s.data() + item * size, codes.data() + item * size, p);
  }
  return codes;
}

template <class T>
std::vector<T> codes_of(const std::vector<T>& scores, const Problem& p) {
  using A = compute_t<T>;
  return in_every_order([&] {
    auto codes = unwritten<T>(static_cast<int64_t>(scores.size()));
    auto scratch = unwritten<A>(sinkhorn_scratch(p.items, p.batch, p.prototypes));
    std::vector<A> work;
    if (!std::is_same_v<T, A>) work = unwritten<A>(static_cast<int64_t>(scores.size()));
    void* work_data = work.empty() ? static_cast<void*>(codes.data()) : work.data();
    EXPECT_LAUNCHED(launch_sinkhorn(Element<T>::kDtype, scores.data(), codes.data(), work_data,
                                    scratch.data(), p.items, p.batch, p.prototypes, p.temperature,
                                    p.iterations, nullptr));
    return codes;
  });
}

template <class T>
class CudaSinkhorn : public ::testing::Test {};
TYPED_TEST_SUITE(CudaSinkhorn, FloatingTypes);

TYPED_TEST(CudaSinkhorn, FollowsTheFormula) {
  const Problem problems[] = {{1, 1, 1, 3, 0.1},   {1, 1, 7, 3, 0.1},   {2, 5, 1, 3, 0.1},
                              {3, 19, 17, 3, 0.1}, {1, 13, 65, 0, 0.3}, {1, 40, 33, 1, 0.1},
                              {2, 9, 130, 3, 0.1}, {1, 12, 20, 9, 0.1}};
  for (const Problem& p : problems) {
    SCOPED_TRACE(::testing::Message() << p.items << ' ' << p.batch << ' ' << p.prototypes);
    const auto scores =
        write_all<TypeParam>(normal(p.items * p.batch * p.prototypes, 0.3, unsigned(p.batch)));
    expect_near(codes_of(scores, p), expected_codes(scores, p),
                tolerance<TypeParam>(40 + 10.0 * p.iterations), 1e-7);
  }
}

// Ranges of 4, 39.9, 40.1, 400 and 4000 temperatures: exp space, then log space, item by item.
TYPED_TEST(CudaSinkhorn, BothPathsInOneCall) {
  const Problem p{5, 21, 34, 3, 1.0};
  const int64_t size = p.batch * p.prototypes;
  std::vector<double> values = normal(p.items * size, 1, 5);
  const double widths[] = {4, 39.9, 40.1, 400, 4000};
  for (int64_t item = 0; item < p.items; ++item) {
    const auto begin = values.begin() + item * size;
    const auto [low, high] = std::minmax_element(begin, begin + size);
    const double factor = widths[item] / (*high - *low);
    for (auto x = begin; x != begin + size; ++x) *x *= factor;
  }
  const auto scores = write_all<TypeParam>(values);
  expect_near(codes_of(scores, p), expected_codes(scores, p), tolerance<TypeParam>(4000 * 4.0),
              1e-6);
}

TYPED_TEST(CudaSinkhorn, CodesSumToOneWhateverTheScores) {
  const double infinity = std::numeric_limits<double>::infinity();
  const Problem p{4, 11, 6, 3, 0.1};
  const int64_t size = p.batch * p.prototypes;
  std::vector<double> values = normal(p.items * size, 0.2, 9);
  for (int64_t b = 0; b < p.batch; ++b) values[b * p.prototypes + 2] = -infinity;  // no mass
  for (int64_t m = 0; m < p.prototypes; ++m) values[size + m] = -infinity;  // a sample without mass
  for (int64_t i = 0; i < size; ++i) values[2 * size + i] = -infinity;
  for (int64_t i = 0; i < size; ++i) values[3 * size + i] = (i % 3 - 1) * 65000.0;  // huge
  const auto scores = write_all<TypeParam>(values);
  const auto codes = read_all(codes_of(scores, p));
  for (int64_t row = 0; row < p.items * p.batch; ++row) {
    double sum = 0;
    for (int64_t m = 0; m < p.prototypes; ++m) {
      ASSERT_TRUE(std::isfinite(codes[row * p.prototypes + m]));
      sum += codes[row * p.prototypes + m];
    }
    EXPECT_NEAR(sum, 1, 6 * Element<TypeParam>::kEpsilon + 1e-6);
  }
}

TYPED_TEST(CudaSinkhorn, NanStaysInItsItem) {
  const Problem p{2, 10, 5, 3, 0.1};
  std::vector<double> values = normal(100, 0.2, 3);
  values[17] = std::numeric_limits<double>::quiet_NaN();
  const auto codes = read_all(codes_of(write_all<TypeParam>(values), p));
  for (int i = 0; i < 50; ++i) EXPECT_TRUE(std::isnan(codes[i]));
  for (int i = 50; i < 100; ++i) EXPECT_TRUE(std::isfinite(codes[i]));
}

// More than 2,048 samples: the chunks that blocks carry grow.
TEST(CudaSinkhornFloat, ManySamples) {
  const Problem p{1, 2100, 3, 1, 0.2};
  const auto scores = write_all<float>(normal(p.batch * p.prototypes, 0.3, 1));
  expect_near(codes_of(scores, p), expected_codes(scores, p), tolerance<float>(50), 1e-7);
}

// The extremes lie in parts of the scores that different blocks look at: together they need log
// space.
TEST(CudaSinkhornFloat, ExtremesFarApart) {
  const Problem p{1, 70, 65, 3, 1.0};
  std::vector<double> values = normal(p.batch * p.prototypes, 1, 2);
  values[100] = 30;
  values[4400] = -30;
  const auto scores = write_all<float>(values);
  expect_near(codes_of(scores, p), expected_codes(scores, p), tolerance<float>(500), 1e-7);
}

TEST(CudaSinkhornFloat, TheWholeRangeOfFloat) {
  const Problem p{1, 6, 4, 3, 1e-3};
  const float most = std::numeric_limits<float>::max();
  std::vector<float> scores(24);
  for (int i = 0; i < 24; ++i) scores[i] = i % 5 == 0 ? most : (i % 3 == 0 ? -most : 1e-38f * i);
  for (float code : codes_of(scores, p)) EXPECT_TRUE(std::isfinite(code));
}

TEST(CudaSinkhornLaunches, TwoAndTwoForEachIteration) {
  for (int64_t iterations : {0, 1, 3}) {
    const long before = emulation::launch_count();
    std::vector<float> scores(6, 0.5f), codes(6), scratch(sinkhorn_scratch(1, 2, 3));
    ASSERT_LAUNCHED(launch_sinkhorn(Dtype::kFloat32, scores.data(), codes.data(), codes.data(),
                                    scratch.data(), 1, 2, 3, 0.1, iterations, nullptr));
    EXPECT_EQ(emulation::launch_count() - before, iterations == 0 ? 3 : 2 + 2 * iterations);
  }
}

TEST(CudaSinkhornLaunches, NoItems) {
  ASSERT_LAUNCHED(launch_sinkhorn(Dtype::kFloat32, nullptr, nullptr, nullptr, nullptr, 0, 2, 3, 0.1,
                                  3, nullptr));
}

}  // namespace
}  // namespace crpt::cuda
