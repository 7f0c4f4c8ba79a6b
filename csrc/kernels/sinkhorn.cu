// Sinkhorn-Knopp in 2 + 2 * iterations launches. An item whose scores span at most 40 temperatures
// is scaled in exp space: K = exp((s - max) / T) is stored once, u scales prototypes and v samples.
// A wider item is normalised in log space. The device decides, item by item, so the host never
// waits.
#include "device.cuh"
#include "sinkhorn.cuh"

namespace crpt::cuda {
namespace {

constexpr double kWidestExp =
    40;  // exp(-40) and the scales it leads to are far from the limits of fp32
constexpr int kMaxChunk = 64;  // samples that one block carries
constexpr int64_t kMaxRangeBlocks = kThreads;

// B samples of an item are cut into chunks; the cut depends on B alone, and so do the sums' orders.
template <class A>
struct Plan {
  int64_t items, batch, prototypes;
  int64_t chunk, chunks, range_blocks;
  A temperature, log_batch, log_prototypes;
  A *work, *range, *wide, *scale, *partial_max, *partial_sum;
};

int64_t chunk_of(int64_t batch) {
  const int64_t rows = ceil_div(ceil_div(batch, 256), kWarps) * kWarps;
  return rows < kMaxChunk ? rows : kMaxChunk;
}

int64_t range_blocks_of(int64_t batch, int64_t prototypes) {
  const int64_t blocks = ceil_div(batch * prototypes, 8 * kThreads);
  return blocks < kMaxRangeBlocks ? blocks : kMaxRangeBlocks;
}

template <class A>
Plan<A> plan_of(int64_t items, int64_t batch, int64_t prototypes, double temperature, A* work,
                A* scratch) {
  Plan<A> p{};
  p.items = items;
  p.batch = batch;
  p.prototypes = prototypes;
  p.chunk = chunk_of(batch);
  p.chunks = ceil_div(batch, p.chunk);
  p.range_blocks = range_blocks_of(batch, prototypes);
  p.temperature = static_cast<A>(temperature);
  p.log_batch = static_cast<A>(std::log(static_cast<double>(batch)));
  p.log_prototypes = static_cast<A>(std::log(static_cast<double>(prototypes)));
  p.work = work;                                                  // [L, B, M]
  p.range = scratch;                                              // [L, range_blocks, 2]
  p.wide = p.range + items * p.range_blocks * 2;                  // [L]
  p.scale = p.wide + items;                                       // [L, M]
  p.partial_max = p.scale + items * prototypes;                   // [L, chunks, M]
  p.partial_sum = p.partial_max + items * p.chunks * prototypes;  // [L, chunks, M]
  return p;
}

template <class T, class A>
__global__ void sinkhorn_range_kernel(const T* scores, Plan<A> p) {
  const int64_t size = p.batch * p.prototypes;
  for (int64_t block = blockIdx.x; block < p.items * p.range_blocks; block += gridDim.x) {
    const T* s = scores + block / p.range_blocks * size;
    const int64_t first = block % p.range_blocks * kThreads + threadIdx.x;
    A high = load(s);
    A low = high;
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

// The chunk's share of every prototype's sum over samples; v weighs the samples in exp space.
template <class A>
__device__ void sum_columns(const Plan<A>& p, int64_t item, int64_t chunk, bool wide, const A* v) {
  const int64_t first = chunk * p.chunk;
  const int64_t rows = min(p.chunk, p.batch - first);
  const A* work = p.work + (item * p.batch + first) * p.prototypes;
  const int64_t out = (item * p.chunks + chunk) * p.prototypes;
  for (int64_t m = threadIdx.x; m < p.prototypes; m += kThreads) {
    A sum = 0;
    if (wide) {
      A top = lowest<A>();
      for (int64_t b = 0; b < rows; ++b) top = Max()(top, work[b * p.prototypes + m]);
      for (int64_t b = 0; b < rows; ++b) sum += exp_of(work[b * p.prototypes + m] - top);
      p.partial_max[out + m] = top;
    } else {
      for (int64_t b = 0; b < rows; ++b) sum += work[b * p.prototypes + m] * v[b];
    }
    p.partial_sum[out + m] = sum;
  }
}

// work = K or log K, and the first sums over samples.
template <class T, class A>
__global__ void sinkhorn_prepare_kernel(const T* scores, Plan<A> p) {
  __shared__ A ones[kMaxChunk];
  if (threadIdx.x < kMaxChunk) ones[threadIdx.x] = 1;
  for (int64_t block = blockIdx.x; block < p.items * p.chunks; block += gridDim.x) {
    const int64_t item = block / p.chunks;
    const int64_t chunk = block % p.chunks;
    const A* range = p.range + 2 * item * p.range_blocks;
    const int64_t mine = threadIdx.x < p.range_blocks ? threadIdx.x : 0;
    A top = block_reduce(range[2 * mine], Max());
    const A low = block_reduce(range[2 * mine + 1], Min());
    const bool wide = !((top - low) / p.temperature <= static_cast<A>(kWidestExp));  // NaN is wide
    top = Max()(top, lowest<A>());
    if (chunk == 0 && threadIdx.x == 0) p.wide[item] = wide;

    const int64_t begin = (item * p.batch + chunk * p.chunk) * p.prototypes;
    const int64_t size = min(p.chunk, p.batch - chunk * p.chunk) * p.prototypes;
    for (int64_t i = begin + threadIdx.x; i < begin + size; i += kThreads) {
      const A x = (load(scores + i) - top) / p.temperature;
      p.work[i] = wide ? Max()(x, static_cast<A>(-1e30)) : exp_of(x);
    }
    __syncthreads();
    sum_columns(p, item, chunk, wide, ones);
  }
}

// scale = 1 / (M * sum) in exp space, log(sum) in log space. A block carries 32 prototypes.
template <class A>
__global__ void sinkhorn_columns_kernel(Plan<A> p) {
  __shared__ LogSum<A> partial[kThreads];
  const int64_t tiles = ceil_div(p.prototypes, kWarp);
  for (int64_t block = blockIdx.x; block < p.items * tiles; block += gridDim.x) {
    const int64_t item = block / tiles;
    const int64_t m = block % tiles * kWarp + lane();
    const bool wide = p.wide[item] != 0;
    LogSum<A> total = LogSum<A>::none();
    if (m < p.prototypes) {
      for (int64_t chunk = threadIdx.x / kWarp; chunk < p.chunks; chunk += kWarps) {
        const int64_t i = (item * p.chunks + chunk) * p.prototypes + m;
        if (wide) {
          total.merge({p.partial_max[i], p.partial_sum[i]});
        } else {
          total.sum += p.partial_sum[i];
        }
      }
    }
    partial[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x < kWarp && m < p.prototypes) {
      for (int w = 1; w < kWarps; ++w) {
        const LogSum<A> next = partial[w * kWarp + threadIdx.x];
        if (wide) {
          total.merge(next);
        } else {
          total.sum += next.sum;
        }
      }
      p.scale[item * p.prototypes + m] =
          wide ? total.log() : 1 / (static_cast<A>(p.prototypes) * total.sum);
    }
    __syncthreads();
  }
}

// One sample in exp space, by one warp: returns v, or writes the codes when codes are asked for.
template <class T, class A>
__device__ A scale_row(const Plan<A>& p, const A* work, const A* u, T* codes) {
  A sum = 0;
  for (int64_t m = lane(); m < p.prototypes; m += kWarp) sum += work[m] * (u ? u[m] : A(1));
  sum = warp_reduce(sum, Sum());
  if (codes) {
    for (int64_t m = lane(); m < p.prototypes; m += kWarp) {
      store(codes + m, work[m] * (u ? u[m] : A(1)) / sum);
    }
  }
  return 1 / (static_cast<A>(p.batch) * sum);
}

// The same in log space, where work itself is normalised.
template <class T, class A>
__device__ void normalise_row(const Plan<A>& p, A* work, const A* log_sum, T* codes) {
  A top = lowest<A>();
  for (int64_t m = lane(); m < p.prototypes; m += kWarp) {
    if (log_sum) work[m] = work[m] - log_sum[m] - p.log_prototypes;
    top = Max()(top, work[m]);
  }
  top = warp_reduce(top, Max());
  A sum = 0;
  for (int64_t m = lane(); m < p.prototypes; m += kWarp) sum += exp_of(work[m] - top);
  sum = warp_reduce(sum, Sum());
  const A log_total = top + log_of(sum);
  for (int64_t m = lane(); m < p.prototypes; m += kWarp) {
    if (codes) {
      store(codes + m, exp_of(work[m] - top) / sum);
    } else {
      work[m] = work[m] - log_total - p.log_batch;
    }
  }
}

// Prototypes are scaled (unless there was no iteration), then samples; the last time that makes the
// codes, before that the next sums over samples.
template <class T, class A>
__global__ void sinkhorn_rows_kernel(T* codes, Plan<A> p, bool scaled, bool last) {
  __shared__ A v[kMaxChunk];
  for (int64_t block = blockIdx.x; block < p.items * p.chunks; block += gridDim.x) {
    const int64_t item = block / p.chunks;
    const int64_t chunk = block % p.chunks;
    const int64_t first = chunk * p.chunk;
    const int64_t rows = min(p.chunk, p.batch - first);
    const bool wide = p.wide[item] != 0;
    const A* scale = scaled ? p.scale + item * p.prototypes : nullptr;
    for (int64_t b = threadIdx.x / kWarp; b < rows; b += kWarps) {
      const int64_t row = (item * p.batch + first + b) * p.prototypes;
      T* out = last ? codes + row : nullptr;
      if (wide) {
        normalise_row(p, p.work + row, scale, out);
      } else {
        const A of_sample = scale_row(p, p.work + row, scale, out);
        if (lane() == 0) v[b] = of_sample;
      }
    }
    if (last) continue;
    __syncthreads();
    sum_columns(p, item, chunk, wide, v);
    __syncthreads();
  }
}

template <class T>
cudaError_t run(const T* scores, T* codes, Plan<compute_t<T>> p, int64_t iterations,
                cudaStream_t stream) {
  using A = compute_t<T>;
  const unsigned chunks = blocks_for(p.items * p.chunks, 1);
  const unsigned columns = blocks_for(p.items * ceil_div(p.prototypes, kWarp), 1);
  cudaError_t error = launch(stream, blocks_for(p.items * p.range_blocks, 1),
                             sinkhorn_range_kernel<T, A>, scores, p);
  if (error == cudaSuccess) {
    error = launch(stream, chunks, sinkhorn_prepare_kernel<T, A>, scores, p);
  }
  if (iterations == 0 && error == cudaSuccess) {
    error = launch(stream, chunks, sinkhorn_rows_kernel<T, A>, codes, p, false, true);
  }
  for (int64_t i = 1; i <= iterations && error == cudaSuccess; ++i) {
    error = launch(stream, columns, sinkhorn_columns_kernel<A>, p);
    if (error == cudaSuccess) {
      error = launch(stream, chunks, sinkhorn_rows_kernel<T, A>, codes, p, true, i == iterations);
    }
  }
  return error;
}

}  // namespace

int64_t sinkhorn_scratch(int64_t items, int64_t batch, int64_t prototypes) {
  const int64_t chunks = ceil_div(batch, chunk_of(batch));
  return items *
         (2 * range_blocks_of(batch, prototypes) + 1 + prototypes + 2 * chunks * prototypes);
}

cudaError_t launch_sinkhorn(Dtype dtype, const void* scores, void* codes, void* work, void* scratch,
                            int64_t items, int64_t batch, int64_t prototypes, double temperature,
                            int64_t iterations, cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    const Plan<A> p = plan_of(items, batch, prototypes, temperature, static_cast<A*>(work),
                              static_cast<A*>(scratch));
    return run(static_cast<const T*>(scores), static_cast<T*>(codes), p, iterations, stream);
  });
}

}  // namespace crpt::cuda
