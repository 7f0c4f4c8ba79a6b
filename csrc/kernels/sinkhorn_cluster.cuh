// An item in the shared memory of one cluster: scores are read once and codes written once, and
// what the blocks exchange, an [M] row of sums per iteration, goes from one shared memory to
// another.
#pragma once

#include "groups.cuh"
#include "sinkhorn_steps.cuh"

namespace crpt::cuda {

constexpr int kClusterThreads = 512;

// What a block keeps, in elements; the sums twice, since a block may be one barrier ahead of one
// that still reads.
template <class A>
struct ClusterMemory {
  A *work, *scale, *sums, *v, *range;

  template <class I>
  __host__ __device__ static I rounded(I count) {
    return (count + 3) / 4 * 4;
  }
  static int64_t elements(int64_t rows, int64_t prototypes) {
    return rounded(rows * prototypes) + rounded(prototypes) + 4 * rounded(prototypes) +
           rounded(rows) + 4;
  }
  __device__ ClusterMemory(int rows, int prototypes)
      : work(reinterpret_cast<A*>(shared_memory())),
        scale(work + rounded(rows * prototypes)),
        sums(scale + rounded(prototypes)),
        v(sums + 4 * rounded(prototypes)),
        range(v + rounded(rows)) {}
  __device__ A* sum(int prototypes, int turn) const {
    return sums + 2 * turn * rounded(prototypes);
  }
  __device__ A* max(int prototypes, int turn) const {
    return sums + (2 * turn + 1) * rounded(prototypes);
  }
};

// Copies the block's scores to shared memory and finds their extremes.
template <class T, class A>
__device__ Range<A> read_scores(const T* scores, int size, A* work) {
  constexpr int kWidth = Pack<T>::kWidth;
  Range<A> range{lowest<A>(), -lowest<A>()};
  int done = 0;
  if (in_packs<T>(scores, 0)) {
    done = size / kWidth * kWidth;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x) * kWidth; i < done; i += kClusterThreads * kWidth) {
      const Pack<T> pack = pack_at(scores + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const A x = load(pack.value + j);
        range.take(x);
        work[i + j] = x;
      }
    }
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < size; i += kClusterThreads) {
    const A x = load(scores + i);
    range.take(x);
    work[i] = x;
  }
  return range;
}

// The extremes of all blocks; every thread of the cluster gets the same.
template <class A>
__device__ Range<A> of_cluster(Range<A> range, A* exchange) {
  range.high = block_reduce<kClusterThreads>(range.high, Max());
  range.low = block_reduce<kClusterThreads>(range.low, Min());
  if (threadIdx.x == 0) {
    exchange[0] = range.high;
    exchange[1] = range.low;
  }
  Cluster::sync();
  const A* other = Cluster::of_block(exchange, static_cast<unsigned>(lane()) % Cluster::size());
  return {warp_reduce(other[0], Max()), warp_reduce(other[1], Min())};
}

template <class T, class A>
__global__ void __launch_bounds__(kClusterThreads, 2)
    sinkhorn_cluster_kernel(const T* scores, T* codes, Problem<A> p, int64_t iterations) {
  const int thread = static_cast<int>(threadIdx.x);
  const int prototypes = static_cast<int>(p.prototypes);
  const unsigned blocks = Cluster::size();
  const int64_t chunk = ceil_div(p.batch, static_cast<int64_t>(blocks));
  const int64_t first = min(static_cast<int64_t>(Cluster::rank()) * chunk, p.batch);
  const int rows = static_cast<int>(min(chunk, p.batch - first));  // the last blocks may have none
  const ClusterMemory<A> memory(static_cast<int>(chunk), prototypes);
  A* work = memory.work;

  for (int64_t item = blockIdx.x / blocks; item < p.items; item += gridDim.x / blocks) {
    const int64_t begin = (item * p.batch + first) * p.prototypes;
    const Range<A> range =
        of_cluster(read_scores(scores + begin, rows * prototypes, work), memory.range);
    const Kernel<A> kernel(p, range.high, range.low);
#pragma unroll 4
    for (int i = thread; i < rows * prototypes; i += kClusterThreads) work[i] = kernel(work[i]);
    __syncthreads();

    const A* scale = nullptr;
    const A* v = nullptr;
    for (int64_t iteration = 0; iteration < iterations; ++iteration) {
      if (iteration > 0) {
        finish_rows<kClusterThreads>(p, work, rows, kernel.wide, scale, memory.v,
                                     static_cast<T*>(nullptr));
        __syncthreads();
        v = memory.v;
      }
      const int turn = static_cast<int>(iteration % 2);
      A* sum = memory.sum(prototypes, turn);
      A* max = memory.max(prototypes, turn);
      for (int m = thread; m < prototypes; m += kClusterThreads) {
        const LogSum<A> part = sum_column(work + m, rows, prototypes, kernel.wide, v);
        sum[m] = part.sum;
        max[m] = part.max;
      }
      Cluster::sync();
      for (int m = thread; m < prototypes; m += kClusterThreads) {
        LogSum<A> total = LogSum<A>::none();
#pragma unroll 8
        for (unsigned rank = 0; rank < blocks; ++rank) {
          const A top = kernel.wide ? Cluster::of_block(max, rank)[m] : A(0);
          add_to(total, {top, Cluster::of_block(sum, rank)[m]}, kernel.wide);
        }
        memory.scale[m] = scale_of(p, total, kernel.wide);
      }
      __syncthreads();
      scale = memory.scale;
    }
    finish_rows<kClusterThreads>(p, work, rows, kernel.wide, scale, memory.v, codes + begin);
    Cluster::sync();  // nobody returns, or reads the next item, while others still read here
  }
}

}  // namespace crpt::cuda
