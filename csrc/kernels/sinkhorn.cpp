#include "kernels/sinkhorn.h"

#include "kernels/sinkhorn_rows.h"

namespace crpt::CRPT_ISA {
namespace {

// Wider scores than this (in units of the temperature) are iterated on in log space. exp(-40) is
// far above the smallest float, sums of exp(40) are far below the largest, and the scaling factors
// stay within exp(40) of each other.
constexpr double kFastRange = 40.0;
template <typename T>
struct Problem {
  using A = Compute<T>;
  const T* scores;  // [B, M], rows so far apart:
  int64_t score_stride;
  T* codes;          // [B, M]
  A* kernel;         // [B, M]; the codes themselves where T is A
  A* partial;        // [chunks, M]
  A* column;         // [M]
  A* peak;           // [M]
  Range<A>* ranges;  // [chunks]
  int64_t B, M;
  A temperature;
  int64_t iterations;
  int threads;
};

// K = exp((scores - some score) / T), whose sums over the chunks become partial. Reads the scores
// once: which score it is matters to nobody if all of them lie within kFastRange.
template <typename T>
Range<Compute<T>> fill_kernel(const Problem<T>& p, const Chunks& chunks) {
  using A = Compute<T>;
  const int64_t M = p.M;
  const A middle = row_max(p.scores, M), inverse = A(1) / p.temperature;
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    A* partial = p.partial + chunk * M;
    fill(partial, A(0), M);
    Range<A> range = {static_cast<A>(__builtin_huge_val()), -static_cast<A>(__builtin_huge_val()),
                      false};
    for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
      const T* scores = p.scores + b * p.score_stride;
      range = joined(range, exp_row(scores, middle, inverse, p.kernel + b * M, partial, M));
    }
    p.ranges[chunk] = range;
  });
  Range<A> all = p.ranges[0];
  for (int64_t chunk = 1; chunk < chunks.count; ++chunk) all = joined(all, p.ranges[chunk]);
  return all;
}

// column[m] = sum over chunks of partial[chunk, m], in order.
template <typename T>
void sum_partials(const Problem<T>& p, const Chunks& chunks) {
  const int64_t blocks = (p.M + kSumBlock - 1) / kSumBlock;
  parallel_for(blocks, team_size(p.threads, chunks.count * p.M), [&](int64_t block) {
    const int64_t begin = block * kSumBlock;
    const int64_t n = p.M - begin < kSumBlock ? p.M - begin : kSumBlock;
    double sum[kSumBlock];
    fill(sum, 0.0, n);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      add(sum, p.partial + chunk * p.M + begin, n);
    }
    for (int64_t m = 0; m < n; ++m) p.column[begin + m] = static_cast<Compute<T>>(sum[m]);
  });
}

// q_bm = v_b K_bm u_m with K stored once. An iteration is one pass over K: while a row is in the
// cache it gives v_b and then its share of the next u.
template <typename T>
void solve_scaled(const Problem<T>& p, const Chunks& chunks) {
  using A = Compute<T>;
  const int64_t M = p.M;
  A* u = p.column;
  fill(u, A(1), M);
  for (int64_t iteration = 0; iteration < p.iterations; ++iteration) {
    sum_partials(p, chunks);
    scale_to_column_mass(u, M);
    if (iteration + 1 == p.iterations) break;
    parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
      A* partial = p.partial + chunk * M;
      fill(partial, A(0), M);
      const int64_t begin = chunks.begin(chunk);
      scale_rows(p.kernel + begin * M, u, chunks.end(chunk) - begin, p.B, partial, M);
    });
  }
  // The last v_b and the closing normalisation are one: each sample's codes sum to 1.
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    const int64_t begin = chunks.begin(chunk), rows = chunks.end(chunk) - begin;
    close_rows(p.kernel + begin * M, u, rows, p.codes + begin * M, M);
  });
}

