// What the kernel tests share: every level this CPU runs, values of every storage type, random
// data.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/dispatch.h"

namespace crpt::testing {

// A kernel at one level: CRPT_AT(level, sinkhorn)(args). amx is avx512.
#if defined(__x86_64__)
#define CRPT_AT(level, name)                              \
  ((level) >= ::crpt::Isa::avx512 ? &::crpt::avx512::name \
   : (level) == ::crpt::Isa::avx2 ? &::crpt::avx2::name   \
                                  : &::crpt::baseline::name)
#else
#define CRPT_AT(level, name) (&::crpt::baseline::name)
#endif

inline std::vector<Isa> levels() {
  std::vector<Isa> found;
  for (const Isa level : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa_supported(level)) found.push_back(level);
  }
  return found;
}

class AtLevel : public ::testing::TestWithParam<Isa> {};

#define CRPT_AT_EVERY_LEVEL(Suite)                                                        \
  using Suite = ::crpt::testing::AtLevel;                                                 \
  INSTANTIATE_TEST_SUITE_P(Levels, Suite, ::testing::ValuesIn(::crpt::testing::levels()), \
                           [](const auto& info) { return ::crpt::isa_name(info.param); })

// Values that bfloat16 holds exactly, so that one array serves as input in every dtype.
inline std::vector<double> coarse(size_t n, uint32_t seed, double scale = 1.0) {
  std::mt19937 random(seed);
  std::vector<double> values(n);
  for (double& x : values) x = scale * (static_cast<int>(random() % 255) - 127) / 128.0;
  return values;
}

inline std::vector<double> uniform(size_t n, uint32_t seed, double low, double high) {
  std::mt19937 random(seed);
  std::vector<double> values(n);
  for (double& x : values) x = low + (high - low) * (random() / 4294967296.0);
  return values;
}

template <typename T>
std::vector<T> as(const std::vector<double>& values) {
  return std::vector<T>(values.begin(), values.end());
}

// For values exact in bfloat16: its bits are the high half of the float's.
inline std::vector<BFloat16> as_bf16(const std::vector<double>& values) {
  std::vector<BFloat16> out;
  for (const double x : values) {
    out.push_back(
        {static_cast<uint16_t>(__builtin_bit_cast(uint32_t, static_cast<float>(x)) >> 16)});
  }
  return out;
}

// A matrix's rows of n elements, `stride` apart, with NaN between them.
inline std::vector<float> apart(const std::vector<float>& rows, size_t n, size_t stride) {
  std::vector<float> out(rows.size() / n * stride, std::nanf(""));
  for (size_t i = 0; i < rows.size(); ++i) out[i / n * stride + i % n] = rows[i];
  return out;
}

inline double value(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

}  // namespace crpt::testing
