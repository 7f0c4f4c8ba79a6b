// The passes over one row of [B, M] that sinkhorn is made of.
#pragma once

#include "kernels/parallel.h"
#include "kernels/simd_math.h"

namespace crpt::CRPT_ISA {
namespace {

// The cut-off of the log kernel: far below what exp can represent, and finite.
constexpr double kLowestLogKernel = -1e30;

template <typename A>
struct Range {
  A low, high;
  bool has_nan;
};

template <typename T, typename A>
inline Range<A> range_of(const T* scores, int64_t n) {
  A low = __builtin_huge_val(), high = -__builtin_huge_val();
  int nans = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : nans)
  for (int64_t i = 0; i < n; ++i) {
    const A x = widen(scores[i]);
    low = x < low ? x : low;
    high = x > high ? x : high;
    nans |= x != x ? 1 : 0;
  }
  return {low, high, nans != 0};
}

template <typename A>
inline void fill(A* x, A value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

template <typename S, typename A>
inline void add(S* sum, const A* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

template <typename A>
inline void raise(A* high, const A* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) high[i] = x[i] > high[i] ? x[i] : high[i];
}

// Writes row * factor as codes; `row` may be `codes` itself.
template <typename T, typename A>
inline void write_codes(const A* row, A factor, T* codes, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) narrow(row[m] * factor, &codes[m]);
}

// kernel = exp((scores - top) / T), added to sum.
template <typename T, typename A>
inline void exp_row(const T* scores, A top, A inverse, A* kernel, A* sum, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) {
    kernel[m] = exp_of((widen(scores[m]) - top) * inverse);
    sum[m] += kernel[m];
  }
}

template <typename A>
inline void scale_to_column_mass(A* u, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) u[m] = A(1) / (static_cast<A>(M) * u[m]);
}

template <typename A>
inline A dot(const A* x, const A* y, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// v = 1 / (B <kernel, u>), and v kernel added to sum.
template <typename A>
inline void scale_row(const A* kernel, const A* u, int64_t samples, A* sum, int64_t M) {
  const double mass =
      blocked_sum(M, [&](int64_t m, int64_t n) { return dot(kernel + m, u + m, n); });
  const A v = static_cast<A>(1 / (static_cast<double>(samples) * mass));
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) sum[m] += v * kernel[m];
}

// kernel *= u; returns the sum.
template <typename A>
inline A apply_columns(A* kernel, const A* u, int64_t M) {
  A mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int64_t m = 0; m < M; ++m) {
    const A x = kernel[m] * u[m];
    kernel[m] = x;
    mass += x;
  }
  return mass;
}

template <typename T, typename A>
inline void log_kernel(const T* scores, A top, A temperature, A* log_q, int64_t n) {
  constexpr A lowest = static_cast<A>(kLowestLogKernel);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A x = (widen(scores[i]) - top) / temperature;
    log_q[i] = x < lowest ? lowest : x;
  }
}

template <typename A>
inline void add_exp(const A* log_q, const A* peak, A* sum, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) sum[m] += exp_of(log_q[m] - peak[m]);
}

template <typename A>
inline A sum_exp(const A* log_q, A peak, int64_t M) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t m = 0; m < M; ++m) sum += exp_of(log_q[m] - peak);
  return sum;
}

template <typename A>
inline void subtract(A* log_q, const A* column, A constant, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) log_q[m] = log_q[m] - column[m] - constant;
}

template <typename A>
inline void subtract(A* log_q, A row, A constant, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) log_q[m] = log_q[m] - row - constant;
}

template <typename A>
inline A exp_in_place(A* log_q, A peak, int64_t M) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t m = 0; m < M; ++m) {
    const A x = exp_of(log_q[m] - peak);
    log_q[m] = x;
    sum += x;
  }
  return sum;
}

}  // namespace
}  // namespace crpt::CRPT_ISA