// column[m] = logsumexp over the samples of log_q[., m].
template <typename T>
void column_logsumexp(const Problem<T>& p, const Chunks& chunks) {
  using A = Compute<T>;
  const int64_t M = p.M;
  A* peak = p.peak;
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    A* partial = p.partial + chunk * M;
    fill(partial, static_cast<A>(kLowestLogKernel), M);
    for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
      raise(partial, p.kernel + b * M, M);
    }
  });
  fill(peak, static_cast<A>(kLowestLogKernel), M);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) raise(peak, p.partial + chunk * M, M);
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    A* partial = p.partial + chunk * M;
    fill(partial, A(0), M);
    for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
      add_exp(p.kernel + b * M, peak, partial, M);
    }
  });
  sum_partials(p, chunks);
  for (int64_t m = 0; m < M; ++m) p.column[m] = peak[m] + log_of(p.column[m]);
}

// The twin's own order of operations, for scores that exp cannot hold, infinities and NaN.
template <typename T>
void solve_log(const Problem<T>& p, const Chunks& chunks, Compute<T> top) {
  using A = Compute<T>;
  const int64_t M = p.M;
  const A log_m = log_of(static_cast<A>(M)), log_b = log_of(static_cast<A>(p.B));
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
      log_kernel(p.scores + b * p.score_stride, top, p.temperature, p.kernel + b * M, M);
    }
  });
  for (int64_t iteration = 0; iteration < p.iterations; ++iteration) {
    column_logsumexp(p, chunks);
    parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
      for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
        A* log_q = p.kernel + b * M;
        subtract(log_q, p.column, log_m, M);
        const A peak = row_max(log_q, M);
        const double sum =
            blocked_sum(M, [&](int64_t m, int64_t n) { return sum_exp(log_q + m, peak, n); });
        subtract(log_q, peak + log_of(static_cast<A>(sum)), log_b, M);
      }
    });
  }
  parallel_for(chunks.count, p.threads, [&](int64_t chunk) {
    for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
      A* row = p.kernel + b * M;
      const A peak = row_max(row, M);
      const double sum =
          blocked_sum(M, [&](int64_t m, int64_t n) { return exp_in_place(row + m, peak, n); });
      write_codes(row, static_cast<A>(1 / sum), p.codes + b * M, M);
    }
  });
}

template <typename T>
void solve(const Problem<T>& p) {
  using A = Compute<T>;
  const Chunks chunks(p.B);
  const Range<A> range = fill_kernel(p, chunks);
  // 1 / T overflows for the smallest T.
  const bool finite = A(1) / p.temperature < static_cast<A>(__builtin_huge_val());
  if (!range.has_nan && finite &&
      (range.high - range.low) / p.temperature <= static_cast<A>(kFastRange)) {
    return solve_scaled(p, chunks);
  }
  const A lowest =
      sizeof(A) == 8 ? static_cast<A>(-1.7976931348623157e308) : static_cast<A>(-3.40282347e38f);
  const A top = range.high < lowest ? lowest : range.high;
  solve_log(p, chunks, range.has_nan ? static_cast<A>(__builtin_nan("")) : top);
}

// Elements of compute type that one problem needs beside its codes.
template <typename T>
struct ScratchSize {
  using A = Compute<T>;
  int64_t kernel, partial, ranges, total;
  ScratchSize(int64_t B, int64_t M)
      : kernel(sizeof(T) == sizeof(A) ? 0 : B * M),
        partial(Chunks(B).count * M),
        ranges(Chunks(B).count * static_cast<int64_t>(sizeof(Range<A>) / sizeof(A))),
        total(kernel + partial + 2 * M + ranges) {}
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
          .scores = static_cast<const T*>(args.scores) + i * args.samples * args.score_stride,
          .score_stride = args.score_stride,
          .codes = codes,
          .kernel = need.kernel > 0 ? memory : reinterpret_cast<A*>(codes),
          .partial = memory + need.kernel,
          .column = memory + need.kernel + need.partial,
          .peak = memory + need.kernel + need.partial + args.prototypes,
          .ranges = reinterpret_cast<Range<A>*>(memory + need.total - need.ranges),
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
