// An item in the registers of one cluster of blocks: scores are read once and codes written once,
// and only an [M] row of sums per iteration goes through shared memory. Each block finishes its
// share of the prototypes: the others push their sums to it, and it pushes the scales back, so that
// nobody waits for an answer from another multiprocessor, and few bytes go between them.
#pragma once

#include "groups.cuh"
#include "sinkhorn_steps.cuh"

namespace crpt::cuda {

constexpr int kTileThreads = 512;
constexpr int kTileWarps = kTileThreads / kWarp;

// What a block holds: each warp kRows samples, each lane kParts times four neighbours of them.
template <int kPartsOfLane, int kRowsOfWarp>
struct Tile {
  static constexpr int kParts = kPartsOfLane, kRows = kRowsOfWarp;
  static constexpr int kColumns = kParts * 4 * kWarp;
  static constexpr int kBatch = kTileWarps * kRows;
  static constexpr int kElements = kParts * 4 * kRows;  // of a thread, one register each
  static constexpr int kResident = kElements > 32 ? 1 : 2;

  // In floats: sums of the warps, scales, sums of the blocks for the share that this one finishes,
  // and extremes of the blocks.
  static constexpr int64_t shared(int64_t blocks) {
    return (kTileWarps + 2) * kColumns + 2 * blocks;
  }
};

// Four neighbours in shared memory.
struct alignas(16) Four {
  float value[4];
};

// log sum exp of `count` values, lowest where all are -inf.
template <class Value>
__device__ float log_sum_exp(int count, Value value) {
  float top = lowest<float>(), sum = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) top = Max()(top, value(i));
#pragma unroll 4
  for (int i = 0; i < count; ++i) sum += exp_of(value(i) - top);
  return top + log_of(sum);
}

// The sum of the parts, or the logarithm of the sum of what they are the logarithms of.
template <class Part>
__device__ float total(int count, bool wide, Part part) {
  if (wide) return log_sum_exp(count, part);
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) sum += part(i);
  return sum;
}

// One warp's part of an item, and its steps. In exp space it is K, or 0 where there is no sample
// or prototype; in log space log K, or -inf.
template <class Tile>
struct WarpRows {
  static constexpr int kRows = Tile::kRows, kEach = Tile::kParts * 4;

  const Problem<float>& p;
  int rows;  // of the block
  bool wide = false;
  float x[kRows][kEach];

  __device__ WarpRows(const Problem<float>& problem, int of_block) : p(problem), rows(of_block) {}

  __device__ static int row(int r) {
    return static_cast<int>(threadIdx.x) / kWarp + r * kTileWarps;
  }
  __device__ static int column(int part) { return (part * kWarp + lane()) * 4; }
  __device__ bool has(int part) const { return column(part) < static_cast<int>(p.prototypes); }

  // Reads the scores and returns their extremes.
  template <class T>
  __device__ Range<float> read(const T* scores) {
    struct alignas(4 * sizeof(T)) Neighbours {
      T value[4];
    };
    float high = lowest<float>(), low = -high;
    bool bad = false;  // fmaxf and fminf lose a NaN
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
        if (row(r) >= rows || !has(part)) continue;
        const auto some = *reinterpret_cast<const Neighbours*>(
            scores + static_cast<int64_t>(row(r)) * p.prototypes + column(part));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float score = load(some.value + j);
          x[r][4 * part + j] = score;
          high = fmaxf(high, score);
          low = fminf(low, score);
          bad |= score != score;
        }
      }
    }
    return {bad ? NAN : high, low};
  }

  __device__ void apply(const Kernel<float>& kernel) {
    wide = kernel.wide;
    const auto fill = [&](auto value, float none) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          x[r][i] = row(r) < rows && has(i / 4) ? value(x[r][i]) : none;
        }
      }
    };
    if (wide) {
      fill([&](float score) { return kernel.in_log(score); }, -INFINITY);
    } else {
      fill([&](float score) { return kernel.in_exp(score); }, 0.0f);
    }
  }

  // Each prototype's sum over the warp's samples, weighed by v; in log space its logarithm.
  __device__ void sum_columns(const float (&v)[kRows], float* sums) const {
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      Four sum;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * part + j;
        if (wide) {
          sum.value[j] = log_sum_exp(kRows, [&](int r) { return x[r][i]; });
          continue;
        }
        sum.value[j] = x[0][i] * v[0];
#pragma unroll
        for (int r = 1; r < kRows; ++r) sum.value[j] += x[r][i] * v[r];
      }
      *reinterpret_cast<Four*>(sums + column(part)) = sum;
    }
  }

  // Prototypes scaled by u, or by 1 / exp(u) / M in log space, and then samples to sums of 1: in
  // exp space their factor into v, in log space in place.
  __device__ void scale(const float* u, float (&v)[kRows]) {
    if (wide) {
      normalise(u, [&](int r, float log_total) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) x[r][i] = x[r][i] - log_total - p.log_batch;
      });
      return;
    }
    float sum[kRows];
    sum_rows(u, sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      v[r] = row(r) < rows ? 1 / (static_cast<float>(p.batch) * sum[r]) : 0.0f;
    }
  }

  // The same for the last time: writes the codes.
  template <class T>
  __device__ void write(const float* u, T* codes) {
    if (wide) {
      normalise(u, [&](int r, float log_total) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) x[r][i] = exp_of(x[r][i] - log_total);
      });
    } else {
      float inverse[kRows];
      sum_rows(u, inverse);
#pragma unroll
      for (int r = 0; r < kRows; ++r) inverse[r] = 1 / inverse[r];
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
        const Four scale = *reinterpret_cast<const Four*>(u + column(part));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int j = 0; j < 4; ++j) x[r][4 * part + j] *= scale.value[j] * inverse[r];
        }
      }
    }
    struct alignas(4 * sizeof(T)) Neighbours {
      T value[4];
    };
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
        if (row(r) >= rows || !has(part)) continue;
        Neighbours some;
