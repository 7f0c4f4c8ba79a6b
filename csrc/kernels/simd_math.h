// exp without branches or tables, so that loops over it vectorise at every level. Error about 1
// ulp; results below the smallest normal number are 0; NaN stays NaN. Method and coefficients:
// Cephes (Moshier). x should be at most 88 (float) or 709 (double): kernels subtract a maximum.
#pragma once

#include "kernels/convert.h"

namespace crpt::CRPT_ISA {
namespace {

inline float exp_of(float x) {
  constexpr float lowest = -87.3365402f;
  // Adding it leaves the nearest integer in the low bits, in the place of a biased exponent.
  constexpr float round = 0x1.8p23f + 127.0f;
  const float shifted = x * 1.44269504088896341f + round;
  const float n = shifted - round;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = from_bits(to_bits(shifted) << 23);
  return x < lowest ? 0.0f : p * power;
}

inline double exp_of(double x) {
  constexpr double lowest = -708.396418532264106;
  constexpr double round = 0x1.8p52 + 1023.0;
  const double shifted = x * 1.4426950408889634073599 + round;
  const double n = shifted - round;
  const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const double rr = r * r;
  const double p = r * ((1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2) * rr +
                        9.99999999999999999910e-1);
  const double q = ((3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3) * rr +
                    2.27265548208155028766e-1) *
                       rr +
                   2.0;
  const double power = __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, shifted) << 52);
  return x < lowest ? 0.0 : (1.0 + 2.0 * (p / (q - p))) * power;
}

// Called once per row, not per element: libm's.
inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }
inline float sqrt_of(float x) { return __builtin_sqrtf(x); }
inline double sqrt_of(double x) { return __builtin_sqrt(x); }

// Largest of n values; NaN is passed over (it comes back through the sums that follow). In four
// chains: each comparison would otherwise wait for the one before.
template <typename T>
inline Compute<T> row_max(const T* x, int64_t n) {
  using A = Compute<T>;
  const int64_t quarter = n / 4;
  const T *x1 = x + quarter, *x2 = x1 + quarter, *x3 = x2 + quarter;
  A a = -__builtin_huge_val(), b = a, c = a, d = a;
#pragma omp simd reduction(max : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a = widen(x[i]) > a ? widen(x[i]) : a;
    b = widen(x1[i]) > b ? widen(x1[i]) : b;
    c = widen(x2[i]) > c ? widen(x2[i]) : c;
    d = widen(x3[i]) > d ? widen(x3[i]) : d;
  }
  for (int64_t i = 4 * quarter; i < n; ++i) a = widen(x[i]) > a ? widen(x[i]) : a;
  a = b > a ? b : a;
  c = d > c ? d : c;
  return c > a ? c : a;
}

}  // namespace
}  // namespace crpt::CRPT_ISA
