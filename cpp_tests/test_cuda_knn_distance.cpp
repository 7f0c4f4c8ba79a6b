#include <numeric>

#include "kernels/knn_distance.cuh"
#include "testing.h"

namespace crpt::cuda {
namespace {

struct Sizes {
  int64_t queries, keys, width, k;
};
constexpr Sizes kSizes[] = {{1, 1, 1, 1},
                            {5, 3, 2, 3},
                            {7, 65, 33, 3},
                            {66, 70, 16, 1},
                            {3, 300, 5, 7},
                            {2, 300, 5, 300},
                            {4, 40, 130, 20},
                            // rows made of four neighbours, dimensions no multiple of a tile's
                            {65, 68, 20, 8},
                            {2, 132, 36, 9}};

template <class T>
double distance_of(const std::vector<T>& queries, int64_t b, const std::vector<T>& keys, int64_t q,
                   int64_t width) {
  double sum = 0;
  for (int64_t d = 0; d < width; ++d) {
    sum += std::pow(
        Element<T>::read(queries[b * width + d]) - Element<T>::read(keys[q * width + d]), 2);
  }
  return std::sqrt(sum);
}

template <class A>
struct Nearest {
  std::vector<A> distance;
  std::vector<int64_t> index;
};

template <class T>
Nearest<compute_t<T>> nearest_of(const std::vector<T>& queries, const std::vector<T>& keys,
                                 const Sizes& s) {
  using A = compute_t<T>;
  std::vector<int64_t> index(s.queries);
  auto distance = in_every_order([&] {
    auto out = unwritten<A>(s.queries);
    auto squares = unwritten<A>(s.queries * s.keys);
    std::fill(index.begin(), index.end(), -1);
    EXPECT_LAUNCHED(launch_knn_distance(Element<T>::kDtype, queries.data(), keys.data(),
                                        squares.data(), out.data(), index.data(), s.queries, s.keys,
                                        s.width, s.k, nullptr));
    return out;
  });
  return {distance, index};
}

template <class T>
class CudaKnnDistance : public ::testing::Test {};
TYPED_TEST_SUITE(CudaKnnDistance, FloatingTypes);

TYPED_TEST(CudaKnnDistance, TheKthNearest) {
  using T = TypeParam;
  using A = compute_t<T>;
  for (const Sizes& s : kSizes) {
    const auto queries = write_all<T>(normal(s.queries * s.width, 1, 1));
    const auto keys = write_all<T>(normal(s.keys * s.width, 1, 2));
    const auto [distance, index] = nearest_of(queries, keys, s);
    for (int64_t b = 0; b < s.queries; ++b) {
      std::vector<double> all;
      for (int64_t q = 0; q < s.keys; ++q) all.push_back(distance_of(queries, b, keys, q, s.width));
      ASSERT_TRUE(0 <= index[b] && index[b] < s.keys);
      const double of_index = all[index[b]];
      std::sort(all.begin(), all.end());
      const double step = 20 * Element<A>::kEpsilon;
      ASSERT_NEAR(distance[b], all[s.k - 1], step * all[s.k - 1]);
      ASSERT_NEAR(of_index, all[s.k - 1], step * all[s.k - 1]);
    }
  }
}

// Nearly equal vectors far from the origin: |q|^2 + |k|^2 - 2 q.k would return rounding noise.
TYPED_TEST(CudaKnnDistance, NearNeighboursDoNotCancel) {
  using T = TypeParam;
  const Sizes s{1, 5, 8, 2};
  const double step = 128 * Element<T>::kEpsilon;  // so that 128 + q * step is exact
  std::vector<double> values;
  for (int64_t q = 0; q < s.keys; ++q) {
    for (int64_t d = 0; d < s.width; ++d)
      values.push_back(128 + (d == 0 ? double(q + 1) * step : 0));
  }
  const auto [distance, index] =
      nearest_of(write_all<T>(std::vector<double>(s.width, 128)), write_all<T>(values), s);
  EXPECT_EQ(distance[0], 2 * step);
  EXPECT_EQ(index[0], 1);
}

TYPED_TEST(CudaKnnDistance, AmongEqualDistancesTheSmallerIndexIsNearer) {
  using T = TypeParam;
  constexpr int64_t kKeys = 600;  // more than one byte of index
  std::vector<double> values;
  for (int64_t q = 0; q < kKeys; ++q) values.push_back(q % 2 == 0 ? 1 : 2);
  const auto queries = write_all<T>({0.0});
  const auto keys = write_all<T>(values);
  for (int64_t k : {1, 2, 150, 300}) {
    const auto [distance, index] = nearest_of(queries, keys, {1, kKeys, 1, k});
    EXPECT_EQ(distance[0], 1);
    EXPECT_EQ(index[0], 2 * (k - 1));
  }
  EXPECT_EQ(nearest_of(queries, keys, {1, kKeys, 1, 301}).index[0], 1);
  EXPECT_EQ(nearest_of(queries, keys, {1, kKeys, 1, 600}).index[0], 599);
}

TYPED_TEST(CudaKnnDistance, InfinityThenNanAreFarthest) {
  using T = TypeParam;
  const auto queries = write_all<T>({0.0});
  const auto keys = write_all<T>({double(NAN), 3, double(INFINITY), -double(NAN), 0});
  const std::vector<double> expected{0, 3, INFINITY, NAN, NAN};
  const std::vector<int64_t> order{4, 1, 2, 0, 3};
  for (int64_t k = 1; k <= 5; ++k) {
    const auto [distance, index] = nearest_of(queries, keys, {1, 5, 1, k});
    EXPECT_EQ(index[0], order[k - 1]);
    expect_near(distance, {expected[k - 1]}, 0, 0);
  }
}

// More keys than warps that look for their queries: a warp has a run of keys, the last a short one.
TEST(CudaKnnDistanceValues, GradientsOfManyKeys) {
  const Sizes s{40, 9001, 2, 1};
  const auto queries = write_all<float>(normal(s.queries * s.width, 1, 6));
  const auto keys = write_all<float>(normal(s.keys * s.width, 1, 7));
  const std::vector<float> grad(s.queries, 1), distance(s.queries, 2);
  std::vector<int64_t> index;
  for (int64_t b = 0; b < s.queries; ++b) index.push_back(b % 3 == 0 ? 9000 : b % 3 + b / 9);
  std::vector<double> expected(s.keys * s.width);
  for (int64_t i = 0; i < s.queries * s.width; ++i) {
    const int64_t at = index[i / s.width] * s.width + i % s.width;
    expected[at] += (keys[at] - queries[i]) / 2.0;
  }
  auto got = unwritten<float>(s.keys * s.width);
  ASSERT_LAUNCHED(launch_knn_distance_backward_keys(
      Dtype::kFloat32, grad.data(), queries.data(), keys.data(), distance.data(), index.data(),
      got.data(), s.queries, s.keys, s.width, nullptr));
  expect_near(got, expected, 1e-6, 1e-6);
}

TYPED_TEST(CudaKnnDistance, GradientsOfQueriesAndKeys) {
  using T = TypeParam;
  using A = compute_t<T>;
  const Sizes s{70, 9, 35, 2};
  auto values = normal(s.queries * s.width, 1, 3);
  const auto queries = write_all<T>(values);
  auto key_values = normal(s.keys * s.width, 1, 4);
  for (int64_t d = 0; d < s.width; ++d) key_values[d] = Element<T>::read(queries[d]);
  const auto keys = write_all<T>(key_values);  // key 0 is query 0: distance 0
  const auto grad = write_all<A>(normal(s.queries, 1, 5));
  std::vector<int64_t> index;
  std::vector<A> distance;
  for (int64_t b = 0; b < s.queries; ++b) {
    index.push_back(b == 0 ? 0 : b * b % (s.keys - 1));  // the last key has no query
    distance.push_back(static_cast<A>(distance_of(queries, b, keys, index[b], s.width)));
  }
  std::vector<double> of_queries(s.queries * s.width), of_keys(s.keys * s.width);
  for (int64_t b = 0; b < s.queries; ++b) {
    for (int64_t d = 0; d < s.width && distance[b] > 0; ++d) {
      const double difference = Element<T>::read(queries[b * s.width + d]) -
                                Element<T>::read(keys[index[b] * s.width + d]);
      of_queries[b * s.width + d] = grad[b] * difference / distance[b];
      of_keys[index[b] * s.width + d] -= grad[b] * difference / distance[b];
    }
  }
  const auto query_grads = in_every_order([&] {
    auto out = unwritten<A>(s.queries * s.width);
    EXPECT_LAUNCHED(launch_knn_distance_backward_queries(
        Element<T>::kDtype, grad.data(), queries.data(), keys.data(), distance.data(), index.data(),
        out.data(), s.queries, s.keys, s.width, nullptr));
    return out;
  });
  const auto key_grads = in_every_order([&] {
    auto out = unwritten<A>(s.keys * s.width);
    EXPECT_LAUNCHED(launch_knn_distance_backward_keys(
        Element<T>::kDtype, grad.data(), queries.data(), keys.data(), distance.data(), index.data(),
        out.data(), s.queries, s.keys, s.width, nullptr));
    return out;
  });
  const double step = 100 * Element<A>::kEpsilon;
  expect_near(query_grads, of_queries, step, step);
  expect_near(key_grads, of_keys, step, step);
}

TEST(CudaKnnDistanceValues, NoQueriesAndBadIndices) {
  ASSERT_LAUNCHED(launch_knn_distance(Dtype::kFloat32, nullptr, nullptr, nullptr, nullptr, nullptr,
                                      0, 5, 3, 2, nullptr));
  const std::vector<float> one{1};
  std::vector<float> out(1);
  const int64_t bad = 1;
  EXPECT_EQ(cudaErrorAssert, launch_knn_distance_backward_queries(
                                 Dtype::kFloat32, one.data(), one.data(), one.data(), one.data(),
                                 &bad, out.data(), 1, 1, 1, nullptr));
}

}  // namespace
}  // namespace crpt::cuda
