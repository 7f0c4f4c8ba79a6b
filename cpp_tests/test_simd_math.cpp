#include <cmath>
#include <limits>

#include "kernels/simd_math.h"
#include "levels.h"

namespace crpt {
namespace {

using baseline::exp_of;

TEST(Exp, FloatIsWithinTwoUlp) {
  for (float x = -87.3f; x < 88.0f; x += 1.3e-3f) {
    const double exact = std::exp(static_cast<double>(x));
    ASSERT_NEAR(exp_of(x) / exact, 1.0, 1.2e-7) << x;
  }
}

TEST(Exp, DoubleIsWithinTwoUlp) {
  for (double x = -708.0; x < 708.0; x += 0.0137) {
    const double exact = static_cast<double>(std::exp(static_cast<long double>(x)));
    ASSERT_NEAR(exp_of(x) / exact, 1.0, 4.5e-16) << x;
  }
}

TEST(Exp, Limits) {
  EXPECT_EQ(exp_of(0.0f), 1.0f);
  EXPECT_EQ(exp_of(0.0), 1.0);
  EXPECT_EQ(exp_of(-1e30f), 0.0f);
  EXPECT_EQ(exp_of(-1e30), 0.0);
  EXPECT_EQ(exp_of(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(exp_of(-std::numeric_limits<double>::infinity()), 0.0);
  EXPECT_TRUE(std::isnan(exp_of(std::nanf(""))));
  EXPECT_TRUE(std::isnan(exp_of(std::nan(""))));
}

}  // namespace
}  // namespace crpt
