// Items that no cluster can hold: a cooperative grid, whose blocks all run at once and meet between
// the steps. K lies in device memory and is read twice an iteration, the second time from caches.
#pragma once

#include "groups.cuh"
#include "sinkhorn_steps.cuh"

namespace crpt::cuda {

constexpr int kMaxChunk = 64;  // samples that one block carries
constexpr int64_t kMaxRangeBlocks = kThreads;

// B samples of an item are cut into chunks; the cut depends on the sizes alone, and so do the sums'
// orders.
template <class A>
struct Plan : Problem<A> {
  int64_t chunk, chunks, range_blocks;
  A *work, *range, *wide, *scale, *partial_max, *partial_sum;

  Plan(const Problem<A>& p, A* in_work, A* scratch) : Problem<A>(p) {
    const int64_t least = ceil_div(ceil_div(p.batch, 256), kWarps) * kWarps;
    chunk = least < kMaxChunk ? least : kMaxChunk;
    chunks = ceil_div(p.batch, chunk);
    const int64_t blocks = ceil_div(p.batch * p.prototypes, 8 * kThreads);
    range_blocks = blocks < kMaxRangeBlocks ? blocks : kMaxRangeBlocks;
    work = in_work;                                               // [L, B, M]
    range = scratch;                                              // [L, range_blocks, 2]
    wide = range + p.items * range_blocks * 2;                    // [L]
    scale = wide + p.items;                                       // [L, M]
    partial_max = scale + p.items * p.prototypes;                 // [L, chunks, M]
    partial_sum = partial_max + p.items * chunks * p.prototypes;  // [L, chunks, M]
  }
  int64_t scratch() const {
    return this->items * (2 * range_blocks + 1 + this->prototypes * (1 + 2 * chunks));
  }
  __host__ __device__ int64_t tiles() const {
    return ceil_div(this->prototypes, kWarp);
  }  // of 32 prototypes
  int64_t most_blocks() const {
    const int64_t blocks = chunks > range_blocks ? chunks : range_blocks;
    return this->items * (blocks > tiles() ? blocks : tiles());
  }
};

template <class T, class A>
__device__ void find_range(const T* scores, const Plan<A>& p) {
  const int64_t size = p.batch * p.prototypes;
  for (int64_t block = blockIdx.x; block < p.items * p.range_blocks; block += gridDim.x) {
    const T* s = scores + block / p.range_blocks * size;
    const int64_t first = block % p.range_blocks * kThreads + threadIdx.x;
    A high = load(s);
    A low = high;
#pragma unroll 4
    for (int64_t i = first; i < size; i += p.range_blocks * kThreads) {
      const A x = load(s + i);
      high = Max()(high, x);
      low = Min()(low, x);
    }
    high = block_reduce(high, Max());
    low = block_reduce(low, Min());
    if (threadIdx.x == 0) {
      p.range[2 * block] = high;
      p.range[2 * block + 1] = low;
    }
  }
}

// The chunk's share of every prototype's sum over samples.
template <class A>
__device__ void sum_chunk(const Plan<A>& p, int64_t item, int64_t chunk, const A* work,
                          int64_t rows, bool wide, const A* v) {
  const int64_t out = (item * p.chunks + chunk) * p.prototypes;
  for (int64_t m = threadIdx.x; m < p.prototypes; m += kThreads) {
    const LogSum<A> part = sum_column(work + m, rows, p.prototypes, wide, v);
    p.partial_sum[out + m] = part.sum;
    if (wide) p.partial_max[out + m] = part.max;
  }
}

// work = K or log K, and the first sums over samples.
template <class T, class A>
__device__ void prepare(const T* scores, const Plan<A>& p) {
  for (int64_t block = blockIdx.x; block < p.items * p.chunks; block += gridDim.x) {
    const int64_t item = block / p.chunks;
    const int64_t chunk = block % p.chunks;
    const A* range = p.range + 2 * item * p.range_blocks;
    const int64_t mine = threadIdx.x < p.range_blocks ? threadIdx.x : 0;
    const A high = block_reduce(range[2 * mine], Max());
    const A low = block_reduce(range[2 * mine + 1], Min());
    const Kernel<A> kernel(p, high, low);
    if (chunk == 0 && threadIdx.x == 0) p.wide[item] = kernel.wide;

    const int64_t rows = min(p.chunk, p.batch - chunk * p.chunk);
    const int64_t begin = (item * p.batch + chunk * p.chunk) * p.prototypes;
    const int64_t end = begin + rows * p.prototypes;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      p.work[i] = kernel(load(scores + i));
    }
    __syncthreads();
    sum_chunk(p, item, chunk, p.work + begin, rows, kernel.wide, static_cast<const A*>(nullptr));
  }
}

// The prototypes' scales from the chunks' sums; a block carries 32 prototypes.
template <class A>
__device__ void scale_columns(const Plan<A>& p) {
  __shared__ LogSum<A> partial[kThreads];
  for (int64_t block = blockIdx.x; block < p.items * p.tiles(); block += gridDim.x) {
    const int64_t item = block / p.tiles();
    const int64_t m = block % p.tiles() * kWarp + lane();
    const bool wide = p.wide[item] != 0;
    LogSum<A> total = LogSum<A>::none();
    if (m < p.prototypes) {
      for (int64_t chunk = threadIdx.x / kWarp; chunk < p.chunks; chunk += kWarps) {
        const int64_t i = (item * p.chunks + chunk) * p.prototypes + m;
        add_to(total, {wide ? p.partial_max[i] : A(0), p.partial_sum[i]}, wide);
      }
    }
    partial[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x < kWarp && m < p.prototypes) {
      for (int w = 1; w < kWarps; ++w) add_to(total, partial[w * kWarp + threadIdx.x], wide);
      p.scale[item * p.prototypes + m] = scale_of(p, total, wide);
    }
    __syncthreads();
  }
}

// Prototypes are scaled (unless there was no iteration), then samples; the last time that makes the
// codes, before that the next sums over samples.
template <class T, class A>
__device__ void scale_samples(T* codes, const Plan<A>& p, bool scaled, bool last) {
  __shared__ A v[kMaxChunk];
  for (int64_t block = blockIdx.x; block < p.items * p.chunks; block += gridDim.x) {
    const int64_t item = block / p.chunks;
    const int64_t chunk = block % p.chunks;
    const int64_t rows = min(p.chunk, p.batch - chunk * p.chunk);
    const int64_t begin = (item * p.batch + chunk * p.chunk) * p.prototypes;
    const bool wide = p.wide[item] != 0;
    finish_rows<kThreads>(p, p.work + begin, rows, wide,
                          scaled ? p.scale + item * p.prototypes : nullptr, v,
                          last ? codes + begin : nullptr);
    if (last) continue;
    __syncthreads();
    sum_chunk(p, item, chunk, p.work + begin, rows, wide, v);
    __syncthreads();
  }
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    sinkhorn_grid_kernel(const T* scores, T* codes, Plan<A> p, int64_t iterations) {
  find_range(scores, p);
  sync_grid();
  prepare(scores, p);
  sync_grid();
  if (iterations == 0) scale_samples(codes, p, false, true);
  for (int64_t i = 1; i <= iterations; ++i) {
    scale_columns(p);
    sync_grid();
    scale_samples(codes, p, true, i == iterations);
    if (i < iterations) sync_grid();
  }
}

}  // namespace crpt::cuda
