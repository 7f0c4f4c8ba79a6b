#include "kernels/knn_distance.h"

#include <string.h>

#include "kernels/parallel.h"
#include "kernels/simd_math.h"

namespace crpt::CRPT_ISA {
namespace {

// The k smallest (value, index) pairs seen so far, as a heap with the largest on top. NaN is larger
// than all.
template <typename A>
class Smallest {
 public:
  Smallest(A* values, int64_t* indices, int64_t k) : values_(values), indices_(indices), k_(k) {}
  bool full() const { return size_ == k_; }
  A top() const { return values_[0]; }
  int64_t top_index() const { return indices_[0]; }

  void offer(A value, int64_t index) {
    if (size_ < k_) {
      int64_t i = size_++;
      for (; i > 0 && after(value, index, (i - 1) / 2); i = (i - 1) / 2) move((i - 1) / 2, i);
      put(value, index, i);
    } else if (!after(value, index, 0)) {
      int64_t i = 0;
      for (int64_t child = 1; child < k_; child = 2 * i + 1) {
        if (child + 1 < k_ && after(values_[child + 1], indices_[child + 1], child)) ++child;
        if (after(value, index, child)) break;
        move(child, i);
        i = child;
      }
      put(value, index, i);
    }
  }

 private:
  // Whether (value, index) sorts after the pair in slot i.
  bool after(A value, int64_t index, int64_t i) const {
    const A other = values_[i];
    const bool nan = value != value, other_nan = other != other;
    if (nan || other_nan) return nan && (!other_nan || index > indices_[i]);
    return value > other || (value == other && index > indices_[i]);
  }
  void move(int64_t from, int64_t to) { put(values_[from], indices_[from], to); }
  void put(A value, int64_t index, int64_t i) {
    values_[i] = value;
    indices_[i] = index;
  }

  A* values_;
  int64_t* indices_;
  int64_t k_, size_ = 0;
};

template <typename A>
inline A squared_norm(const A* x, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

template <typename A>
inline A squared_distance(const A* x, const A* y, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += (x[i] - y[i]) * (x[i] - y[i]);
  return sum;
}

constexpr int64_t kBlock = 64;  // keys looked at together

// An upper bound of the k-th smallest |key|^2 / 2 - <query, key>, the query's own error left out.
// `half_norms` are |key|^2 / 2: twice a dot may overflow where the distance does not. A dot that
// has overflowed itself bounds nothing.
template <typename A>
A kth_upper_bound(const A* dots, const A* half_norms, int64_t count, A tolerance,
                  Smallest<A>& best) {
  A upper[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = count - begin < kBlock ? count - begin : kBlock;
    A least = __builtin_huge_val();
#pragma omp simd reduction(min : least)
    for (int64_t i = 0; i < n; ++i) {
      upper[i] = half_norms[begin + i] * (1 + tolerance) - dots[begin + i];
      least = upper[i] < least ? upper[i] : least;
    }
    if (best.full() && !(least < best.top())) continue;
    for (int64_t i = 0; i < n; ++i) {
      if (upper[i] > -static_cast<A>(__builtin_huge_val())) best.offer(upper[i], begin + i);
    }
  }
  return best.full() ? best.top() : static_cast<A>(__builtin_huge_val());
}

// Keys whose lower bound of the same quantity does not exceed `limit`. Written so that NaN and
// infinity, which bound nothing, count as candidates.
template <typename A>
inline bool is_candidate(A dot, A half_norm, A tolerance, A limit) {
  const A lower = half_norm * (1 - tolerance) - dot;
  return !((lower > limit) & (lower < static_cast<A>(__builtin_huge_val())));
}

template <typename A>
inline bool any_candidate(const A* dots, const A* half_norms, int64_t n, A tolerance, A limit) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i)
    count += is_candidate(dots[i], half_norms[i], tolerance, limit) ? 1 : 0;
  return count > 0;
}

template <typename A>
void measure_candidates(const A* query, const A* keys, const A* dots, const A* half_norms,
                        int64_t count, int64_t D, A tolerance, A limit, Smallest<A>& best) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    if (!any_candidate(dots + begin, half_norms + begin, end - begin, tolerance, limit)) continue;
    for (int64_t q = begin; q < end; ++q) {
      if (is_candidate(dots[q], half_norms[q], tolerance, limit)) {
        best.offer(squared_distance(query, keys + q * D, D), q);
      }
    }
  }
}

