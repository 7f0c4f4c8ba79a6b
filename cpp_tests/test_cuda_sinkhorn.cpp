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
std::vector<T> codes_with(const std::vector<T>& scores, const Problem& p, int64_t cluster) {
  return in_every_order([&] {
    auto codes = unwritten<T>(static_cast<int64_t>(scores.size()));
    const int64_t bytes =
        cluster == 0 ? sinkhorn_scratch(Element<T>::kDtype, p.items, p.batch, p.prototypes) : 0;
    auto scratch = unwritten<double>(bytes / 8 + 1);
    EXPECT_LAUNCHED(launch_sinkhorn(Element<T>::kDtype, scores.data(), codes.data(), scratch.data(),
                                    p.items, p.batch, p.prototypes, p.temperature, p.iterations,
                                    cluster, nullptr));
    return codes;
  });
}

// Every way to run: a cooperative grid (0), one block, and clusters.
constexpr int64_t kClusters[] = {0, 1, 2, 4};

template <class T, class Check>
void in_every_way(const std::vector<T>& scores, const Problem& p, Check check) {
  for (const int64_t cluster : kClusters) {
    SCOPED_TRACE(::testing::Message() << "cluster " << cluster << ", " << p.items << " x "
                                      << p.batch << " x " << p.prototypes);
    check(codes_with(scores, p, cluster));
  }
}

template <class T>
class CudaSinkhorn : public ::testing::Test {};
TYPED_TEST_SUITE(CudaSinkhorn, FloatingTypes);

TYPED_TEST(CudaSinkhorn, FollowsTheFormula) {
  const Problem problems[] = {{1, 1, 1, 3, 0.1},
                              {1, 1, 7, 3, 0.1},
                              {2, 5, 1, 3, 0.1},
                              {3, 19, 17, 3, 0.1},
                              {1, 13, 65, 0, 0.3},
                              {1, 40, 33, 1, 0.1},
                              {2, 9, 130, 3, 0.1},
                              {1, 12, 20, 9, 0.1},
                              // In registers: all tiles, full and not; blocks without samples.
                              {2, 37, 36, 2, 0.1},
                              {1, 48, 512, 3, 0.1},
                              {3, 5, 132, 3, 0.1},
                              {1, 33, 640, 3, 0.1},
                              {1, 13, 1024, 3, 0.1}};
  for (const Problem& p : problems) {
    const auto scores =
        write_all<TypeParam>(normal(p.items * p.batch * p.prototypes, 0.3, unsigned(p.batch)));
    const auto expected = expected_codes(scores, p);
    in_every_way(scores, p, [&](const auto& codes) {
      expect_near(codes, expected, tolerance<TypeParam>(40 + 10.0 * p.iterations), 1e-7);
    });
  }
}

// Ranges of 4, 39.9, 40.1, 400 and 4000 temperatures: exp space, then log space, item by item.
TYPED_TEST(CudaSinkhorn, BothPathsInOneCall) {
  for (const int64_t prototypes : {34, 36}) {
    const Problem p{5, 21, prototypes, 3, 1.0};
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
    const auto expected = expected_codes(scores, p);
    in_every_way(scores, p, [&](const auto& codes) {
      expect_near(codes, expected, tolerance<TypeParam>(4000 * 4.0), 1e-6);
    });
  }
}

TYPED_TEST(CudaSinkhorn, CodesSumToOneWhateverTheScores) {
  for (const int64_t prototypes : {6, 8}) {
    const double infinity = std::numeric_limits<double>::infinity();
    const Problem p{4, 11, prototypes, 3, 0.1};
    const int64_t size = p.batch * p.prototypes;
    std::vector<double> values = normal(p.items * size, 0.2, 9);
    for (int64_t b = 0; b < p.batch; ++b) values[b * p.prototypes + 2] = -infinity;  // no mass
    for (int64_t m = 0; m < p.prototypes; ++m)
      values[size + m] = -infinity;  // a sample without mass
    for (int64_t i = 0; i < size; ++i) values[2 * size + i] = -infinity;
    for (int64_t i = 0; i < size; ++i) values[3 * size + i] = (i % 3 - 1) * 65000.0;  // huge
    const auto scores = write_all<TypeParam>(values);
    in_every_way(scores, p, [&](const auto& of_type) {
      const auto codes = read_all(of_type);
      for (int64_t row = 0; row < p.items * p.batch; ++row) {
        double sum = 0;
        for (int64_t m = 0; m < p.prototypes; ++m) {
          ASSERT_TRUE(std::isfinite(codes[row * p.prototypes + m]));
          sum += codes[row * p.prototypes + m];
        }
        EXPECT_NEAR(sum, 1, prototypes * Element<TypeParam>::kEpsilon + 1e-6);
      }
    });
  }
}

