#include "kernels/sinkhorn.h"

#include "kernels/parallel.h"
#include "kernels/simd_math.h"

namespace crpt::CRPT_ISA {
namespace {

// Wider scores than this (in units of the temperature) are iterated on in log space. exp(-40) is
// far above the smallest float, and the scaling factors stay within exp(40) of each other.
constexpr double kFastRange = 40.0;
// The cut-off of the log kernel: far below what exp can represent, and finite.
constexpr double kLowestLogKernel = -1e30;

template <typename T>
struct Problem {
  using A = Compute<T>;
  const T* scores;  // [B, M]
  T* codes;         // [B, M]
  A* kernel;        // [B, M]; the codes themselves where T is A
  A* partial;       // [chunks, M]
  A* column;        // [M]
  A* shift;         // [M]
  int64_t B, M;
  A temperature;
  int64_t iterations;
  int threads;
};

template <typename A>
struct Range {
  A low, high;
  bool has_nan;
};

template <typename T>
Range<Compute<T>> score_range(const Problem<T>& p, const Chunks& chunks) {
  using A = Compute<T>;
  A* lows = p.column;  // one value per chunk; at most 64, see scratch_size
  A* highs = p.shift;
  A* nans = p.partial;
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    A low = __builtin_huge_val(), high = -__builtin_huge_val(), nan = 0;
    const int64_t end = chunks.end(chunk) * p.M;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : nan)
    for (int64_t i = chunks.begin(chunk) * p.M; i < end; ++i) {
      const A x = widen(p.scores[i]);
      low = x < low ? x : low;
      high = x > high ? x : high;
      nan += x != x ? A(1) : A(0);
    }
    lows[chunk] = low;
    highs[chunk] = high;
    nans[chunk] = nan;
  });
  Range<A> range{lows[0], highs[0], nans[0] > 0};
  for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
    range.low = lows[chunk] < range.low ? lows[chunk] : range.low;
    range.high = highs[chunk] > range.high ? highs[chunk] : range.high;
    range.has_nan = range.has_nan || nans[chunk] > 0;
  }
  return range;
}

// column[m] = sum over chunks of partial[chunk, m], in order.
template <typename T>
void sum_partials(const Problem<T>& p, const Chunks& chunks) {
  for (int64_t m = 0; m < p.M; ++m) p.column[m] = 0;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const auto* partial = p.partial + chunk * p.M;
#pragma omp simd
    for (int64_t m = 0; m < p.M; ++m) p.column[m] += partial[m];
  }
}

template <typename A>
inline void clear(A* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

// Writes row * factor as codes; `row` may be `codes` itself.
template <typename T>
inline void write_codes(const Compute<T>* row, Compute<T> factor, T* codes, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) narrow(row[m] * factor, &codes[m]);
}

// q_bm = v_b K_bm u_m with K stored once. An iteration is one pass over K: while a row is in the
// cache it gives v_b and then its share of the next u.
template <typename T>
void solve_scaled(const Problem<T>& p, const Chunks& chunks, Compute<T> top) {
  using A = Compute<T>;
  const int64_t M = p.M;
  const A inverse = A(1) / p.temperature;
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    A* partial = p.partial + chunk * M;
    clear(partial, M);
    for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
      const T* scores = p.scores + b * M;
      A* kernel = p.kernel + b * M;
#pragma omp simd
      for (int64_t m = 0; m < M; ++m) {
        kernel[m] = exp_of((widen(scores[m]) - top) * inverse);
        partial[m] += kernel[m];
      }
    }
  });
  A* u = p.column;
  if (p.iterations == 0) {
    for (int64_t m = 0; m < M; ++m) u[m] = 1;
  }
  for (int64_t iteration = 0; iteration <= p.iterations; ++iteration) {
    const bool last = iteration + 1 >= p.iterations;
    if (iteration < p.iterations) {
      sum_partials(p, chunks);
#pragma omp simd
      for (int64_t m = 0; m < M; ++m) u[m] = A(1) / (static_cast<A>(M) * u[m]);
    }
    parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
      A* partial = p.partial + chunk * M;
      clear(partial, M);
      for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
        A* kernel = p.kernel + b * M;
        A sum = 0;
        if (last) {
#pragma omp simd reduction(+ : sum)
          for (int64_t m = 0; m < M; ++m) {
            kernel[m] *= u[m];
            sum += kernel[m];
          }
          write_codes(kernel, A(1) / sum, p.codes + b * M, M);
          continue;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t m = 0; m < M; ++m) sum += kernel[m] * u[m];
        const A v = A(1) / (static_cast<A>(p.B) * sum);
#pragma omp simd
        for (int64_t m = 0; m < M; ++m) partial[m] += v * kernel[m];
      }
    });
    if (last) break;
  }
}

