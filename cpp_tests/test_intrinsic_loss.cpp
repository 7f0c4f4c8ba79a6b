#include <utility>

#include "kernels/intrinsic_loss.h"
#include "levels.h"

namespace crpt {
namespace {

using testing::uniform;
CRPT_AT_EVERY_LEVEL(IntrinsicLoss);

TEST_P(IntrinsicLoss, WeightsAndLossMatchTheDefinition) {
  for (const int M : {1, 2, 17, 64, 300}) {
    const int P = 2;
    const auto s = uniform(P * M * M, M, -1, 1);
    auto weights = s;
    auto weights32 = testing::as<float>(s);
    double loss[P];
    float loss32[P];
    const auto kernel = CRPT_AT(GetParam(), intrinsic_loss);
    kernel({.weights = weights.data(),
            .loss = loss,
            .dtype = DType::f64,
            .problems = P,
            .prototypes = M,
            .offset = 1.5,
            .threads = 2});
    kernel({.weights = weights32.data(),
            .loss = loss32,
            .dtype = DType::f32,
            .problems = P,
            .prototypes = M,
            .offset = 1.5,
            .threads = 2});
    for (int p = 0; p < P; ++p) {
      double exact = 0;
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < M; ++j) {
          const size_t at = (static_cast<size_t>(p) * M + i) * M + j;
          const double w = i == j ? 0 : 1.0 / (static_cast<double>(M) * M * (s[at] + 1.5));
          exact += w * s[at];
          ASSERT_NEAR(weights[at], w, 1e-15 + 1e-14 * w);
          ASSERT_NEAR(weights32[at], w, 1e-6 * w);
        }
      }
      ASSERT_NEAR(loss[p], exact, 1e-13);
      ASSERT_NEAR(loss32[p], exact, 2e-7);
    }
  }
}

// Enough elements that three threads do start.
TEST_P(IntrinsicLoss, BitsDoNotDependOnThreads) {
  const int P = 3, M = 181;
  const auto s = testing::as<float>(uniform(P * M * M, 4, -1, 1));
  const auto computed = [&](int threads) {
    std::pair got{s, std::vector<float>(P)};
    CRPT_AT(GetParam(), intrinsic_loss)({.weights = got.first.data(),
                                         .loss = got.second.data(),
                                         .dtype = DType::f32,
                                         .problems = P,
                                         .prototypes = M,
                                         .offset = 1.5,
                                         .threads = threads});
    return got;
  };
  EXPECT_EQ(computed(3), computed(1));
}

}  // namespace
}  // namespace crpt
