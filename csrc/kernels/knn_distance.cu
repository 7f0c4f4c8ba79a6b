// The k-th nearest key. Squares come from the differences themselves, never from |q|^2 + |k|^2 - 2
// q.k, which loses near neighbours to cancellation; then each row is searched digit by digit (radix
// select), for any k.
#include "device.cuh"
#include "knn_distance.cuh"

namespace crpt::cuda {
namespace {

constexpr int kSide = 16;  // threads along a side of the tile: 16 x 16 = kThreads
constexpr int kPer = 4;    // results of a thread along a side
constexpr int kTile = kSide * kPer;
constexpr int kDepth = 16;  // dimensions in shared memory at a time
static_assert(kSide * kSide == kThreads);

template <class T, class A>
__device__ void load_tile(A (*tile)[kTile + 1], const T* rows, int64_t first, int64_t count,
                          int64_t depth, int64_t width) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
    const int64_t row = first + i / kDepth;
    const int64_t d = depth + i % kDepth;
    tile[i % kDepth][i / kDepth] =
        row < count && d < width ? A(load(rows + row * width + d)) : A(0);
  }
}

template <class T, class A>
__global__ void knn_squares_kernel(const T* queries, const T* keys, A* squares, int64_t query_count,
                                   int64_t key_count, int64_t width) {
  __shared__ A query_tile[kDepth][kTile + 1];
  __shared__ A key_tile[kDepth][kTile + 1];
  const int row = static_cast<int>(threadIdx.x) / kSide;
  const int column = static_cast<int>(threadIdx.x) % kSide;
  const int64_t across = ceil_div(key_count, kTile);
  const int64_t tiles = ceil_div(query_count, kTile) * across;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_query = tile / across * kTile;
    const int64_t first_key = tile % across * kTile;
    A total[kPer][kPer] = {};
    for (int64_t depth = 0; depth < width; depth += kDepth) {
      load_tile(query_tile, queries, first_query, query_count, depth, width);
      load_tile(key_tile, keys, first_key, key_count, depth, width);
      __syncthreads();
      A part[kPer][kPer] = {};  // sums of sums: the error grows with width / 16, not with width
      for (int d = 0; d < kDepth; ++d) {
        for (int i = 0; i < kPer; ++i) {
          for (int j = 0; j < kPer; ++j) {
            const A difference = query_tile[d][row + i * kSide] - key_tile[d][column + j * kSide];
            part[i][j] += difference * difference;
          }
        }
      }
      for (int i = 0; i < kPer; ++i) {
        for (int j = 0; j < kPer; ++j) total[i][j] += part[i][j];
      }
      __syncthreads();
    }
    for (int i = 0; i < kPer; ++i) {
      for (int j = 0; j < kPer; ++j) {
        const int64_t b = first_query + row + i * kSide;
        const int64_t q = first_key + column + j * kSide;
        if (b < query_count && q < key_count) squares[b * key_count + q] = total[i][j];
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

// One warp per key looks for its queries 32 at a time and adds them in order, without atomics.
template <class T, class A>
__global__ void knn_backward_keys_kernel(const A* grad, const T* queries, const T* keys,
                                         const A* distance, const int64_t* index, A* out,
                                         int64_t query_count, int64_t key_count, int64_t width) {
  for (int64_t q = global_warp(); q < key_count; q += all_warps()) {
    for (int64_t d = lane(); d < width; d += kWarp) out[q * width + d] = 0;
    for (int64_t first = 0; first < query_count; first += kWarp) {
      const bool mine = first + lane() < query_count && index[first + lane()] == q;
      for (unsigned found = __ballot_sync(0xffffffffu, mine); found != 0; found &= found - 1) {
        const int64_t b = first + __ffs(static_cast<int>(found)) - 1;
        const A factor = distance[b] == 0 ? A(0) : grad[b] / distance[b];
        for (int64_t d = lane(); d < width; d += kWarp) {
          out[q * width + d] +=
              factor * (load(keys + q * width + d) - load(queries + b * width + d));
        }
      }
    }
  }
}

}  // namespace

cudaError_t launch_knn_distance(Dtype dtype, const void* queries, const void* keys, void* squares,
                                void* distance, int64_t* index, int64_t query_count,
                                int64_t key_count, int64_t width, int64_t k, cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    const int64_t tiles = ceil_div(query_count, kTile) * ceil_div(key_count, kTile);
    const cudaError_t error = launch(stream, blocks_for(tiles, 1), knn_squares_kernel<T, A>,
                                     static_cast<const T*>(queries), static_cast<const T*>(keys),
                                     static_cast<A*>(squares), query_count, key_count, width);
    if (error != cudaSuccess) return error;
    return launch(stream, blocks_for(query_count, 1), knn_select_kernel<A>,
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
    return launch(stream, blocks_for(key_count, kWarps), knn_backward_keys_kernel<T, A>,
                  static_cast<const A*>(grad), static_cast<const T*>(queries),
                  static_cast<const T*>(keys), static_cast<const A*>(distance), index,
                  static_cast<A*>(out), query_count, key_count, width);
  });
}

}  // namespace crpt::cuda
