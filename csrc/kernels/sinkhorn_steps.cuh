// The steps of Sinkhorn-Knopp on a chunk of an item's samples, by one block of kBlock threads; the
// chunk `work` [rows, M] lies in shared memory and is indexed by I = int, or in device memory and
// by int64_t. In exp space it holds K, u scales prototypes and v samples. In log space, for a wide
// item, work itself is normalised.
#pragma once

#include "device.cuh"

namespace crpt::cuda {

constexpr double kWidestExp =
    40;                       // exp(-40) and the scales it leads to are far from the limits of fp32
constexpr int kTogether = 4;  // samples of a warp at a time, so that u is read once for all

template <class A>
struct Problem {
  int64_t items, batch, prototypes;
  A temperature, widest_exp, log_batch, log_prototypes;
};

template <class A>
Problem<A> problem_of(int64_t items, int64_t batch, int64_t prototypes, double temperature) {
  Problem<A> p{};
  p.items = items;
  p.batch = batch;
  p.prototypes = prototypes;
  p.temperature = static_cast<A>(temperature);
  // Quotient needs 1 / T: a temperature too small for it goes to log space, which does not.
  p.widest_exp = std::isfinite(A(1) / p.temperature) ? static_cast<A>(kWidestExp) : A(-1);
  p.log_batch = static_cast<A>(std::log(static_cast<double>(batch)));
  p.log_prototypes = static_cast<A>(std::log(static_cast<double>(prototypes)));
  return p;
}

// x / divisor in three operations, rounded once, where x and 1 / divisor are far from overflow.
template <class A>
struct Quotient {
  A divisor, inverse;
  __device__ explicit Quotient(A d) : divisor(d), inverse(1 / d) {}
  __device__ A operator()(A x) const {
    const A q = x * inverse;
    return fma_of(fma_of(-q, divisor, x), inverse, q);
  }
};

// From scores, in place or not, to K or log K.
template <class A>
struct Kernel {
  bool wide;
  A top;
  A temperature;
  Quotient<A> quotient;

  // `high` and `low` are the item's extremes. NaN is wide.
  __device__ Kernel(const Problem<A>& p, A high, A low)
      : wide(!((high - low) / p.temperature <= p.widest_exp)),
        top(Max()(high, lowest<A>())),
        temperature(p.temperature),
        quotient(p.temperature) {}
  __device__ A in_exp(A score) const { return exp_of(quotient(score - top)); }
  __device__ A in_log(A score) const {
    return Max()((score - top) / temperature, static_cast<A>(-1e30));
  }
  __device__ A operator()(A score) const { return wide ? in_log(score) : in_exp(score); }
};

template <class A>
struct Range {
  A high, low;
  __device__ void take(A x) {
    high = Max()(high, x);
    low = Min()(low, x);
  }
};

// One prototype's sum over the chunk's samples: in exp space weighed by v, unless that is null; in
// log space relative to the largest.
template <class A, class I>
__device__ LogSum<A> sum_column(const A* work, I rows, I stride, bool wide, const A* v) {
  LogSum<A> total = LogSum<A>::none();
  if (wide) {
    for (I b = 0; b < rows; ++b) total.max = Max()(total.max, work[b * stride]);
    for (I b = 0; b < rows; ++b) total.sum += exp_of(work[b * stride] - total.max);
    return total;
  }
  A part[kTogether] = {};
  I b = 0;
#pragma unroll 2
  for (; b + kTogether <= rows; b += kTogether) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      part[i] += work[(b + i) * stride] * (v ? v[b + i] : A(1));
    }
  }
  for (; b < rows; ++b) part[0] += work[b * stride] * (v ? v[b] : A(1));
  total.sum = (part[0] + part[1]) + (part[2] + part[3]);
  return total;
}

// What a prototype's sum over all samples makes of it: u in exp space, its logarithm in log space.
template <class A>
__device__ A scale_of(const Problem<A>& p, LogSum<A> total, bool wide) {
  return wide ? total.log() : 1 / (static_cast<A>(p.prototypes) * total.sum);
}

template <class A>
__device__ void add_to(LogSum<A>& total, LogSum<A> next, bool wide) {
  if (wide) {
    total.merge(next);
  } else {
    total.sum += next.sum;
  }
}

// out_m = value(m) for a row of codes, by one warp.
template <class T, class I, class Value>
__device__ void write_row(T* out, I prototypes, Value value) {
  constexpr int kWidth = Pack<T>::kWidth;
  if (!in_packs<T>(out, prototypes)) {
    for (I m = lane(); m < prototypes; m += kWarp) store(out + m, value(m));
    return;
  }
  for (I m = lane() * kWidth; m < prototypes; m += kWarp * kWidth) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) store(pack.value + i, value(m + i));
    pack_at(out + m) = pack;
  }
}

// Samples in exp space: v, or the codes where those are asked for. No u is u = 1.
template <int kBlock, class T, class A, class I>
__device__ void scale_rows(const Problem<A>& p, const A* work, I rows, const A* u, A* v, T* codes) {
  const I size = static_cast<I>(p.prototypes);
  constexpr I kStep = kBlock / kWarp * kTogether;
  for (I first = static_cast<I>(threadIdx.x) / kWarp * kTogether; first < rows; first += kStep) {
    const A* row[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) row[i] = work + min(first + i, rows - 1) * size;
    A sum[kTogether] = {};
#pragma unroll 4
    for (I m = lane(); m < size; m += kWarp) {
      const A scale = u ? u[m] : A(1);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sum[i] += row[i][m] * scale;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) sum[i] = warp_reduce(sum[i], Sum());
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= rows) continue;
      if (codes) {
        const A inverse = 1 / sum[i];
        const A* k = row[i];
        write_row(codes + (first + i) * size, size,
                  [=](I m) { return k[m] * (u ? u[m] : A(1)) * inverse; });
      } else if (lane() == 0) {
        v[first + i] = 1 / (static_cast<A>(p.batch) * sum[i]);
      }
    }
  }
}

// The same in log space. No log_sum is no normalisation of the prototypes.
template <int kBlock, class T, class A, class I>
__device__ void normalise_rows(const Problem<A>& p, A* work, I rows, const A* log_sum, T* codes) {
  const I size = static_cast<I>(p.prototypes);
  for (I b = static_cast<I>(threadIdx.x) / kWarp; b < rows; b += kBlock / kWarp) {
    A* row = work + b * size;
    A top = lowest<A>();
    for (I m = lane(); m < size; m += kWarp) {
      if (log_sum) row[m] = row[m] - log_sum[m] - p.log_prototypes;
      top = Max()(top, row[m]);
    }
    top = warp_reduce(top, Max());
    A sum = 0;
    for (I m = lane(); m < size; m += kWarp) sum += exp_of(row[m] - top);
    sum = warp_reduce(sum, Sum());
    const A log_total = top + log_of(sum);
    for (I m = lane(); m < size; m += kWarp) {
      if (codes) {
        store(codes + b * size + m, exp_of(row[m] - top) / sum);
      } else {
        row[m] = row[m] - log_total - p.log_batch;
      }
    }
  }
}

template <int kBlock, class T, class A, class I>
__device__ void finish_rows(const Problem<A>& p, A* work, I rows, bool wide, const A* scale, A* v,
                            T* codes) {
  if (wide) {
    normalise_rows<kBlock>(p, work, rows, scale, codes);
  } else {
    scale_rows<kBlock>(p, work, rows, scale, v, codes);
  }
}

}  // namespace crpt::cuda
