#include <cmath>
#include <limits>

#include "kernels/convert.h"
#include "levels.h"

namespace crpt {
namespace {

using baseline::narrow;
using baseline::widen;

// The value of a half by its definition.
double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31)
    return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

TEST(Convert, EveryHalfWidensToItsValue) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const double expected = half_value(half.bits);
    const float got = widen(half);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(got));
    } else {
      ASSERT_EQ(got, expected) << bits;
      ASSERT_EQ(std::signbit(got), std::signbit(expected)) << bits;
    }
  }
}

TEST(Convert, EveryHalfSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    Half back;
    narrow(widen(half), &back);
    if (std::isnan(half_value(half.bits))) {
      EXPECT_TRUE(std::isnan(half_value(back.bits)));
    } else {
      ASSERT_EQ(back.bits, half.bits);
    }
  }
}

// Just below, at and just above the midpoint of each pair of neighbours: down, to even, up.
TEST(Convert, FloatsRoundToTheNearestEvenHalf) {
  for (uint16_t bits = 0; bits < 0x7C00; ++bits) {
    const uint16_t next = static_cast<uint16_t>(bits + 1);
    const double high = next == 0x7C00 ? 65536.0 : half_value(next);
    const float middle = static_cast<float>((half_value(bits) + high) / 2);
    Half at, below, above;
    narrow(middle, &at);
    narrow(std::nextafterf(middle, 0.0f), &below);
    narrow(std::nextafterf(middle, 1e30f), &above);
    ASSERT_EQ(below.bits, bits);
    ASSERT_EQ(at.bits, bits % 2 == 0 ? bits : next);
    ASSERT_EQ(above.bits, next);
  }
}

TEST(Convert, FloatsRoundToTheNearestEvenBFloat16) {
  for (uint32_t bits = 0; bits < 0x7F7F; ++bits) {
    const uint32_t middle = (bits << 16) | 0x8000u;
    const auto rounded = [](uint32_t x) {
      BFloat16 out;
      narrow(__builtin_bit_cast(float, x), &out);
      return static_cast<uint32_t>(out.bits);
    };
    ASSERT_EQ(rounded(middle - 1), bits);
    ASSERT_EQ(rounded(middle), bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(rounded(middle + 1), bits + 1);
    ASSERT_EQ(rounded(bits << 16), bits);
  }
}

TEST(Convert, NanAndInfinityStay) {
  const float infinity = std::numeric_limits<float>::infinity();
  Half half;
  BFloat16 bf16;
  narrow(-infinity, &half);
  narrow(-infinity, &bf16);
  EXPECT_EQ(half.bits, 0xFC00);
  EXPECT_EQ(bf16.bits, 0xFF80);
  narrow(std::nanf(""), &half);
  narrow(std::nanf(""), &bf16);
  EXPECT_TRUE(std::isnan(widen(half)));
  EXPECT_TRUE(std::isnan(widen(bf16)));
}

}  // namespace
}  // namespace crpt