TYPED_TEST(CudaSinkhorn, NanStaysInItsItem) {
  for (const int64_t prototypes : {5, 8}) {
    const Problem p{2, 10, prototypes, 3, 0.1};
    std::vector<double> values = normal(20 * prototypes, 0.2, 3);
    values[17] = std::numeric_limits<double>::quiet_NaN();
    in_every_way(write_all<TypeParam>(values), p, [&](const auto& of_type) {
      const auto codes = read_all(of_type);
      for (int i = 0; i < 10 * prototypes; ++i) EXPECT_TRUE(std::isnan(codes[i]));
      for (int i = 10 * prototypes; i < 20 * prototypes; ++i) EXPECT_TRUE(std::isfinite(codes[i]));
    });
  }
}

// Clusters of which the last blocks have few samples or none, in exp and in log space.
TEST(CudaSinkhornFloat, ClustersLargerThanTheirItems) {
  for (const double temperature : {0.1, 0.01}) {
    const Problem p{2, 9, 20, 2, temperature};
    const auto scores = write_all<float>(normal(p.items * p.batch * p.prototypes, 0.3, 6));
    const auto expected = expected_codes(scores, p);
    for (const int64_t cluster : {4, 16}) {
      expect_near(codes_with(scores, p, cluster), expected, tolerance<float>(300), 1e-7);
    }
  }
}

// More than 2,048 samples: the chunks that blocks carry grow.
TEST(CudaSinkhornFloat, ManySamples) {
  const Problem p{1, 2100, 3, 1, 0.2};
  const auto scores = write_all<float>(normal(p.batch * p.prototypes, 0.3, 1));
  for (const int64_t cluster : {0, 8}) {
    expect_near(codes_with(scores, p, cluster), expected_codes(scores, p), tolerance<float>(50),
                1e-7);
  }
}

// The extremes lie in parts of the scores that different blocks look at: together they need log
// space.
TEST(CudaSinkhornFloat, ExtremesFarApart) {
  for (const int64_t prototypes : {65, 68}) {
    const Problem p{1, 70, prototypes, 3, 1.0};
    std::vector<double> values = normal(p.batch * p.prototypes, 1, 2);
    values[100] = 30;
    values[4400] = -30;
    const auto scores = write_all<float>(values);
    const auto expected = expected_codes(scores, p);
    in_every_way(scores, p, [&](const auto& codes) {
      expect_near(codes, expected, tolerance<float>(500), 1e-7);
    });
  }
}

TEST(CudaSinkhornFloat, TheWholeRangeOfFloat) {
  const Problem p{1, 6, 4, 3, 1e-3};
  const float most = std::numeric_limits<float>::max();
  std::vector<float> scores(24);
  for (int i = 0; i < 24; ++i) scores[i] = i % 5 == 0 ? most : (i % 3 == 0 ? -most : 1e-38f * i);
  in_every_way(scores, p, [](const auto& codes) {
    for (float code : codes) EXPECT_TRUE(std::isfinite(code));
  });
}

// Scores and codes that do not begin at a multiple of 16 bytes, with rows that do.
TEST(CudaSinkhornFloat, Unaligned) {
  const Problem p{2, 9, 8, 2, 0.1};
  const auto scores = write_all<float>(normal(p.items * p.batch * p.prototypes, 0.3, 4));
  const auto expected = expected_codes(scores, p);
  std::vector<float> shifted{0};
  shifted.insert(shifted.end(), scores.begin(), scores.end());
  for (const int64_t cluster : kClusters) {
    std::vector<float> codes(shifted.size());
    std::vector<double> scratch(sinkhorn_scratch(Dtype::kFloat32, 2, 9, 8));
    ASSERT_LAUNCHED(launch_sinkhorn(Dtype::kFloat32, shifted.data() + 1, codes.data() + 1,
                                    scratch.data(), 2, 9, 8, 0.1, 2, cluster, nullptr));
    expect_near(std::vector<float>(codes.begin() + 1, codes.end()), expected, tolerance<float>(60),
                1e-7);
  }
}

