#include "kernels/prototype_loss.h"
#include "levels.h"

namespace crpt {
namespace {

using testing::coarse;
using testing::uniform;
CRPT_AT_EVERY_LEVEL(PrototypeLoss);

double expected(const double* scores, const double* codes, int64_t B, int64_t M, double T) {
  double total = 0;
  for (int64_t b = 0; b < B; ++b) {
    double high = -1e300, sum = 0;
    for (int64_t m = 0; m < M; ++m) high = std::max(high, scores[b * M + m] / T);
    for (int64_t m = 0; m < M; ++m) sum += std::exp(scores[b * M + m] / T - high);
    for (int64_t m = 0; m < M; ++m) {
      total -= codes[b * M + m] * (scores[b * M + m] / T - high - std::log(sum));
    }
  }
  return total / B;
}

TEST_P(PrototypeLoss, MatchesTheDefinition) {
  for (const auto& [B, M] : {std::pair{1, 1}, {1, 600}, {9, 17}, {40, 257}}) {
    const int P = 2;
    const auto scores = coarse(P * B * M, 5), codes = uniform(P * B * M, 6, 0, 1);
    const auto scores32 = testing::as<float>(scores), codes32 = testing::as<float>(codes);
    double loss[P], lse[2 * 40];
    float loss32[P], lse32[2 * 40];
    const auto kernel = CRPT_AT(GetParam(), prototype_loss);
    kernel({.scores = scores.data(),
            .codes = codes.data(),
            .loss = loss,
            .logsumexp = lse,
            .dtype = DType::f64,
            .problems = P,
            .samples = B,
            .prototypes = M,
            .temperature = 0.1,
            .threads = 2});
    kernel({.scores = scores32.data(),
            .codes = codes32.data(),
            .loss = loss32,
            .logsumexp = lse32,
            .dtype = DType::f32,
            .problems = P,
            .samples = B,
            .prototypes = M,
            .temperature = 0.1,
            .threads = 2});
    for (int p = 0; p < P; ++p) {
      const double exact = expected(&scores[p * B * M], &codes[p * B * M], B, M, 0.1);
      ASSERT_NEAR(loss[p], exact, 1e-12 * (1 + exact));
      ASSERT_NEAR(loss32[p], exact, 5e-7 * (1 + exact));
    }
  }
}

TEST_P(PrototypeLoss, GradientsMatchFiniteDifferences) {
  const int B = 3, M = 11;
  const double T = 0.3, grad = 1.7;
  const auto scores = coarse(B * M, 5), codes = uniform(B * M, 6, 0, 1);
  double loss, lse[B];
  CRPT_AT(GetParam(), prototype_loss)({.scores = scores.data(),
                                       .codes = codes.data(),
                                       .loss = &loss,
                                       .logsumexp = lse,
                                       .dtype = DType::f64,
                                       .problems = 1,
                                       .samples = B,
                                       .prototypes = M,
                                       .temperature = T,
                                       .threads = 1});
  for (const bool of_codes : {false, true}) {
    std::vector<double> got(B * M);
    CRPT_AT(GetParam(), prototype_loss_backward)({.grad = &grad,
                                                  .scores = scores.data(),
                                                  .codes = of_codes ? nullptr : codes.data(),
                                                  .logsumexp = lse,
                                                  .grad_input = got.data(),
                                                  .dtype = DType::f64,
                                                  .problems = 1,
                                                  .samples = B,
                                                  .prototypes = M,
                                                  .temperature = T,
                                                  .threads = 1});
    for (int i = 0; i < B * M; ++i) {
      auto s = scores, q = codes;
      auto& moved = of_codes ? q : s;
      moved[i] += 1e-5;
      const double up = expected(s.data(), q.data(), B, M, T);
      moved[i] -= 2e-5;
      const double down = expected(s.data(), q.data(), B, M, T);
      ASSERT_NEAR(got[i], grad * (up - down) / 2e-5, 1e-8);
    }
  }
}

TEST_P(PrototypeLoss, LargeCommonOffsetsLoseNothing) {
  const int M = 64;
  std::vector<float> scores(M), codes(M, 1.0f / M);
  for (int m = 0; m < M; ++m) scores[m] = 4096.0f + (m % 8);
  float loss, lse;
  CRPT_AT(GetParam(), prototype_loss)({.scores = scores.data(),
                                       .codes = codes.data(),
                                       .loss = &loss,
                                       .logsumexp = &lse,
                                       .dtype = DType::f32,
                                       .problems = 1,
                                       .samples = 1,
                                       .prototypes = M,
                                       .temperature = 1.0,
                                       .threads = 1});
  const auto wide_scores = std::vector<double>(scores.begin(), scores.end());
  const auto wide_codes = std::vector<double>(codes.begin(), codes.end());
  ASSERT_NEAR(loss, expected(wide_scores.data(), wide_codes.data(), 1, M, 1.0), 2e-6);
}

}  // namespace
}  // namespace crpt
