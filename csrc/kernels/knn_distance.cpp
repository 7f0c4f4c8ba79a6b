#include "kernels/knn_distance.h"

#include <string.h>

#include "kernels/checked_values.h"
#include "kernels/convert.h"
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

// Sums over a vector's elements in lanes, the same at every level: what an omp simd reduction does
// after its loop takes longer than the loop.
template <typename A>
class LaneSum {
 public:
  static constexpr int64_t kLanes = 64 / sizeof(A);

  // Adds (x - y)^2 for n elements, and writes x - y to `difference` if that is wanted.
  template <bool kKeep>
  void add_squares(const A* x, const A* y, A* difference, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const Lanes d = *at(x + i) - *at(y + i);
      if constexpr (kKeep) *reinterpret_cast<Lanes*>(difference + i) = d;
      sum_ += d * d;
    }
    for (; i < n; ++i) {
      const A d = x[i] - y[i];
      if constexpr (kKeep) difference[i] = d;
      sum_[i % kLanes] += d * d;
    }
  }

  A total() const {
    A lanes[kLanes];
    memcpy(lanes, &sum_, sizeof(lanes));
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }

 private:
  typedef A Lanes __attribute__((vector_size(64), aligned(sizeof(A)), may_alias));
  static const Lanes* at(const A* x) { return reinterpret_cast<const Lanes*>(x); }
  Lanes sum_ = {};
};

template <typename A>
inline A squared_distance(const A* x, const A* y, int64_t n) {
  LaneSum<A> sum;
  sum.template add_squares<false>(x, y, nullptr, n);
  return sum.total();
}

template <typename A>
constexpr A kInfinity = static_cast<A>(__builtin_huge_val());
template <typename A>
constexpr A kSmallestNormal = static_cast<A>(0x1p-1022);
template <>
constexpr float kSmallestNormal<float> = 0x1p-126f;

// About the mean of the keys; where that is not finite, 0.
template <typename T, typename A>
void find_offset(const KnnCenterArgs& args, A* converted, A* offset) {
  constexpr int64_t kSample = 256;  // enough: any offset will do, a near one rules out more
  const int64_t D = args.dim, n = args.count < kSample ? args.count : kSample;
  memset(offset, 0, sizeof(A) * static_cast<size_t>(D));
  for (int64_t i = 0; i < n; ++i) {
    const T* key = static_cast<const T*>(args.keys) + i * args.count / n * args.key_stride;
    const A* x = load_row(key, D, converted);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) offset[d] += x[d];
  }
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) {
    const A mean = offset[d] / static_cast<A>(n);
    offset[d] = mean - mean == 0 ? mean : A(0);
  }
}

// |x - offset|^2, and x - offset.
template <typename A>
inline A center_row(const A* x, const A* offset, A* centered, int64_t n) {
  LaneSum<A> sum;
  sum.template add_squares<true>(x, offset, centered, n);
  return sum.total();
}

template <typename T>
void center(const KnnCenterArgs& args) {
  using A = Compute<T>;
  const int64_t D = args.dim, rows = args.batch + args.count;
  const int team = team_size(args.threads, rows * D);
  const Scratch<A> scratch((team + 1) * D);
  A* const offset = scratch.get() + team * D;
  find_offset<T>(args, scratch.get(), offset);
  parallel_for(team, team, [&](int64_t worker) {
    A* converted = scratch.get() + worker * D;
    for (int64_t row = worker * rows / team; row < (worker + 1) * rows / team; ++row) {
      const bool of_query = row < args.batch;
      const int64_t i = of_query ? row : row - args.batch;
      const T* in = of_query ? static_cast<const T*>(args.queries) + i * args.query_stride
                             : static_cast<const T*>(args.keys) + i * args.key_stride;
      A* out = static_cast<A*>(of_query ? args.centered_queries : args.centered_keys) + i * D;
      const A norm = center_row(load_row(in, D, converted), offset, out, D);
      if (of_query) {
        static_cast<A*>(args.query_norms)[i] = norm;
      } else {
        static_cast<A*>(args.half_key_norms)[i] = norm / 2;
      }
    }
  });
}

// What follows is about |key|^2 / 2 - <query, key>, of centered vectors: half the squared distance
// less half the query's squared length. Bounds of it come from `low` and `high`, |key|^2 / 2
// (1 -+ tolerance), less the dot; `limit` holds the part of the error that goes with the query.
//
// The tolerance covers, in units of epsilon, half that of one rounding: the dot's rounding, D / 2
// (|query|^2 / 2 + |key|^2 / 2); that of |key|^2 / 2, D / 2 times that; of the centering, less than
// 1 |query|^2 + 2 |key|^2 / 2; of this difference, 1; and that of the distance that the key will be
// found to have, D / 2 (|query|^2 + |key|^2). So no key beyond the limit could end up among the k
// nearest, and the result does not depend on how the GEMM rounds.

constexpr int64_t kBlock = 64, kPart = 16;  // keys looked at together
constexpr int64_t kClasses = 64;  // columns i, i + kClasses, i + 2 kClasses, ... are one class

// The smallest upper bound in each class. Dots that have overflowed bound nothing.
template <typename A>
inline void least_of_classes(const A* dots, const A* high, int64_t count, A* least) {
  for (int64_t j = 0; j < kClasses; ++j) least[j] = kInfinity<A>;
  for (int64_t begin = 0; begin < count; begin += kClasses) {
    const int64_t n = count - begin < kClasses ? count - begin : kClasses;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const A upper = high[begin + j] - dots[begin + j];
      least[j] = ((upper < least[j]) & (upper > -kInfinity<A>)) ? upper : least[j];
    }
  }
}