// 1 / T overflows: only log space can hold these scores.
TEST(CudaSinkhornFloat, TheSmallestTemperature) {
  for (const int64_t prototypes : {3, 4}) {
    const Problem p{1, 5, prototypes, 3, 1e-39};
    std::vector<float> scores(5 * prototypes, 0.25f);
    in_every_way(scores, p, [&](const auto& codes) {
      for (float code : codes) EXPECT_NEAR(code, 1.0 / prototypes, 1e-6);
    });
  }
}

class CudaSinkhornPlan : public ::testing::Test {
 protected:
  void TearDown() override { emulation::set_properties({}); }
  static SinkhornPlan plan(Dtype dtype, int64_t items, int64_t batch, int64_t prototypes) {
    SinkhornPlan out{-1, -1};
    EXPECT_EQ(cudaSuccess, plan_sinkhorn(dtype, items, batch, prototypes, &out));
    EXPECT_EQ(out.scratch,
              out.cluster != 0 ? 0 : sinkhorn_scratch(dtype, items, batch, prototypes));
    return out;
  }
};

TEST_F(CudaSinkhornPlan, AsManyBlocksAsHaveEnoughToDo) {
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 1, 1).cluster, 1);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 10, 128).cluster, 1);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 128, 126).cluster, 1);  // no packs: in shared memory
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 128, 128).cluster, 4);
  EXPECT_EQ(plan(Dtype::kBFloat16, 64, 256, 512).cluster, 8);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 512, 512).cluster, 16);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 512, 510).cluster, 8);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 1024, 512).cluster, 16);
  EXPECT_EQ(plan(Dtype::kFloat64, 1, 512, 512).cluster, 16);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 4096, 2048).cluster, 0);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 65536, 8192).cluster, 0);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, int64_t{1} << 40, 1).cluster, 0);
}

TEST_F(CudaSinkhornPlan, DevicesWithLess) {
  emulation::set_properties({.cluster = 8});
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 512, 512).cluster, 8);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 1024, 512).cluster, 0);
  emulation::set_properties({.cluster = 1, .ptx = 80, .shared = 163 << 10});
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 128, 128).cluster, 1);
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 512, 512).cluster, 0);
  emulation::set_properties({.ptx = 80});  // the code knows no clusters, though the device does
  EXPECT_EQ(plan(Dtype::kFloat32, 1, 512, 512).cluster, 0);
}

// What the plan promises, on chip: one problem of the size that pre-training has.
TEST_F(CudaSinkhornPlan, TheUsualSize) {
  const Problem p{1, 512, 512, 3, 0.1};
  const auto scores = write_all<float>(normal(p.batch * p.prototypes, 0.3, 8));
  std::vector<float> codes(scores.size());
  ASSERT_LAUNCHED(launch_sinkhorn(Dtype::kFloat32, scores.data(), codes.data(), nullptr, 1, 512,
                                  512, 0.1, 3, plan(Dtype::kFloat32, 1, 512, 512).cluster,
                                  nullptr));
  expect_near(codes, expected_codes(scores, p), tolerance<float>(60), 1e-7);
}

TEST(CudaSinkhornLaunches, One) {
  for (const int64_t cluster : kClusters) {
    for (int64_t iterations : {0, 1, 3}) {
      const long before = emulation::launch_count();
      std::vector<float> scores(6, 0.5f), codes(6);
      std::vector<double> scratch(sinkhorn_scratch(Dtype::kFloat32, 1, 2, 3));
      ASSERT_LAUNCHED(launch_sinkhorn(Dtype::kFloat32, scores.data(), codes.data(), scratch.data(),
                                      1, 2, 3, 0.1, iterations, cluster, nullptr));
      EXPECT_EQ(emulation::launch_count() - before, 1);
    }
  }
}

// What a kernel may have of shared memory is set for all threads: a small item must not take it
// from a large one that another thread is about to start. The emulation refuses that.
TEST(CudaSinkhornLaunches, ASmallItemAfterALargeOne) {
  for (const int64_t prototypes : {4096, 3}) {
    std::vector<float> scores(4 * prototypes, 0.5f), codes(scores.size());
    ASSERT_LAUNCHED(launch_sinkhorn(Dtype::kFloat32, scores.data(), codes.data(), nullptr, 1, 4,
                                    prototypes, 0.1, 0, 1, nullptr));
  }
}

TEST(CudaSinkhornLaunches, NoItems) {
  for (const int64_t cluster : kClusters) {
    ASSERT_LAUNCHED(launch_sinkhorn(Dtype::kFloat32, nullptr, nullptr, nullptr, 0, 2, 3, 0.1, 3,
                                    cluster, nullptr));
  }
}

}  // namespace
}  // namespace crpt::cuda
