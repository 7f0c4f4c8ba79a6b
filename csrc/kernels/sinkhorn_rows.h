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

template <typename A>
inline Range<A> joined(const Range<A>& x, const Range<A>& y) {
  return {y.low < x.low ? y.low : x.low, y.high > x.high ? y.high : x.high, x.has_nan || y.has_nan};
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

// kernel = exp((scores - middle) / T), added to sum. Returns the range of the scores, which tells
// afterwards whether exp could hold that.
template <typename T, typename A>
inline Range<A> exp_row(const T* scores, A middle, A inverse, A* kernel, A* sum, int64_t M) {
  A low = __builtin_huge_val(), high = -__builtin_huge_val();
  int nans = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : nans)
  for (int64_t m = 0; m < M; ++m) {
    const A x = widen(scores[m]);
    low = x < low ? x : low;
    high = x > high ? x : high;
    nans |= x != x ? 1 : 0;
    kernel[m] = exp_of((x - middle) * inverse);
    sum[m] += kernel[m];
  }
  return {low, high, nans != 0};
}

template <typename A>
inline void scale_to_column_mass(A* u, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) u[m] = A(1) / (static_cast<A>(M) * u[m]);
}

// Rows are worked on this many at a time: sums of one row are a chain in which each addition waits
// for the one before, and what all rows share (u, and the sums over them) is loaded once for all.
constexpr int64_t kTogether = 4;

// mass[r] = sum of row r of the kernel times u; rows are M apart.
template <typename A>
inline void dots(const A* kernel, const A* u, int64_t M, double* mass) {
  const A *k0 = kernel, *k1 = k0 + M, *k2 = k1 + M, *k3 = k2 + M;
  for (int64_t r = 0; r < kTogether; ++r) mass[r] = 0;
  for (int64_t begin = 0; begin < M; begin += kSumBlock) {
    const int64_t end = M - begin < kSumBlock ? M : begin + kSumBlock;
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t m = begin; m < end; ++m) {
      s0 += k0[m] * u[m];
      s1 += k1[m] * u[m];
      s2 += k2[m] * u[m];
      s3 += k3[m] * u[m];
    }
    mass[0] += s0;
    mass[1] += s1;
    mass[2] += s2;
    mass[3] += s3;
  }
}

// The same for one row, in as many chains, which differ in their order of additions: rows that are
// left over at the end are the same ones whatever the number of threads.
template <typename A>
inline double dot(const A* kernel, const A* u, int64_t M) {
  double mass = 0;
  for (int64_t begin = 0; begin < M; begin += kSumBlock) {
    const int64_t end = M - begin < kSumBlock ? M : begin + kSumBlock;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t m = begin; m < end; ++m) sum += kernel[m] * u[m];
    mass += sum;
  }
  return mass;
}

// sum += v kernel, row after row.
template <typename A>
inline void add_scaled(const A* kernel, const A* v, A* sum, int64_t M) {
  const A *k0 = kernel, *k1 = k0 + M, *k2 = k1 + M, *k3 = k2 + M;
  const A v0 = v[0], v1 = v[1], v2 = v[2], v3 = v[3];
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) {
    sum[m] = (((sum[m] + v0 * k0[m]) + v1 * k1[m]) + v2 * k2[m]) + v3 * k3[m];
  }
}

// v_b = 1 / (B <kernel_b, u>), and v_b kernel_b added to sum, for `rows` rows.
template <typename A>
inline void scale_rows(const A* kernel, const A* u, int64_t rows, int64_t samples, A* sum,
                       int64_t M) {
  const double B = static_cast<double>(samples);
  int64_t b = 0;
  for (; b + kTogether <= rows; b += kTogether) {
    double mass[kTogether];
    A v[kTogether];
    dots(kernel + b * M, u, M, mass);
    for (int64_t r = 0; r < kTogether; ++r) v[r] = static_cast<A>(1 / (B * mass[r]));
    add_scaled(kernel + b * M, v, sum, M);
  }
  for (; b < rows; ++b) {
    const A* row = kernel + b * M;
    const A v = static_cast<A>(1 / (B * dot(row, u, M)));
#pragma omp simd
    for (int64_t m = 0; m < M; ++m) sum[m] += v * row[m];
  }
}

// codes = kernel u factor; `kernel` may be `codes` itself.
template <typename T, typename A>
inline void write_scaled(const A* kernel, const A* u, A factor, T* codes, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) narrow(kernel[m] * u[m] * factor, &codes[m]);
}

// codes_b = kernel_b u / <kernel_b, u>, for `rows` rows.
template <typename T, typename A>
inline void close_rows(const A* kernel, const A* u, int64_t rows, T* codes, int64_t M) {
  int64_t b = 0;
  for (; b + kTogether <= rows; b += kTogether) {
    double mass[kTogether];
    dots(kernel + b * M, u, M, mass);
    for (int64_t r = 0; r < kTogether; ++r) {
      const int64_t at = (b + r) * M;
      write_scaled(kernel + at, u, static_cast<A>(1 / mass[r]), codes + at, M);
    }
  }
  for (; b < rows; ++b) {
    const A* row = kernel + b * M;
    write_scaled(row, u, static_cast<A>(1 / dot(row, u, M)), codes + b * M, M);
  }
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