// The k-th smallest of different values among a class's least, infinity where there are fewer: k
// classes have a member that does not exceed it.
template <typename A>
A kth_of_classes(const A* least, int64_t k) {
  A bound = -kInfinity<A>;
  for (int64_t i = 0; i < k; ++i) {
    A above[kClasses];
    for (int64_t j = 0; j < kClasses; ++j) above[j] = least[j] > bound ? least[j] : kInfinity<A>;
    for (int64_t half = kClasses / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) {
        above[j] = above[j + half] < above[j] ? above[j + half] : above[j];
      }
    }
    bound = above[0];
  }
  return bound;
}

// Written so that NaN and infinity, which bound nothing, count as candidates.
template <typename A>
inline bool is_candidate(A dot, A low, A limit) {
  const A lower = low - dot;
  return !((lower > limit) & (lower < kInfinity<A>));
}

template <typename A>
inline bool any_candidate(const A* dots, const A* low, int64_t n, A limit) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += is_candidate(dots[i], low[i], limit) ? 1 : 0;
  return count > 0;
}

// An upper bound of the k-th smallest.
template <typename A>
A kth_upper_bound(const A* dots, const A* high, int64_t count, int64_t k, Smallest<A>& best) {
  if (k <= kClasses / 4) {
    A least[kClasses];
    least_of_classes(dots, high, count, least);
    return kth_of_classes(least, k);
  }
  for (int64_t begin = 0; begin < count; begin += kPart) {
    const int64_t end = begin + kPart < count ? begin + kPart : count;
    if (best.full() && !any_candidate(dots + begin, high + begin, end - begin, best.top())) {
      continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      const A upper = high[i] - dots[i];
      if (upper > -kInfinity<A> && (!best.full() || upper < best.top())) best.offer(upper, i);
    }
  }
  return best.full() ? best.top() : kInfinity<A>;
}

// Calls body(q) for every candidate, upwards.
template <typename A, typename Body>
inline void for_each_candidate(const A* dots, const A* low, int64_t count, A limit,
                               const Body& body) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    if (!any_candidate(dots + begin, low + begin, end - begin, limit)) continue;
    for (int64_t part = begin; part < end; part += kPart) {
      const int64_t last = part + kPart < end ? part + kPart : end;
      if (!any_candidate(dots + part, low + part, last - part, limit)) continue;
      for (int64_t q = part; q < last; ++q) {
        if (is_candidate(dots[q], low[q], limit)) body(q);
      }
    }
  }
}

template <typename T>
void typed(const KnnDistanceArgs& args) {
  using A = Compute<T>;
  const int64_t D = args.dim, Q = args.count, k = args.k;
  const T* keys = static_cast<const T*>(args.keys);
  const A* half_norms = static_cast<const A*>(args.half_key_norms);
  const A tolerance = static_cast<A>(args.tolerance);
  const A underflow = 4 * static_cast<A>(D) * kSmallestNormal<A>;
  const int team = team_size(args.threads, args.batch * Q);
  const Scratch<A> bounds(2 * Q), values(2 * k * team), rows(2 * D * team);
  const Scratch<int64_t> indices(2 * k * team);
  A *const low = bounds.get(), *const high = low + Q;
  for (int64_t q = 0; q < Q; ++q) {
    low[q] = half_norms[q] * (1 - tolerance);
    high[q] = half_norms[q] * (1 + tolerance);
  }
  parallel_for(team, team, [&](int64_t worker) {
    A* value = values.get() + worker * 2 * k;
    int64_t* index = indices.get() + worker * 2 * k;
    A *query_row = rows.get() + worker * 2 * D, *key_row = query_row + D;
    for (int64_t b = worker * args.batch / team; b < (worker + 1) * args.batch / team; ++b) {
      const T* in = static_cast<const T*>(args.queries) + b * args.query_stride;
      const A* query = load_row(in, D, query_row);
      const A* dots = static_cast<const A*>(args.dots) + b * Q;
      Smallest<A> rough(value, index, k), nearest(value + k, index + k, k);
      const A limit = kth_upper_bound(dots, high, Q, k, rough) + underflow +
                      tolerance * static_cast<const A*>(args.query_norms)[b];
      for_each_candidate(dots, low, Q, limit, [&](int64_t q) {
        // Among equals the first is the nearest, and nothing is nearer than 0.
        if (nearest.full() && nearest.top() == 0) return;
        const A* key = load_row(keys + q * args.key_stride, D, key_row);
        nearest.offer(squared_distance(query, key, D), q);
      });
      static_cast<A*>(args.distance)[b] = sqrt_of(nearest.top());
      args.index[b] = nearest.top_index();
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
      add_difference(per_distance(grad[b], distance[b]), queries + b * args.query_stride,
                     keys + args.index[b] * args.key_stride, out + b * D, D);
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
        add_difference(per_distance(grad[b], distance[b]), keys + q * args.key_stride,
                       queries + b * args.query_stride, out + q * D, D);
      }
    });
  }
}

}  // namespace

void knn_center(const KnnCenterArgs& args) {
  with_type(args.dtype, [&]<typename T>(T) { center<T>(args); });
}

void knn_distance(const KnnDistanceArgs& args) {
  with_type(args.dtype, [&]<typename T>(T) { typed<T>(args); });
}

BadValue knn_distance_backward(const KnnDistanceBackwardArgs& given) {
  const CheckedValues index("index", given.index, given.batch, 0, given.count - 1);
  if (index.bad().argument != nullptr) return index.bad();
  KnnDistanceBackwardArgs args = given;
  args.index = index.get();
  args.dtype == DType::f64 ? backward<double>(args) : backward<float>(args);
  return {};
}

}  // namespace crpt::CRPT_ISA
