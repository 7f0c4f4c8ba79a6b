#include <algorithm>
#include <limits>
#include <utility>

#include "kernels/knn_distance.h"
#include "levels.h"

namespace crpt {
namespace {

using testing::uniform;
CRPT_AT_EVERY_LEVEL(KnnDistance);

struct Found {
  std::vector<float> distance;
  std::vector<int64_t> index;
};

struct Centered {
  std::vector<float> queries, keys, query_norms, half_key_norms;
};

// Rows of queries lie D + gap elements apart, those of keys D + 2 gap.
Centered center(Isa level, const std::vector<float>& queries, const std::vector<float>& keys, int B,
                int Q, int D, int threads = 1, int64_t gap = 0) {
  Centered out{std::vector<float>(B * D, 42.0f), std::vector<float>(Q * D, 42.0f),
               std::vector<float>(B, 42.0f), std::vector<float>(Q, 42.0f)};
  CRPT_AT(level, knn_center)({.queries = queries.data(),
                              .keys = keys.data(),
                              .query_stride = D + gap,
                              .key_stride = D + 2 * gap,
                              .centered_queries = out.queries.data(),
                              .centered_keys = out.keys.data(),
                              .query_norms = out.query_norms.data(),
                              .half_key_norms = out.half_key_norms.data(),
                              .dtype = DType::f32,
                              .batch = B,
                              .count = Q,
                              .dim = D,
                              .threads = threads});
  return out;
}

// `noise` is added to the dots, in units of what the tolerance allows them.
Found run(Isa level, const std::vector<float>& queries, const std::vector<float>& keys, int B,
          int Q, int D, int k, double tolerance, int threads = 1, double noise = 0,
          int64_t gap = 0) {
  const Centered near = center(level, queries, keys, B, Q, D, threads, gap);
  std::mt19937 random(3);
  std::vector<float> dots(static_cast<size_t>(B) * Q);
  for (int b = 0; b < B; ++b) {
    for (int q = 0; q < Q; ++q) {
      float sum = 0;
      for (int d = 0; d < D; ++d) sum += near.queries[b * D + d] * near.keys[q * D + d];
      const double lengths = std::sqrt(2.0 * near.query_norms[b] * near.half_key_norms[q]);
      const double allowed = noise == 0 ? 0 : noise * tolerance / 4 * lengths;
      dots[b * Q + q] = static_cast<float>(sum + (random() % 2 ? allowed : -allowed));
    }
  }
  Found found{std::vector<float>(B), std::vector<int64_t>(B)};
  CRPT_AT(level, knn_distance)({.queries = queries.data(),
                                .keys = keys.data(),
                                .query_stride = D + gap,
                                .key_stride = D + 2 * gap,
                                .dots = dots.data(),
                                .query_norms = near.query_norms.data(),
                                .half_key_norms = near.half_key_norms.data(),
                                .distance = found.distance.data(),
                                .index = found.index.data(),
                                .dtype = DType::f32,
                                .batch = B,
                                .count = Q,
                                .dim = D,
                                .k = k,
                                .tolerance = tolerance,
                                .threads = threads});
  return found;
}

double tolerance_of(int D) { return 2 * (D + 8) * std::numeric_limits<float>::epsilon(); }

double kth(const float* query, const std::vector<float>& keys, int Q, int D, int k) {
  std::vector<double> distances;
  for (int q = 0; q < Q; ++q) {
    double sum = 0;
    for (int d = 0; d < D; ++d) {
      const double difference = static_cast<double>(query[d]) - keys[q * D + d];
      sum += difference * difference;
    }
    distances.push_back(std::sqrt(sum));
  }
  std::nth_element(distances.begin(), distances.begin() + k - 1, distances.end());
  return distances[k - 1];
}

TEST_P(KnnDistance, MatchesSorting) {
  for (const int Q : {1, 2, 63, 64, 65, 200}) {
    for (const int k : {1, 2, 3, 64, 200}) {
      if (k > Q) continue;
      const int B = 9, D = 13;
      const auto queries = testing::as<float>(uniform(B * D, 1, -1, 1));
      const auto keys = testing::as<float>(uniform(Q * D, 2, -1, 1));
      const Found found = run(GetParam(), queries, keys, B, Q, D, k, tolerance_of(D), 2);
      for (int b = 0; b < B; ++b) {
        const double exact = kth(&queries[b * D], keys, Q, D, k);
        ASSERT_NEAR(found.distance[b], exact, 1e-6 * (1 + exact));
      }
    }
  }
}

// Far from the origin the matrix product says nothing about small distances.
TEST_P(KnnDistance, NearlyEqualVectorsDoNotSufferCancellation) {
  const int B = 6, Q = 150, D = 16;
  auto queries = testing::as<float>(uniform(B * D, 1, 1000, 1000.01));
  auto keys = testing::as<float>(uniform(Q * D, 2, 1000, 1000.01));
  for (const int k : {1, 3, 20}) {
    const Found found = run(GetParam(), queries, keys, B, Q, D, k, tolerance_of(D));
    for (int b = 0; b < B; ++b) {
      const double exact = kth(&queries[b * D], keys, Q, D, k);
      ASSERT_NEAR(found.distance[b], exact, 1e-5 * exact);
    }
  }
}

// The offset is exact enough that differences far below the vectors' rounding error count.
TEST_P(KnnDistance, CentersByAnOffsetOfAllRows) {
  const int B = 5, Q = 700, D = 19;
  const auto queries = testing::as<float>(uniform(B * D, 1, 100, 101));
  const auto keys = testing::as<float>(uniform(Q * D, 2, 100, 101));
  const Centered near = center(GetParam(), queries, keys, B, Q, D, 3);
  for (int d = 0; d < D; ++d) {
    const float offset = keys[d] - near.keys[d];
    EXPECT_NEAR(offset, 100.5, 0.1);
    for (int q = 0; q < Q; ++q) ASSERT_NEAR(keys[q * D + d] - near.keys[q * D + d], offset, 1e-5);
    for (int b = 0; b < B; ++b) {
      ASSERT_NEAR(queries[b * D + d] - near.queries[b * D + d], offset, 1e-5);
    }
  }
  for (int q = 0; q < Q; ++q) {
    double sum = 0;
    for (int d = 0; d < D; ++d) sum += std::pow(near.keys[q * D + d], 2);
    ASSERT_NEAR(near.half_key_norms[q], sum / 2, 1e-6 * sum);
  }
}

// Dots as wrong as they may be change neither a bit of the distance nor the neighbour.
TEST_P(KnnDistance, ErrorsOfTheDotsDoNotShow) {
  const int B = 20, Q = 300, D = 16;
  for (const double width : {1.0, 1e-3}) {
    const auto queries = testing::as<float>(uniform(B * D, 1, 1 - width, 1 + width));
    const auto keys = testing::as<float>(uniform(Q * D, 2, 1 - width, 1 + width));
    for (const int k : {1, 3, 17, 300}) {
      const Found exact = run(GetParam(), queries, keys, B, Q, D, k, tolerance_of(D));
      const Found rough = run(GetParam(), queries, keys, B, Q, D, k, 0.02, 1, 1);
      EXPECT_EQ(rough.distance, exact.distance);
      EXPECT_EQ(rough.index, exact.index);
    }
  }
}

// Products, and norms, beyond the largest float rule nothing out: the distances are below it.
TEST_P(KnnDistance, OverflowingProductsHideNoNeighbour) {
  const std::vector<float> keys = {1.8e19f, 0, 1.2e19f, 0, 1.8e19f, 2e18f};
  for (const float query : {1.4e19f, 1.7e19f}) {
    std::vector<float> sorted;
    for (int q = 0; q < 3; ++q) {
      sorted.push_back(std::hypot(keys[2 * q] - query, keys[2 * q + 1]));
    }
    std::sort(sorted.begin(), sorted.end());
    for (int k = 1; k <= 3; ++k) {
      const Found found = run(GetParam(), {query, 0}, keys, 1, 3, 2, k, tolerance_of(2));
      EXPECT_NEAR(found.distance[0], sorted[k - 1], 1e-6 * sorted[k - 1]);
    }
  }
  // The product with the first key, or its norm, overflows; the second is nearer.
  EXPECT_EQ(
      run(GetParam(), {1e19f, 0}, {3.5e19f, 0, 1.5e19f, 0}, 1, 2, 2, 1, tolerance_of(2)).index[0],
      1);
  EXPECT_EQ(run(GetParam(), {1.9e19f, 0}, {1.81e19f, 0, 1.79e19f, 0, 1.89e19f, 0}, 1, 3, 2, 1,
                tolerance_of(2))
                .index[0],
            2);
}

TEST_P(KnnDistance, RowsMayLieApart) {
  const int B = 9, Q = 70, D = 13, gap = 3;
  const auto queries = testing::as<float>(uniform(B * D, 1, -1, 1));
  const auto keys = testing::as<float>(uniform(Q * D, 2, -1, 1));
  const auto far_queries = testing::apart(queries, D, D + gap);
  const auto far_keys = testing::apart(keys, D, D + 2 * gap);
  const Found found = run(GetParam(), queries, keys, B, Q, D, 3, tolerance_of(D));
  const Found apart =
      run(GetParam(), far_queries, far_keys, B, Q, D, 3, tolerance_of(D), 2, 0, gap);
  EXPECT_EQ(apart.distance, found.distance);
  EXPECT_EQ(apart.index, found.index);
  const std::vector<float> grad(B, 1);
  const auto gradients = [&](const std::vector<float>& q, const std::vector<float>& k, int64_t g) {
    std::pair got{std::vector<float>(B * D), std::vector<float>(Q * D)};
    CRPT_AT(GetParam(), knn_distance_backward)({.grad = grad.data(),
                                                .queries = q.data(),
                                                .keys = k.data(),
                                                .query_stride = D + g,
                                                .key_stride = D + 2 * g,
                                                .distance = found.distance.data(),
                                                .index = found.index.data(),
                                                .grad_queries = got.first.data(),
                                                .grad_keys = got.second.data(),
                                                .dtype = DType::f32,
                                                .batch = B,
                                                .count = Q,
                                                .dim = D,
                                                .threads = 2});
    return got;
  };
  EXPECT_EQ(gradients(far_queries, far_keys, gap), gradients(queries, keys, 0));
}

// Enough elements that three threads do start.
TEST_P(KnnDistance, BitsDoNotDependOnThreads) {
  const int B = 150, Q = 700, D = 64;
  const auto queries = testing::as<float>(uniform(B * D, 1, -1, 1));
  const auto keys = testing::as<float>(uniform(Q * D, 2, -1, 1));
  const auto grad = testing::as<float>(uniform(B, 3, -1, 1));
  const Found one = run(GetParam(), queries, keys, B, Q, D, 3, tolerance_of(D));
  const Found three = run(GetParam(), queries, keys, B, Q, D, 3, tolerance_of(D), 3);
  EXPECT_EQ(three.distance, one.distance);
  EXPECT_EQ(three.index, one.index);
  const auto gradients = [&](int threads) {
    std::pair got{std::vector<float>(B * D, 42.0f), std::vector<float>(Q * D, 42.0f)};
    CRPT_AT(GetParam(), knn_distance_backward)({.grad = grad.data(),
                                                .queries = queries.data(),
                                                .keys = keys.data(),
                                                .query_stride = D,
                                                .key_stride = D,
                                                .distance = one.distance.data(),
                                                .index = one.index.data(),
                                                .grad_queries = got.first.data(),
                                                .grad_keys = got.second.data(),
                                                .dtype = DType::f32,
                                                .batch = B,
                                                .count = Q,
                                                .dim = D,
                                                .threads = threads});
    return got;
  };
  EXPECT_EQ(gradients(3), gradients(1));
}

TEST_P(KnnDistance, EqualKeysCountEach) {
  const std::vector<float> queries = {0, 0}, keys = {1, 0, 0, 1, 3, 0, 0, 0};
  const double expected[] = {0, 1, 1, 3};
  for (int k = 1; k <= 4; ++k) {
    EXPECT_EQ(run(GetParam(), queries, keys, 1, 4, 2, k, tolerance_of(2)).distance[0],
              expected[k - 1]);
  }
}

TEST_P(KnnDistance, NanIsFartherThanEverything) {
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> queries = {0, 0}, keys = {nan, 0, 1, 0, infinity, 0, 2, 0};
  EXPECT_EQ(run(GetParam(), queries, keys, 1, 4, 2, 1, tolerance_of(2)).distance[0], 1);
  EXPECT_EQ(run(GetParam(), queries, keys, 1, 4, 2, 2, tolerance_of(2)).distance[0], 2);
  EXPECT_EQ(run(GetParam(), queries, keys, 1, 4, 2, 3, tolerance_of(2)).distance[0], infinity);
  EXPECT_TRUE(std::isnan(run(GetParam(), queries, keys, 1, 4, 2, 4, tolerance_of(2)).distance[0]));
}

TEST_P(KnnDistance, GradientIsTheUnitVectorFromTheKey) {
  const double grad[] = {2, 5, 7}, queries[] = {3, 4, 1, 1, 0, 6}, keys[] = {0, 0, 1, 1};
  const double distance[] = {5, 0, 6};
  const int64_t index[] = {0, 1, 0};
  double grad_queries[6], grad_keys[4];
  for (const int threads : {1, 2}) {
    CRPT_AT(GetParam(), knn_distance_backward)({.grad = grad,
                                                .queries = queries,
                                                .keys = keys,
                                                .query_stride = 2,
                                                .key_stride = 2,
                                                .distance = distance,
                                                .index = index,
                                                .grad_queries = grad_queries,
                                                .grad_keys = grad_keys,
                                                .dtype = DType::f64,
                                                .batch = 3,
                                                .count = 2,
                                                .dim = 2,
                                                .threads = threads});
    const double to_queries[] = {1.2, 1.6, 0, 0, 0, 7}, to_keys[] = {-1.2, -8.6, 0, 0};
    for (int i = 0; i < 6; ++i) EXPECT_DOUBLE_EQ(grad_queries[i], to_queries[i]);
    for (int i = 0; i < 4; ++i) EXPECT_DOUBLE_EQ(grad_keys[i], to_keys[i]);
  }
}

TEST_P(KnnDistance, BackwardNamesTheIndexThatIsOutOfRange) {
  const float ones[6] = {1, 1, 1, 1, 1, 1};
  for (const int64_t wrong : {int64_t{-1}, int64_t{2}, INT64_MAX, INT64_MIN}) {
    const int64_t index[] = {0, wrong, 1};
    float grad_queries[6] = {42, 42, 42, 42, 42, 42}, grad_keys[4] = {42, 42, 42, 42};
    const BadValue bad = CRPT_AT(GetParam(), knn_distance_backward)({.grad = ones,
                                                                     .queries = ones,
                                                                     .keys = ones,
                                                                     .query_stride = 2,
                                                                     .key_stride = 2,
                                                                     .distance = ones,
                                                                     .index = index,
                                                                     .grad_queries = grad_queries,
                                                                     .grad_keys = grad_keys,
                                                                     .dtype = DType::f32,
                                                                     .batch = 3,
                                                                     .count = 2,
                                                                     .dim = 2,
                                                                     .threads = 2});
    ASSERT_STREQ(bad.argument, "index");
    EXPECT_EQ(bad.position, 1);
    EXPECT_EQ(bad.value, wrong);
    EXPECT_EQ(bad.high, 1);
    for (const float x : grad_queries) EXPECT_EQ(x, 42);  // nothing was written
    for (const float x : grad_keys) EXPECT_EQ(x, 42);
  }
}

}  // namespace
}  // namespace crpt