// The twin's own order of operations, for scores that exp cannot hold, infinities and NaN.
template <typename T>
void solve_log(const Problem<T>& p, const Chunks& chunks, Compute<T> top) {
  using A = Compute<T>;
  const int64_t M = p.M;
  const A log_m = log_of(static_cast<A>(M)), log_b = log_of(static_cast<A>(p.B));
  const A lowest = static_cast<A>(kLowestLogKernel);
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    for (int64_t i = chunks.begin(chunk) * M; i < chunks.end(chunk) * M; ++i) {
      const A x = (widen(p.scores[i]) - top) / p.temperature;
      p.kernel[i] = x < lowest ? lowest : x;
    }
  });
  for (int64_t iteration = 0; iteration < p.iterations; ++iteration) {
    parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
      A* partial = p.partial + chunk * M;
      for (int64_t m = 0; m < M; ++m) partial[m] = lowest;
      for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
        const A* log_q = p.kernel + b * M;
#pragma omp simd
        for (int64_t m = 0; m < M; ++m) partial[m] = log_q[m] > partial[m] ? log_q[m] : partial[m];
      }
    });
    A* peak = p.shift;
    for (int64_t m = 0; m < M; ++m) peak[m] = p.partial[m];
    for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
      const A* partial = p.partial + chunk * M;
      for (int64_t m = 0; m < M; ++m) peak[m] = partial[m] > peak[m] ? partial[m] : peak[m];
    }
    parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
      A* partial = p.partial + chunk * M;
      clear(partial, M);
      for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
        const A* log_q = p.kernel + b * M;
#pragma omp simd
        for (int64_t m = 0; m < M; ++m) partial[m] += exp_of(log_q[m] - peak[m]);
      }
    });
    sum_partials(p, chunks);
    for (int64_t m = 0; m < M; ++m) p.column[m] = peak[m] + log_of(p.column[m]);
    parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
      for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
        A* log_q = p.kernel + b * M;
#pragma omp simd
        for (int64_t m = 0; m < M; ++m) log_q[m] = log_q[m] - p.column[m] - log_m;
        const A high = row_max(log_q, M);
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t m = 0; m < M; ++m) sum += exp_of(log_q[m] - high);
        const A log_sum = high + log_of(sum);
#pragma omp simd
        for (int64_t m = 0; m < M; ++m) log_q[m] = log_q[m] - log_sum - log_b;
      }
    });
  }
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
      A* log_q = p.kernel + b * M;
      const A high = row_max(log_q, M);
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t m = 0; m < M; ++m) {
        log_q[m] = exp_of(log_q[m] - high);
        sum += log_q[m];
      }
      write_codes(log_q, A(1) / sum, p.codes + b * M, M);
    }
  });
}

template <typename T>
void solve(const Problem<T>& p) {
  using A = Compute<T>;
  const Chunks chunks(p.B);
  const Range<A> range = score_range(p, chunks);
  if (!range.has_nan && (range.high - range.low) / p.temperature <= static_cast<A>(kFastRange)) {
    return solve_scaled(p, chunks, range.high);
  }
  const A lowest =
      sizeof(A) == 8 ? static_cast<A>(-1.7976931348623157e308) : static_cast<A>(-3.40282347e38f);
  const A top = range.high < lowest ? lowest : range.high;
  solve_log(p, chunks, range.has_nan ? static_cast<A>(__builtin_nan("")) : top);
}

// Elements of compute type that one problem needs beside its codes.
template <typename T>
struct ScratchSize {
  int64_t kernel, partial, column, total;
  ScratchSize(int64_t B, int64_t M) {
    kernel = sizeof(T) == sizeof(Compute<T>) ? 0 : B * M;
    column = M > 64 ? M : 64;
    partial = Chunks(B).count * column;
    total = kernel + partial + 2 * column;
  }
};

template <typename T>
void sinkhorn_typed(const SinkhornArgs& args) {
  using A = Compute<T>;
  const int64_t size = args.samples * args.prototypes;
  if (args.problems == 0) return;
  // Many problems: one thread each. Few: all threads on one after the other. The chunks are the
  // same.
  const int team = team_size(args.threads, args.problems * size);
  const bool many = args.problems >= team;
  const int64_t workers = many ? team : 1;
  const ScratchSize<T> need(args.samples, args.prototypes);
  const Scratch<A> scratch(workers * need.total);
  parallel_for(workers, static_cast<int>(workers), [&](int64_t worker) {
    A* memory = scratch.get() + worker * need.total;
    for (int64_t i = worker; i < args.problems; i += workers) {
      T* codes = static_cast<T*>(args.codes) + i * size;
      Problem<T> problem{
          .scores = static_cast<const T*>(args.scores) + i * size,
          .codes = codes,
          .kernel = need.kernel > 0 ? memory + need.partial + 2 * need.column
                                    : reinterpret_cast<A*>(codes),
          .partial = memory,
          .column = memory + need.partial,
          .shift = memory + need.partial + need.column,
          .B = args.samples,
          .M = args.prototypes,
          .temperature = static_cast<A>(args.temperature),
          .iterations = args.iterations,
          .threads = many ? 1 : team,
      };
      solve(problem);
    }
  });
}

}  // namespace

void sinkhorn(const SinkhornArgs& args) {
  with_type(args.dtype, [&]<typename T>(T) { sinkhorn_typed<T>(args); });
}

}  // namespace crpt::CRPT_ISA
