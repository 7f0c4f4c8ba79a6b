#include <algorithm>
#include <limits>

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
            .score_stride = M,
            .code_stride = M,
            .loss = loss,
            .logsumexp = lse,
            .gradient = nullptr,
            .dtype = DType::f64,
            .problems = P,
            .samples = B,
            .prototypes = M,
            .temperature = 0.1,
            .threads = 2});
    kernel({.scores = scores32.data(),
            .codes = codes32.data(),
            .score_stride = M,
            .code_stride = M,
            .loss = loss32,
            .logsumexp = lse32,
            .gradient = nullptr,
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

// The gradient from the pass that computes the loss against that of the backward pass.
TEST_P(PrototypeLoss, LossWithItsGradient) {
  for (const auto& [B, M] : {std::pair{1, 1}, {1, 600}, {9, 17}, {301, 257}}) {
    const int P = 2;
    const auto scores = coarse(P * B * M, 5), codes = uniform(P * B * M, 6, 0, 1);
    const std::vector<double> ones(P, 1.0);
    std::vector<double> loss(P), lse(P * B), grad(P * B * M);
    const auto forward = [&](DType dtype, const void* x, const void* q, void* losses, void* sums,
                             void* gradient, int threads) {
      CRPT_AT(GetParam(), prototype_loss)({.scores = x,
                                           .codes = q,
                                           .score_stride = M,
                                           .code_stride = M,
                                           .loss = losses,
                                           .logsumexp = sums,
                                           .gradient = gradient,
                                           .dtype = dtype,
                                           .problems = P,
                                           .samples = B,
                                           .prototypes = M,
                                           .temperature = 0.1,
                                           .threads = threads});
    };
    forward(DType::f64, scores.data(), codes.data(), loss.data(), lse.data(), nullptr, 1);
    CRPT_AT(GetParam(), prototype_loss_backward)({.grad = ones.data(),
                                                  .scores = scores.data(),
                                                  .codes = codes.data(),
                                                  .score_stride = M,
                                                  .code_stride = M,
                                                  .logsumexp = lse.data(),
                                                  .grad_input = grad.data(),
                                                  .dtype = DType::f64,
                                                  .problems = P,
                                                  .samples = B,
                                                  .prototypes = M,
                                                  .temperature = 0.1,
                                                  .threads = 1});
    const auto at_once = [&]<typename T, typename A>(const std::vector<T>& x,
                                                     const std::vector<T>& q, A, DType dtype,
                                                     int threads) {
      std::vector<T> losses(P);
      std::vector<A> sums(P * B), gradient(P * B * M);
      forward(dtype, x.data(), q.data(), losses.data(), sums.data(), gradient.data(), threads);
      return std::tuple(losses, sums, gradient);
    };
    const auto [loss64, lse64, grad64] = at_once(scores, codes, double(), DType::f64, 1);
    EXPECT_EQ(at_once(scores, codes, double(), DType::f64, 3), std::tuple(loss64, lse64, grad64));
    const auto scores32 = testing::as<float>(scores), codes32 = testing::as<float>(codes);
    const auto [loss32, lse32, grad32] = at_once(scores32, codes32, float(), DType::f32, 1);
    EXPECT_EQ(at_once(scores32, codes32, float(), DType::f32, 3),
              std::tuple(loss32, lse32, grad32));
    // The scores are bf16 numbers already; codes lose up to 2^-8 of themselves.
    std::vector<uint16_t> loss16(P);
    std::vector<float> lse16(P * B), grad16(P * B * M);
    const auto scores16 = testing::as_bf16(scores), codes16 = testing::as_bf16(codes);
    forward(DType::bf16, scores16.data(), codes16.data(), loss16.data(), lse16.data(),
            grad16.data(), 2);
    double largest = 1e-3;
    for (const double g : grad) largest = std::max(largest, std::abs(g));
    for (int p = 0; p < P; ++p) {
      ASSERT_NEAR(loss64[p], loss[p], 1e-12 * (1 + loss[p]));
      ASSERT_NEAR(loss32[p], loss[p], 5e-7 * (1 + loss[p]));
    }
    for (int i = 0; i < P * B; ++i) {
      ASSERT_NEAR(lse64[i], lse[i], 1e-14 * (1 + std::abs(lse[i])));
      ASSERT_NEAR(lse32[i], lse[i], 1e-6 * (1 + std::abs(lse[i])));
      ASSERT_NEAR(lse16[i], lse[i], 1e-6 * (1 + std::abs(lse[i])));
    }
    for (int i = 0; i < P * B * M; ++i) {
      ASSERT_NEAR(grad64[i], grad[i], 1e-12 * largest);
      ASSERT_NEAR(grad32[i], grad[i], 2e-6 * largest);
      ASSERT_NEAR(grad16[i], grad[i], 1e-2 * largest);
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
                                       .score_stride = M,
                                       .code_stride = M,
                                       .loss = &loss,
                                       .logsumexp = lse,
                                       .gradient = nullptr,
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
                                                  .score_stride = M,
                                                  .code_stride = M,
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
                                       .score_stride = M,
                                       .code_stride = M,
                                       .loss = &loss,
                                       .logsumexp = &lse,
                                       .gradient = nullptr,
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

struct Gradients {
  float loss = 0;
  std::vector<float> scores, codes;
};

Gradients float_gradients(Isa level, const std::vector<float>& scores,
                          const std::vector<float>& codes, int64_t B, int64_t M, double T,
                          int threads = 1, int64_t gap = 0) {
  const float grad = 1;
  std::vector<float> lse(B);
  Gradients got{0, std::vector<float>(B * M, std::nanf("")), std::vector<float>(B * M)};
  CRPT_AT(level, prototype_loss)({.scores = scores.data(),
                                  .codes = codes.data(),
                                  .score_stride = M + gap,
                                  .code_stride = M + 2 * gap,
                                  .loss = &got.loss,
                                  .logsumexp = lse.data(),
                                  .gradient = nullptr,
                                  .dtype = DType::f32,
                                  .problems = 1,
                                  .samples = B,
                                  .prototypes = M,
                                  .temperature = T,
                                  .threads = threads});
  for (const bool of_codes : {false, true}) {
    CRPT_AT(level, prototype_loss_backward)
    ({.grad = &grad,
      .scores = scores.data(),
      .codes = of_codes ? nullptr : codes.data(),
      .score_stride = M + gap,
      .code_stride = M + 2 * gap,
      .logsumexp = lse.data(),
      .grad_input = of_codes ? got.codes.data() : got.scores.data(),
      .dtype = DType::f32,
      .problems = 1,
      .samples = B,
      .prototypes = M,
      .temperature = T,
      .threads = threads});
  }
  return got;
}

// Scores of any finite size, with and without a common offset: gradients are those of the formula,
// and those of the scores sum to 0.
TEST_P(PrototypeLoss, GradientsOfScoresOfAnySize) {
  const int64_t B = 7, M = 61;
  const double T = 0.1;
  const auto spread = uniform(B * M, 5, -1, 1);
  std::vector<float> codes = testing::as<float>(uniform(B * M, 6, 0, 2.0 / M));
  for (const double scale : {1.0, 1e2, 1e4, 1e8, 1e9, 1e15, 1e30, 3e38}) {
    for (const double deviation : {1.0, scale}) {
      std::vector<float> scores(B * M);
      for (int64_t i = 0; i < B * M; ++i) {
        const double offset = deviation == scale ? 0 : scale;
        scores[i] = static_cast<float>(offset + deviation * spread[i]);
      }
      const Gradients got = float_gradients(GetParam(), scores, codes, B, M, T);
      for (int64_t b = 0; b < B; ++b) {
        const float* s = &scores[b * M];
        const double high = *std::max_element(s, s + M);
        double sum = 0, mass = 0, total = 0;
        for (int64_t m = 0; m < M; ++m) {
          sum += std::exp((s[m] - high) / T);
          mass += codes[b * M + m];
        }
        for (int64_t m = 0; m < M; ++m) {
          const int64_t i = b * M + m;
          const double log_p = (s[m] - high) / T - std::log(sum);
          ASSERT_NEAR(got.scores[i], (std::exp(log_p) * mass - codes[i]) / (T * B), 2e-6)
              << scale << " " << deviation;
          if (log_p > -3e38) {
            ASSERT_NEAR(got.codes[i], -log_p / B, 1e-6 - 1e-6 * log_p);
          } else {
            ASSERT_GE(got.codes[i], 3e37f);
          }
          total += got.scores[i];
        }
        ASSERT_NEAR(total, 0, 2e-6);
      }
    }
  }
}

TEST_P(PrototypeLoss, RowsMayLieApart) {
  const int64_t B = 9, M = 13, gap = 4;
  const auto scores = testing::as<float>(uniform(B * M, 5, -1, 1));
  const auto codes = testing::as<float>(uniform(B * M, 6, 0, 2.0 / M));
  const Gradients together = float_gradients(GetParam(), scores, codes, B, M, 0.1);
  const Gradients apart = float_gradients(GetParam(), testing::apart(scores, M, M + gap),
                                          testing::apart(codes, M, M + 2 * gap), B, M, 0.1, 2, gap);
  EXPECT_EQ(apart.loss, together.loss);
  EXPECT_EQ(apart.scores, together.scores);
  EXPECT_EQ(apart.codes, together.codes);
}

// The two largest floats of opposite sign: scores / T overflows, the loss too, but nothing is NaN.
TEST_P(PrototypeLoss, TheLargestScoresAreNotNan) {
  const std::vector<float> scores = {3e38f, -3e38f, 3e38f, 3e38f}, codes(4, 0.5f);
  const Gradients got = float_gradients(GetParam(), scores, codes, 2, 2, 0.1);
  EXPECT_EQ(got.loss, std::numeric_limits<float>::infinity());
  const float expected[] = {2.5f, -2.5f, 0, 0};
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(got.scores[i], expected[i], 1e-6);
  EXPECT_EQ(got.codes[1], std::numeric_limits<float>::infinity());
  EXPECT_NEAR(got.codes[2], std::log(2) / 2, 1e-6);
}

// Enough elements that three threads do start.
TEST_P(PrototypeLoss, BitsDoNotDependOnThreads) {
  const int64_t B = 301, M = 173;
  const auto scores = testing::as<float>(coarse(B * M, 5));
  const auto codes = testing::as<float>(uniform(B * M, 6, 0, 1));
  const Gradients one = float_gradients(GetParam(), scores, codes, B, M, 0.1);
  const Gradients three = float_gradients(GetParam(), scores, codes, B, M, 0.1, 3);
  EXPECT_EQ(three.loss, one.loss);
  EXPECT_EQ(three.scores, one.scores);
  EXPECT_EQ(three.codes, one.codes);
}

}  // namespace
}  // namespace crpt
