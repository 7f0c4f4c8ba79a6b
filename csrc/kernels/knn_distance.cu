// The k-th nearest key. Squares come from the differences themselves, never from |q|^2 + |k|^2 - 2
// q.k, which loses near neighbours to cancellation; then each row is searched: for a few neighbours
// one after the other, for many digit by digit (radix select).
//
// Floor on an H200, 512 queries, 2,048 keys, D = 128 in fp32: as a GEMM 5.2 us at 51 TFLOP/s, as
// differences 9 us at 29 T lanes/s: measured 25 us, 15 for these and 8 for the search (k = 3).
#include "device.cuh"
#include "knn_distance.cuh"

namespace crpt::cuda {
namespace {

constexpr int kSide = 16;  // threads along a side of the tile: 16 x 16 = kThreads
constexpr int kPer = 4;    // results of a thread along a side
constexpr int kTile = kSide * kPer;
constexpr int kDepth = 16;  // dimensions in shared memory at a time
static_assert(kSide * kSide == kThreads);

template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  T value[kPer];
};

// A tile of rows, transposed: the results of a thread lie side by side.
template <class A>
struct alignas(16) Tile {
  A value[kDepth][kTile + kPer];
};

// The thread's share of the tile that begins at row `first`, dimension `depth`; zeros beyond the
// ends.
template <class T, class A>
__device__ Four<A> read_share(const T* rows, int64_t first, int64_t count, int64_t depth,
                              int64_t width, bool fours) {
  const int64_t row = first + threadIdx.x / (kDepth / kPer);
  const int64_t d = depth + threadIdx.x % (kDepth / kPer) * kPer;
  Four<A> share{};
  if (row >= count) return share;
  const T* at = rows + row * width + d;
  if (fours) {
    if (d >= width) return share;
    const auto four = *reinterpret_cast<const Four<T>*>(at);
#pragma unroll
    for (int i = 0; i < kPer; ++i) share.value[i] = load(four.value + i);
  } else {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (d + i < width) share.value[i] = load(at + i);
    }
  }
  return share;
}

template <class A>
__device__ void put_share(Tile<A>& tile, const Four<A>& share) {
  const int row = static_cast<int>(threadIdx.x) / (kDepth / kPer);
  const int d = static_cast<int>(threadIdx.x) % (kDepth / kPer) * kPer;
#pragma unroll
  for (int i = 0; i < kPer; ++i) tile.value[d + i][row] = share.value[i];
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    knn_squares_kernel(const T* queries, const T* keys, A* squares, int64_t query_count,
                       int64_t key_count, int64_t width, bool fours, bool whole) {
  __shared__ Tile<A> query_tile;
  __shared__ Tile<A> key_tile;
  const int row = static_cast<int>(threadIdx.x) / kSide * kPer;
  const int column = static_cast<int>(threadIdx.x) % kSide * kPer;
  const int64_t across = ceil_div(key_count, kTile);
  const int64_t tiles = ceil_div(query_count, kTile) * across;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_query = tile / across * kTile;
    const int64_t first_key = tile % across * kTile;
    A total[kPer][kPer] = {};
    Four<A> q = read_share<T, A>(queries, first_query, query_count, 0, width, fours);
    Four<A> k = read_share<T, A>(keys, first_key, key_count, 0, width, fours);
    for (int64_t depth = 0; depth < width; depth += kDepth) {
      put_share(query_tile, q);
      put_share(key_tile, k);
      __syncthreads();
      if (depth + kDepth < width) {  // on their way while these are worked on
        q = read_share<T, A>(queries, first_query, query_count, depth + kDepth, width, fours);
        k = read_share<T, A>(keys, first_key, key_count, depth + kDepth, width, fours);
      }
      A part[kPer][kPer] = {};  // sums of sums: the error grows with width / 16, not with width
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const auto a = *reinterpret_cast<const Four<A>*>(&query_tile.value[d][row]);
        const auto b = *reinterpret_cast<const Four<A>*>(&key_tile.value[d][column]);
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
#pragma unroll
          for (int j = 0; j < kPer; ++j) {
            const A difference = a.value[i] - b.value[j];
            part[i][j] += difference * difference;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) total[i][j] += part[i][j];
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (first_query + row + i >= query_count) continue;
      A* out = squares + (first_query + row + i) * key_count + first_key + column;
      if (whole && first_key + column < key_count) {
        Four<A> four;
#pragma unroll
        for (int j = 0; j < kPer; ++j) four.value[j] = total[i][j];
        *reinterpret_cast<Four<A>*>(out) = four;
      } else {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if (first_key + column + j < key_count) out[j] = total[i][j];
        }
      }
    }
  }
}

