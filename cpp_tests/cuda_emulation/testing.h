// What the tests of the emulated kernels share: element types, sample values, tolerances and thread
// orders.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "emulation.h"
#include "kernels/launch.cuh"

namespace crpt::cuda {

template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr Dtype kDtype = Dtype::kFloat32;
  static constexpr double kEpsilon = 0x1p-23;
  static double read(float x) { return x; }
  static float write(double x) { return static_cast<float>(x); }
};
template <>
struct Element<double> {
  static constexpr Dtype kDtype = Dtype::kFloat64;
  static constexpr double kEpsilon = 0x1p-52;
  static double read(double x) { return x; }
  static double write(double x) { return x; }
};
template <>
struct Element<__half> {
  static constexpr Dtype kDtype = Dtype::kFloat16;
  static constexpr double kEpsilon = 0x1p-10;
  static double read(__half x) { return __half2float(x); }
  static __half write(double x) { return __float2half_rn(static_cast<float>(x)); }
};
template <>
struct Element<__nv_bfloat16> {
  static constexpr Dtype kDtype = Dtype::kBFloat16;
  static constexpr double kEpsilon = 0x1p-7;
  static double read(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __nv_bfloat16 write(double x) { return __float2bfloat16_rn(static_cast<float>(x)); }
};

using FloatingTypes = ::testing::Types<float, __half, __nv_bfloat16, double>;

// Results of compute type C stored as T: half a unit in the last place of T, and `steps` roundings
// in C.
template <class T>
double tolerance(double steps) {
  return Element<T>::kEpsilon / 2 + steps * Element<compute_t<T>>::kEpsilon;
}

template <class T>
std::vector<T> write_all(const std::vector<double>& values) {
  std::vector<T> out;
  out.reserve(values.size());
  for (double x : values) out.push_back(Element<T>::write(x));
  return out;
}

template <class T>
std::vector<double> read_all(const std::vector<T>& values) {
  std::vector<double> out;
  out.reserve(values.size());
  for (T x : values) out.push_back(Element<T>::read(x));
  return out;
}

inline std::vector<double> normal(int64_t size, double deviation, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> distribution(0, deviation);
  std::vector<double> out(static_cast<std::size_t>(size));
  for (double& x : out) x = distribution(engine);
  return out;
}

// Results and scratch start as NaN, so that an element that is read before it is written shows.
template <class T>
std::vector<T> unwritten(int64_t size) {
  return std::vector<T>(static_cast<std::size_t>(size),
                        Element<T>::write(std::numeric_limits<double>::quiet_NaN()));
}

// compute() must return the same bits in whatever order threads and blocks run, and however few
// blocks there are.
template <class Compute>
auto in_every_order(Compute compute) {
  using emulation::Order;
  emulation::set_order(Order::kAscending);
  auto expected = compute();
  for (const auto& [order, blocks] : {std::pair{Order::kDescending, 0u}, {Order::kShuffled, 2u}}) {
    emulation::set_order(order);
    emulation::set_block_limit(blocks);
    const auto got = compute();
    EXPECT_EQ(got.size(), expected.size());
    EXPECT_EQ(0, std::memcmp(got.data(), expected.data(), got.size() * sizeof(got[0])));
  }
  emulation::set_order(Order::kAscending);
  emulation::set_block_limit(0);
  return expected;
}

template <class T>
void expect_near(const std::vector<T>& got, const std::vector<double>& expected, double relative,
                 double absolute) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double x = Element<T>::read(got[i]);
    if (std::isnan(expected[i]) || std::isinf(expected[i])) {
      ASSERT_TRUE(x == expected[i] || (std::isnan(x) && std::isnan(expected[i])))
          << "at " << i << ": got " << x << ", expected " << expected[i];
    } else {
      ASSERT_LE(std::abs(x - expected[i]), relative * std::abs(expected[i]) + absolute)
          << "at " << i << ": got " << x << ", expected " << expected[i];
    }
  }
}

#define ASSERT_LAUNCHED(expression) \
  ASSERT_EQ(cudaSuccess, (expression)) << ::crpt::emulation::last_failure()
#define EXPECT_LAUNCHED(expression) \
  EXPECT_EQ(cudaSuccess, (expression)) << ::crpt::emulation::last_failure()

}  // namespace crpt::cuda