#pragma unroll
        for (int j = 0; j < 4; ++j) store(some.value + j, x[r][4 * part + j]);
        *reinterpret_cast<Neighbours*>(codes + static_cast<int64_t>(row(r)) * p.prototypes +
                                       column(part)) = some;
      }
    }
  }

 private:
  __device__ void sum_rows(const float* u, float (&sum)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = 0;
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const Four scale = *reinterpret_cast<const Four*>(u + column(part));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[r] += x[r][4 * part + j] * scale.value[j];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = warp_reduce(sum[r], Sum());
  }

  // Log space: subtracts the prototypes' logarithmic sums, then calls use(r, logarithm of the sum)
  // for each sample that there is.
  template <class Use>
  __device__ void normalise(const float* log_sums, Use use) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row(r) >= rows) continue;
      float top = lowest<float>(), sum = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        x[r][i] = x[r][i] - log_sums[column(i / 4) + i % 4] - p.log_prototypes;
        top = Max()(top, x[r][i]);
      }
      top = warp_reduce(top, Max());
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += exp_of(x[r][i] - top);
      use(r, top + log_of(warp_reduce(sum, Sum())));
    }
  }
};

// At least one iteration; rows of scores and codes are made of packs of four.
template <class Tile, class T>
__global__ void __launch_bounds__(kTileThreads, Tile::kResident)
    sinkhorn_registers_kernel(const T* scores, T* codes, Problem<float> p, int64_t iterations) {
  const int thread = static_cast<int>(threadIdx.x);
  const int prototypes = static_cast<int>(p.prototypes);
  const int blocks = static_cast<int>(Cluster::size()), rank = static_cast<int>(Cluster::rank());
  const int64_t chunk = ceil_div(p.batch, static_cast<int64_t>(blocks));
  const int64_t first = min(rank * chunk, p.batch);
  const int rows = static_cast<int>(min(chunk, p.batch - first));  // the last blocks may have none

  // Of the prototypes a block finishes a power of two, so that finding them is no division.
  int bits = 5;
  while (blocks << bits < prototypes) ++bits;
  const int share = 1 << bits;
  float* of_warps = reinterpret_cast<float*>(shared_memory());
  float* scale = of_warps + kTileWarps * Tile::kColumns;
  float* of_blocks = scale + Tile::kColumns;  // [blocks, share]
  float* extremes = of_blocks + Tile::kColumns;

  // Beyond the prototypes the scale of nothing is 0, so that nothing comes of it.
  for (int m = prototypes + thread; m < Tile::kColumns; m += kTileThreads) scale[m] = 0;
  Cluster::sync();  // all blocks are there: from now on they write to each other
  for (int64_t item = blockIdx.x / blocks; item < p.items; item += gridDim.x / blocks) {
    const int64_t begin = (item * p.batch + first) * p.prototypes;
    WarpRows<Tile> mine(p, rows);
    Range<float> range = mine.read(scores + begin);
    range.high = block_reduce<kTileThreads>(range.high, Max());
    range.low = block_reduce<kTileThreads>(range.low, Min());
    if (thread < blocks) {
      float* to = Cluster::of_block(extremes, static_cast<unsigned>(thread)) + 2 * rank;
      to[0] = range.high;
      to[1] = range.low;
    }
    Cluster::sync();
    const float* from = extremes + 2 * (lane() % blocks);
    mine.apply(Kernel<float>(p, warp_reduce(from[0], Max()), warp_reduce(from[1], Min())));

    float v[Tile::kRows];
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) v[r] = 1;
    for (int64_t iteration = 0; iteration < iterations; ++iteration) {
      if (iteration > 0) mine.scale(scale, v);
      mine.sum_columns(v, of_warps + thread / kWarp * Tile::kColumns);
      __syncthreads();
      for (int m = thread; m < prototypes; m += kTileThreads) {
        float* to = of_blocks + (rank << bits) + (m & (share - 1));
        *Cluster::of_block(to, static_cast<unsigned>(m >> bits)) =
            total(kTileWarps, mine.wide, [&](int w) { return of_warps[w * Tile::kColumns + m]; });
      }
      Cluster::sync();
      for (int i = thread; i < blocks << bits; i += kTileThreads) {  // each scale for each block
        const int k = i & (share - 1), m = (rank << bits) + k;
        if (m >= prototypes) continue;
        const float sum =
            total(blocks, mine.wide, [&](int from) { return of_blocks[(from << bits) + k]; });
        *Cluster::of_block(scale + m, static_cast<unsigned>(i >> bits)) =
            mine.wide ? sum : 1 / (static_cast<float>(prototypes) * sum);
      }
      Cluster::sync();
    }
    mine.write(scale, codes + begin);
  }
}

// Calls run(Tile, T) with the smallest tile that holds `rows` samples of a block, where there is
// one.
template <class Run>
cudaError_t with_tile(int64_t rows, int64_t prototypes, Run run) {
  if (prototypes <= 512) {
    if (rows <= Tile<4, 2>::kBatch) return run(Tile<4, 2>{});
    if (rows <= Tile<4, 4>::kBatch) return run(Tile<4, 4>{});
  } else if (prototypes <= 1024) {
    if (rows <= Tile<8, 1>::kBatch) return run(Tile<8, 1>{});
    if (rows <= Tile<8, 2>::kBatch) return run(Tile<8, 2>{});
  }
  return cudaErrorNotSupported;
}

}  // namespace crpt::cuda