// Bits that sort as the squares do: these are never negative, and every NaN counts as one, the
// largest.
__device__ inline uint64_t sortable(float x) { return x != x ? 0x7fffffffu : __float_as_uint(x); }
__device__ inline uint64_t sortable(double x) {
  return x != x ? 0x7fffffffffffffffu : static_cast<uint64_t>(__double_as_longlong(x));
}

constexpr int64_t kFew = 8;

// One block per query, and one pass over its row for each of a few neighbours: the nearest that is
// farther than the last found, which among equals is the next in order.
template <class A>
__global__ void __launch_bounds__(kThreads)
    knn_select_few_kernel(const A* squares, A* distance, int64_t* index, int64_t query_count,
                          int64_t key_count, int64_t k) {
  constexpr uint64_t kNone = ~uint64_t{0};  // farther than NaN
  for (int64_t b = blockIdx.x; b < query_count; b += gridDim.x) {
    const A* row = squares + b * key_count;
    uint64_t last_square = 0, last_index = 0;
    for (int64_t found = 0; found < k; ++found) {
      uint64_t square = kNone, at = kNone;
#pragma unroll 8
      for (int64_t q = threadIdx.x; q < key_count; q += kThreads) {
        const uint64_t s = sortable(row[q]);
        const uint64_t i = static_cast<uint64_t>(q);
        const bool next = found == 0 || s > last_square || (s == last_square && i > last_index);
        if (next && s < square) {  // a thread meets its indices in order
          square = s;
          at = i;
        }
      }
      last_square = block_reduce(square, Min());
      last_index = block_reduce(square == last_square ? at : kNone, Min());
    }
    if (threadIdx.x == 0) {
      distance[b] = sqrt_of(row[last_index]);
      index[b] = static_cast<int64_t>(last_index);
    }
  }
}

// A candidate agrees with what is known of the answer: some high bytes of its square, then of its
// index.
struct Known {
  uint64_t square, square_mask, index, index_mask;

  __device__ bool fits(uint64_t s, uint64_t i) const {
    return (s & square_mask) == square && (i & index_mask) == index;
  }
};

// One block per query. Every pass counts the candidates by their next byte and keeps the byte that
// holds the k-th; index bytes follow the square's, so that in the end a single candidate is left
// whatever the ties.
template <class A>
__global__ void knn_select_kernel(const A* squares, A* distance, int64_t* index,
                                  int64_t query_count, int64_t key_count, int64_t k) {
  __shared__ unsigned long long counts[kThreads];
  static_assert(kThreads == 256, "one counter for every value of a byte");
  constexpr int kBytes = static_cast<int>(sizeof(A));
  for (int64_t b = blockIdx.x; b < query_count; b += gridDim.x) {
    const A* row = squares + b * key_count;
    Known known{};
    uint64_t rank = static_cast<uint64_t>(k - 1);  // of the answer among the candidates
    uint64_t candidates = static_cast<uint64_t>(key_count);
    for (int pass = 0; candidates > 1 && pass < kBytes + 8; ++pass) {
      const bool by_square = pass < kBytes;
      const int shift = 8 * (by_square ? kBytes - 1 - pass : kBytes + 7 - pass);
      counts[threadIdx.x] = 0;
      __syncthreads();
      for (int64_t q = threadIdx.x; q < key_count; q += kThreads) {
        const uint64_t square = sortable(row[q]);
        if (known.fits(square, q)) {
          atomicAdd(&counts[((by_square ? square : static_cast<uint64_t>(q)) >> shift) & 255],
                    1ull);
        }
      }
      __syncthreads();
      uint64_t byte = 0;
      while (rank >= counts[byte]) rank -= counts[byte++];
      candidates = counts[byte];
      (by_square ? known.square : known.index) |= byte << shift;
      (by_square ? known.square_mask : known.index_mask) |= uint64_t{255} << shift;
      __syncthreads();
    }
    for (int64_t q = threadIdx.x; q < key_count; q += kThreads) {
      if (known.fits(sortable(row[q]), q)) {
        distance[b] = sqrt_of(row[q]);
        index[b] = q;
      }
    }
  }
}