template <typename A>
void typed(const KnnDistanceArgs& args) {
  const int64_t D = args.dim, Q = args.count, k = args.k;
  const A* queries = static_cast<const A*>(args.queries);
  const A* keys = static_cast<const A*>(args.keys);
  const A tolerance = static_cast<A>(args.tolerance);
  const int team = team_size(args.threads, args.batch * Q);
  const Scratch<A> half_norms(Q), heap_values(2 * k * team);
  const Scratch<int64_t> heap_indices(2 * k * team);
  parallel_for(Q, team_size(args.threads, Q * D),
               [&](int64_t q) { half_norms.get()[q] = squared_norm(keys + q * D, D) / 2; });
  parallel_for(team, team, [&](int64_t worker) {
    A* values = heap_values.get() + worker * 2 * k;
    int64_t* indices = heap_indices.get() + worker * 2 * k;
    for (int64_t b = worker * args.batch / team; b < (worker + 1) * args.batch / team; ++b) {
      const A* query = queries + b * D;
      const A* dots = static_cast<const A*>(args.dots) + b * Q;
      Smallest<A> rough(values, indices, k), exact(values + k, indices + k, k);
      const A query_error = tolerance * squared_norm(query, D);
      const A limit = kth_upper_bound(dots, half_norms.get(), Q, tolerance, rough) + query_error;
      measure_candidates(query, keys, dots, half_norms.get(), Q, D, tolerance, limit, exact);
      static_cast<A*>(args.distance)[b] = sqrt_of(exact.top());
      args.index[b] = exact.top_index();
    }
  });
}

// sum += factor (x - y)
template <typename A>
inline void add_difference(A factor, const A* x, const A* y, A* sum, int64_t D) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) sum[d] += factor * (x[d] - y[d]);
}

template <typename A>
inline A per_distance(A grad, A distance) {
  return distance == 0 ? A(0) : grad / distance;
}

template <typename A>
void backward(const KnnDistanceBackwardArgs& args) {
  const int64_t D = args.dim, Q = args.count;
  const A* grad = static_cast<const A*>(args.grad);
  const A* distance = static_cast<const A*>(args.distance);
  const A* queries = static_cast<const A*>(args.queries);
  const A* keys = static_cast<const A*>(args.keys);
  if (args.grad_queries != nullptr) {
    A* out = static_cast<A*>(args.grad_queries);
    parallel_for(args.batch, team_size(args.threads, args.batch * D), [&](int64_t b) {
      memset(out + b * D, 0, sizeof(A) * static_cast<size_t>(D));
      add_difference(per_distance(grad[b], distance[b]), queries + b * D, keys + args.index[b] * D,
                     out + b * D, D);
    });
  }
  if (args.grad_keys != nullptr) {
    // Each worker owns a range of keys and adds to it in the order of the queries.
    A* out = static_cast<A*>(args.grad_keys);
    const int team = team_size(args.threads, (args.batch + Q) * D);
    parallel_for(team, team, [&](int64_t worker) {
      const int64_t first = worker * Q / team, last = (worker + 1) * Q / team;
      memset(out + first * D, 0, sizeof(A) * static_cast<size_t>((last - first) * D));
      for (int64_t b = 0; b < args.batch; ++b) {
        const int64_t q = args.index[b];
        if (q < first || q >= last) continue;
        add_difference(per_distance(grad[b], distance[b]), keys + q * D, queries + b * D,
                       out + q * D, D);
      }
    });
  }
}

}  // namespace

void knn_distance(const KnnDistanceArgs& args) {
  args.dtype == DType::f64 ? typed<double>(args) : typed<float>(args);
}

void knn_distance_backward(const KnnDistanceBackwardArgs& args) {
  args.dtype == DType::f64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace crpt::CRPT_ISA
