#include <algorithm>
#include <tuple>

#include "kernels/intrinsic_loss.h"
#include "kernels/prototype_loss.h"
#include "kernels/prototype_objective.h"
#include "kernels/row_normalize.h"
#include "levels.h"

namespace crpt {
namespace {

using testing::coarse;
using testing::uniform;
CRPT_AT_EVERY_LEVEL(PrototypeObjective);

struct Sizes {
  int64_t problems, samples, prototypes;
};
// More samples than prototypes, fewer, no whole band of either; the last with work for 3 threads.
constexpr Sizes kSizes[] = {{1, 1, 1}, {2, 40, 3}, {2, 3, 40}, {3, 17, 33}, {1, 301, 257}};

TEST_P(PrototypeObjective, RowsAreUnitEmbeddingsAbovePrototypes) {
  const int64_t D = 37;
  for (const auto& [P, B, M] : kSizes) {
    const auto embeddings = testing::as_bf16(coarse(P * B * D, 1));
    const auto prototypes = testing::as_bf16(coarse(P * M * D, 2));
    std::vector<float> rows(P * (B + M) * D), norm(P * B), unit(P * B * D), expected_norm(P * B);
    CRPT_AT(GetParam(), prototype_objective_rows)({.embeddings = embeddings.data(),
                                                   .prototypes = prototypes.data(),
                                                   .embedding_stride = D,
                                                   .prototype_stride = D,
                                                   .rows = rows.data(),
                                                   .norm = norm.data(),
                                                   .dtype = DType::bf16,
                                                   .problems = P,
                                                   .samples = B,
                                                   .count = M,
                                                   .dim = D,
                                                   .threads = 3});
    CRPT_AT(GetParam(), row_normalize)({.rows = embeddings.data(),
                                        .stride = D,
                                        .unit = unit.data(),
                                        .norm = expected_norm.data(),
                                        .dtype = DType::bf16,
                                        .count = P * B,
                                        .dim = D,
                                        .threads = 1});
    EXPECT_EQ(norm, expected_norm);
    for (int64_t p = 0; p < P; ++p) {
      const float* of_problem = &rows[p * (B + M) * D];
      for (int64_t i = 0; i < B * D; ++i) ASSERT_EQ(of_problem[i], unit[p * B * D + i]);
      for (int64_t i = 0; i < M * D; ++i) {
        ASSERT_EQ(of_problem[B * D + i], testing::value(prototypes[p * M * D + i]));
      }
    }
  }
}

TEST_P(PrototypeObjective, EmbeddingsAndPrototypesMayLieApart) {
  const int64_t P = 2, B = 5, M = 7, D = 11;
  const auto embeddings = testing::as<float>(coarse(P * B * D, 1));
  const auto prototypes = testing::as<float>(coarse(P * M * D, 2));
  const auto computed = [&](const std::vector<float>& e, int64_t embedding_stride,
                            const std::vector<float>& c, int64_t prototype_stride) {
    std::pair got{std::vector<float>(P * (B + M) * D), std::vector<float>(P * B)};
    CRPT_AT(GetParam(), prototype_objective_rows)({.embeddings = e.data(),
                                                   .prototypes = c.data(),
                                                   .embedding_stride = embedding_stride,
                                                   .prototype_stride = prototype_stride,
                                                   .rows = got.first.data(),
                                                   .norm = got.second.data(),
                                                   .dtype = DType::f32,
                                                   .problems = P,
                                                   .samples = B,
                                                   .count = M,
                                                   .dim = D,
                                                   .threads = 2});
    return got;
  };
  EXPECT_EQ(computed(testing::apart(embeddings, D, 13), 13, testing::apart(prototypes, D, 22), 22),
            computed(embeddings, D, prototypes, D));
}

constexpr double kTemperature = 0.1, kWeight = 0.3, kOffset = 1.5;

template <typename A>
struct Results {
  std::vector<A> products, loss, comparison, intrinsic;
  bool operator==(const Results&) const = default;
};

template <typename A>
Results<A> at_once(Isa level, const Sizes& size, const std::vector<double>& products,
                   const std::vector<double>& codes, DType dtype, int threads) {
  const auto [P, B, M] = size;
  Results<A> got{testing::as<A>(products), std::vector<A>(P), std::vector<A>(P), std::vector<A>(P)};
  const std::vector<A> q = testing::as<A>(codes);
  CRPT_AT(level, prototype_objective)({.products = got.products.data(),
                                       .codes = q.data(),
                                       .code_stride = M,
                                       .loss = got.loss.data(),
                                       .comparison = got.comparison.data(),
                                       .intrinsic = got.intrinsic.data(),
                                       .dtype = dtype,
                                       .problems = P,
                                       .samples = B,
                                       .prototypes = M,
                                       .temperature = kTemperature,
                                       .intrinsic_weight = kWeight,
                                       .offset = kOffset,
                                       .threads = threads});
  return got;
}

// The two losses' own kernels, in double, one problem after the other.
Results<double> apart(Isa level, const Sizes& size, const std::vector<double>& products,
                      const std::vector<double>& codes) {
  const auto [P, B, M] = size;
  Results<double> got{products, std::vector<double>(P), std::vector<double>(P),
                      std::vector<double>(P)};
  for (int64_t p = 0; p < P; ++p) {
    std::vector<double> lse(B), grad(B * M);
    double* const scores = &got.products[p * (B + M) * M];
    double* const weights = scores + B * M;
    CRPT_AT(level, prototype_loss)({.scores = scores,
                                    .codes = &codes[p * B * M],
                                    .score_stride = M,
                                    .code_stride = M,
                                    .loss = &got.comparison[p],
                                    .logsumexp = lse.data(),
                                    .gradient = grad.data(),
                                    .dtype = DType::f64,
                                    .problems = 1,
                                    .samples = B,
                                    .prototypes = M,
                                    .temperature = kTemperature,
                                    .threads = 1});
    std::copy(grad.begin(), grad.end(), scores);
    CRPT_AT(level, intrinsic_loss)({.weights = weights,
                                    .loss = &got.intrinsic[p],
                                    .dtype = DType::f64,
                                    .problems = 1,
                                    .prototypes = M,
                                    .offset = kOffset,
                                    .threads = 1});
    for (int64_t i = 0; i < M * M; ++i) weights[i] *= kWeight;
    got.loss[p] = got.comparison[p] + kWeight * got.intrinsic[p];
  }
  return got;
}

TEST_P(PrototypeObjective, IsBothLossesAndTheirGradients) {
  for (const Sizes& size : kSizes) {
    const auto [P, B, M] = size;
    const auto products = coarse(P * (B + M) * M, 3);
    const auto codes = uniform(P * B * M, 4, 0, 2.0 / static_cast<double>(M));
    const auto expected = apart(GetParam(), size, products, codes);
    const auto got64 = at_once<double>(GetParam(), size, products, codes, DType::f64, 1);
    const auto got32 = at_once<float>(GetParam(), size, products, codes, DType::f32, 1);
    EXPECT_EQ(at_once<double>(GetParam(), size, products, codes, DType::f64, 3), got64);
    EXPECT_EQ(at_once<float>(GetParam(), size, products, codes, DType::f32, 3), got32);
    for (int64_t p = 0; p < P; ++p) {
      const double loss = expected.loss[p], step = 1 + std::abs(loss);
      ASSERT_NEAR(got64.loss[p], loss, 1e-13 * step);
      ASSERT_NEAR(got64.comparison[p], expected.comparison[p], 1e-13 * step);
      ASSERT_NEAR(got64.intrinsic[p], expected.intrinsic[p], 1e-13);
      ASSERT_NEAR(got32.loss[p], loss, 1e-6 * step);
      ASSERT_NEAR(got32.comparison[p], expected.comparison[p], 1e-6 * step);
      ASSERT_NEAR(got32.intrinsic[p], expected.intrinsic[p], 1e-6);
    }
    const double largest = 10 / static_cast<double>(B);
    for (size_t i = 0; i < expected.products.size(); ++i) {
      const double value = expected.products[i];
      ASSERT_NEAR(got64.products[i], value, 1e-14 * largest);
      const bool of_scores = static_cast<int64_t>(i) % ((B + M) * M) < B * M;
      ASSERT_NEAR(got32.products[i], value, of_scores ? 2e-6 * largest : 1e-6 * std::abs(value));
    }
  }
}

// Losses in the storage type, everything else in float; of codes whose rows lie apart.
TEST_P(PrototypeObjective, LossesAreRoundedToTheirType) {
  const Sizes size{2, 5, 7};
  const auto products = coarse(2 * 12 * 7, 3), codes = uniform(2 * 5 * 7, 4, 0, 0.2);
  const auto expected = at_once<float>(GetParam(), size, products, codes, DType::f32, 1);
  auto x = testing::as<float>(products);
  const auto q = testing::apart(testing::as<float>(codes), 7, 9);
  std::vector<BFloat16> loss(2), comparison(2), intrinsic(2);
  CRPT_AT(GetParam(), prototype_objective)({.products = x.data(),
                                            .codes = q.data(),
                                            .code_stride = 9,
                                            .loss = loss.data(),
                                            .comparison = comparison.data(),
                                            .intrinsic = intrinsic.data(),
                                            .dtype = DType::bf16,
                                            .problems = 2,
                                            .samples = 5,
                                            .prototypes = 7,
                                            .temperature = kTemperature,
                                            .intrinsic_weight = kWeight,
                                            .offset = kOffset,
                                            .threads = 1});
  EXPECT_EQ(x, expected.products);
  for (int p = 0; p < 2; ++p) {
    const double half_ulp = 0x1p-9;
    ASSERT_NEAR(testing::value(loss[p]), expected.loss[p], half_ulp * std::abs(expected.loss[p]));
    ASSERT_NEAR(testing::value(comparison[p]), expected.comparison[p],
                half_ulp * std::abs(expected.comparison[p]));
    ASSERT_NEAR(testing::value(intrinsic[p]), expected.intrinsic[p],
                half_ulp * std::abs(expected.intrinsic[p]));
  }
}

}  // namespace
}  // namespace crpt