template <class T, class A>
__global__ void knn_backward_queries_kernel(const A* grad, const T* queries, const T* keys,
                                            const A* distance, const int64_t* index, A* out,
                                            int64_t query_count, int64_t key_count, int64_t width) {
  for (int64_t b = global_warp(); b < query_count; b += all_warps()) {
    const int64_t q = index[b];
    assert(0 <= q && q < key_count && "index should be in [0, Q)");
    const A factor = distance[b] == 0 ? A(0) : grad[b] / distance[b];
    for (int64_t d = lane(); d < width; d += kWarp) {
      out[b * width + d] = factor * (load(queries + b * width + d) - load(keys + q * width + d));
    }
  }
}

constexpr int64_t kSearches = 4096;  // warps that look through all queries

// One warp for a run of keys looks for their queries 32 at a time and adds them in order, without
// atomics. Runs grow with the number of keys, so that the search stays short of B x Q.
template <class T, class A>
__global__ void knn_backward_keys_kernel(const A* grad, const T* queries, const T* keys,
                                         const A* distance, const int64_t* index, A* out,
                                         int64_t query_count, int64_t key_count, int64_t width,
                                         int64_t run) {
  const int64_t runs = ceil_div(key_count, run);
  for (int64_t r = global_warp(); r < runs; r += all_warps()) {
    const int64_t first_key = r * run;
    const int64_t end_key = min(first_key + run, key_count);
    for (int64_t i = first_key * width + lane(); i < end_key * width; i += kWarp) out[i] = 0;
    __syncwarp();  // other lanes add to what this one cleared
#pragma unroll 4
    for (int64_t first = 0; first < query_count; first += kWarp) {
      const int64_t key = first + lane() < query_count ? index[first + lane()] : -1;
      const bool mine = first_key <= key && key < end_key;
      for (unsigned found = __ballot_sync(0xffffffffu, mine); found != 0; found &= found - 1) {
        const int from = __ffs(static_cast<int>(found)) - 1;
        const int64_t b = first + from;
        const int64_t q = __shfl_sync(0xffffffffu, key, from);
        const A factor = distance[b] == 0 ? A(0) : grad[b] / distance[b];
        for (int64_t d = lane(); d < width; d += kWarp) {
          out[q * width + d] +=
              factor * (load(keys + q * width + d) - load(queries + b * width + d));
        }
      }
    }
  }
}

template <class T>
bool in_fours(const void* rows, int64_t width) {
  return reinterpret_cast<uintptr_t>(rows) % alignof(Four<T>) == 0 && width % kPer == 0;
}

}  // namespace

cudaError_t launch_knn_distance(Dtype dtype, const void* queries, const void* keys, void* squares,
                                void* distance, int64_t* index, int64_t query_count,
                                int64_t key_count, int64_t width, int64_t k, cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    const int64_t tiles = ceil_div(query_count, kTile) * ceil_div(key_count, kTile);
    const cudaError_t error = launch(
        stream, blocks_for(tiles, 1), knn_squares_kernel<T, A>, static_cast<const T*>(queries),
        static_cast<const T*>(keys), static_cast<A*>(squares), query_count, key_count, width,
        in_fours<T>(queries, width) && in_fours<T>(keys, width), in_fours<A>(squares, key_count));
    if (error != cudaSuccess) return error;
    return launch(stream, blocks_for(query_count, 1),
                  k <= kFew ? knn_select_few_kernel<A> : knn_select_kernel<A>,
                  static_cast<const A*>(squares), static_cast<A*>(distance), index, query_count,
                  key_count, k);
  });
}

cudaError_t launch_knn_distance_backward_queries(Dtype dtype, const void* grad, const void* queries,
                                                 const void* keys, const void* distance,
                                                 const int64_t* index, void* out,
                                                 int64_t query_count, int64_t key_count,
                                                 int64_t width, cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    return launch(stream, blocks_for(query_count, kWarps), knn_backward_queries_kernel<T, A>,
                  static_cast<const A*>(grad), static_cast<const T*>(queries),
                  static_cast<const T*>(keys), static_cast<const A*>(distance), index,
                  static_cast<A*>(out), query_count, key_count, width);
  });
}

cudaError_t launch_knn_distance_backward_keys(Dtype dtype, const void* grad, const void* queries,
                                              const void* keys, const void* distance,
                                              const int64_t* index, void* out, int64_t query_count,
                                              int64_t key_count, int64_t width,
                                              cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    const int64_t run = ceil_div(key_count, kSearches);
    return launch(stream, blocks_for(ceil_div(key_count, run), kWarps),
                  knn_backward_keys_kernel<T, A>, static_cast<const A*>(grad),
                  static_cast<const T*>(queries), static_cast<const T*>(keys),
                  static_cast<const A*>(distance), index, static_cast<A*>(out), query_count,
                  key_count, width, run);
  });
}

}  // namespace crpt::cuda
