#include "kernels/sinkhorn.h"
#include "levels.h"

namespace crpt {
namespace {

using testing::coarse;
CRPT_AT_EVERY_LEVEL(Sinkhorn);

// The definition, in long double: rows of prototypes to 1/M, samples to 1/B, at last samples to 1.
std::vector<double> expected(const std::vector<double>& scores, int64_t B, int64_t M, double T,
                             int iterations) {
  long double high = scores[0];
  for (const double x : scores) high = std::max<long double>(high, x);
  std::vector<long double> q(scores.size());
  for (size_t i = 0; i < q.size(); ++i)
    q[i] = std::exp((scores[i] - high) / static_cast<long double>(T));
  const auto normalise = [&](int64_t outer, int64_t inner, int64_t so, int64_t si,
                             long double mass) {
    for (int64_t i = 0; i < outer; ++i) {
      long double sum = 0;
      for (int64_t j = 0; j < inner; ++j) sum += q[i * so + j * si];
      for (int64_t j = 0; j < inner; ++j) q[i * so + j * si] *= mass / sum;
    }
  };
  for (int i = 0; i < iterations; ++i) {
    normalise(M, B, 1, M, 1.0L / M);
    normalise(B, M, M, 1, 1.0L / B);
  }
  normalise(B, M, M, 1, 1.0L);
  return {q.begin(), q.end()};
}

template <typename T>
std::vector<T> run(Isa level, const std::vector<T>& scores, DType dtype, int64_t problems,
                   int64_t B, int64_t M, double temperature, int iterations, int threads = 1) {
  std::vector<T> codes(scores.size());
  CRPT_AT(level, sinkhorn)({.scores = scores.data(),
                            .score_stride = M,
                            .codes = codes.data(),
                            .dtype = dtype,
                            .problems = problems,
                            .samples = B,
                            .prototypes = M,
                            .temperature = temperature,
                            .iterations = iterations,
                            .threads = threads});
  return codes;
}

TEST_P(Sinkhorn, MatchesTheDefinitionOnBothPaths) {
  // Temperatures on both sides of where exp gives way to log space; sizes around vector widths and
  // chunks.
  for (const double T : {0.1, 0.06, 0.04, 0.01}) {
    for (const auto& [B, M] : {std::pair{1, 1}, {1, 9}, {9, 1}, {33, 17}, {16, 64}, {70, 300}}) {
      for (const int iterations : {0, 1, 3}) {
        const auto scores = coarse(B * M, 7);
        const auto exact = expected(scores, B, M, T, iterations);
        const auto f64 = run<double>(GetParam(), scores, DType::f64, 1, B, M, T, iterations);
        const auto f32 =
            run<float>(GetParam(), testing::as<float>(scores), DType::f32, 1, B, M, T, iterations);
        const auto bf16 = run<BFloat16>(GetParam(), testing::as_bf16(scores), DType::bf16, 1, B, M,
                                        T, iterations);
        for (int i = 0; i < B * M; ++i) {
          ASSERT_NEAR(f64[i], exact[i], 1e-12);
          ASSERT_NEAR(f32[i], exact[i], 4e-5);
          ASSERT_NEAR(testing::value(bf16[i]), exact[i], 3e-3);
        }
      }
    }
  }
}

TEST_P(Sinkhorn, TheFirstRowMayLieAnywhereInTheRange) {
  // exp is taken relative to it: of up to 40 on the fast path, of what overflows beyond.
  const int B = 37, M = 21;
  for (const double first : {-1.0, 0.0, 1.0}) {
    for (const double T : {2.0 / 39, 2.0 / 41, 2.0 / 100, 2.0 / 1000}) {
      auto scores = coarse(B * M, 5);
      for (int m = 0; m < M; ++m) scores[m] = first;
      scores[M] = -1.0;
      scores[M + 1] = 1.0;
      const auto exact = expected(scores, B, M, T, 3);
      const auto f64 = run<double>(GetParam(), scores, DType::f64, 1, B, M, T, 3);
      const auto f32 =
          run<float>(GetParam(), testing::as<float>(scores), DType::f32, 1, B, M, T, 3, 3);
      for (int i = 0; i < B * M; ++i) {
        ASSERT_NEAR(f64[i], exact[i], 1e-12);
        ASSERT_NEAR(f32[i], exact[i], 2e-4);
      }
    }
  }
}

TEST_P(Sinkhorn, StaysFiniteFarOutsideTheRangeOfExp) {
  const int B = 40, M = 24;
  auto scores = testing::as<float>(coarse(B * M, 3, 1e4));
  for (int b = 0; b < B; ++b) scores[b * M + 5] = -1e30f;  // a prototype without mass
  for (int m = 0; m < M; ++m) scores[7 * M + m] = -std::numeric_limits<float>::infinity();
  const auto codes = run<float>(GetParam(), scores, DType::f32, 1, B, M, 0.1, 3);
  for (int b = 0; b < B; ++b) {
    double sum = 0;
    for (int m = 0; m < M; ++m) {
      ASSERT_TRUE(std::isfinite(codes[b * M + m]));
      ASSERT_GE(codes[b * M + m], 0);
      sum += codes[b * M + m];
    }
    ASSERT_NEAR(sum, 1.0, 1e-5);
  }
}

// 1 / T is beyond the largest float at last.
TEST_P(Sinkhorn, TinyTemperatures) {
  for (const double T : {1e-38, 2.8e-39, 1e-40, 1e-44}) {
    const auto equal = run<float>(GetParam(), {0.5f, 0.5f, 0.5f, 0.5f}, DType::f32, 1, 2, 2, T, 3);
    for (const float code : equal) EXPECT_EQ(code, 0.5f);
    const auto apart = run<float>(GetParam(), {1, 0, 0, 1}, DType::f32, 1, 2, 2, T, 3);
    EXPECT_EQ(apart, (std::vector<float>{1, 0, 0, 1}));
  }
  const auto tiny = run<double>(GetParam(), {3, 3, 3, 3}, DType::f64, 1, 2, 2, 1e-310, 3);
  for (const double code : tiny) EXPECT_EQ(code, 0.5);
}

TEST_P(Sinkhorn, NanStaysWithinItsProblem) {
  auto scores = testing::as<float>(coarse(3 * 8 * 8, 3));
  scores[64 + 10] = std::nanf("");
  const auto codes = run<float>(GetParam(), scores, DType::f32, 3, 8, 8, 0.1, 3);
  for (int i = 0; i < 3 * 64; ++i) ASSERT_EQ(std::isnan(codes[i]), i / 64 == 1);
}

TEST_P(Sinkhorn, BitsDoNotDependOnThreadsOrOnTheBatch) {
  const int P = 3, B = 300, M = 200;
  const auto scores = testing::as<float>(coarse(P * B * M, 11));
  const auto one = run<float>(GetParam(), scores, DType::f32, P, B, M, 0.1, 3, 1);
  for (const int threads : {2, 3, 5}) {
    ASSERT_EQ(run<float>(GetParam(), scores, DType::f32, P, B, M, 0.1, 3, threads), one);
  }
  const std::vector<float> second(scores.begin() + B * M, scores.begin() + 2 * B * M);
  const auto alone = run<float>(GetParam(), second, DType::f32, 1, B, M, 0.1, 3, 4);
  ASSERT_TRUE(std::equal(alone.begin(), alone.end(), one.begin() + B * M));
}

TEST_P(Sinkhorn, RowsMayLieApart) {
  const int64_t P = 2, B = 21, M = 13, stride = 17;
  const auto scores = testing::as<float>(coarse(P * B * M, 3));
  const auto laid = testing::apart(scores, M, stride);
  for (const double T : {0.1, 0.01}) {  // on both paths
    std::vector<float> codes(scores.size());
    CRPT_AT(GetParam(), sinkhorn)({.scores = laid.data(),
                                   .score_stride = stride,
                                   .codes = codes.data(),
                                   .dtype = DType::f32,
                                   .problems = P,
                                   .samples = B,
                                   .prototypes = M,
                                   .temperature = T,
                                   .iterations = 3,
                                   .threads = 2});
    EXPECT_EQ(codes, run<float>(GetParam(), scores, DType::f32, P, B, M, T, 3));
  }
}

// One problem on a whole team, on both paths, and wide enough that the sums of its prototypes are
// shared out too; in bfloat16, where codes and scratch are different memory, as well.
TEST_P(Sinkhorn, BitsDoNotDependOnThreadsWithinOneProblem) {
  const int B = 300, M = 4000;
  const auto scores = coarse(B * M, 12);
  const auto scores32 = testing::as<float>(scores);
  const auto scores16 = testing::as_bf16(scores);
  for (const double T : {0.1, 0.01}) {
    const auto one = run<float>(GetParam(), scores32, DType::f32, 1, B, M, T, 2, 1);
    ASSERT_EQ(run<float>(GetParam(), scores32, DType::f32, 1, B, M, T, 2, 3), one);
    const auto one16 = run<BFloat16>(GetParam(), scores16, DType::bf16, 1, B, M, T, 2, 1);
    const auto three16 = run<BFloat16>(GetParam(), scores16, DType::bf16, 1, B, M, T, 2, 3);
    ASSERT_TRUE(std::equal(one16.begin(), one16.end(), three16.begin(),
                           [](BFloat16 a, BFloat16 b) { return a.bits == b.bits; }));
    double sum = 0;
    for (const float code : one) sum += code;
    ASSERT_NEAR(sum, B, 1e-2);
  }
}

}  // namespace
}  // namespace crpt
