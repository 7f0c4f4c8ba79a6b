// The encoder's gradients, summed over images.
#pragma once

#include <string.h>

#include "kernels/parallel.h"

namespace crpt::CRPT_ISA {
namespace {

// Images whose gradients are summed up before those of other chunks are added: as many chunks as
// threads can share well, whatever the number of threads.
constexpr int64_t kMostChunks = 32;

// out[i] = the sum over chunks, in their order.
inline void add_chunks(const float* sums, int64_t chunks, int64_t stride, int64_t begin,
                       int64_t end, float* __restrict out) {
  for (int64_t i = begin; i < end; ++i) out[i] = sums[i];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float* more = sums + chunk * stride;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) out[i] += more[i];
  }
}

// out[0, size) = the sum over images of what add(image, memory, sums) adds to sums, with
// `workspace` bytes of memory of its own.
template <typename Add>
inline void sum_over_images(int64_t batch, int threads, int64_t size, int64_t workspace,
                            const Add& add, float* out) {
  if (batch == 0) {
    memset(out, 0, size * sizeof(float));
    return;
  }
  const int64_t per_chunk = (batch + kMostChunks - 1) / kMostChunks;
  const int64_t chunks = (batch + per_chunk - 1) / per_chunk;
  const int workers = static_cast<int>(threads < chunks ? threads : chunks);
  const Scratch<char> memory(workers * workspace);
  const Scratch<float> sums(chunks * size);
  for_each_item(chunks, workers, [&](int64_t chunk, int64_t worker) {
    float* own = sums.get() + chunk * size;
    memset(own, 0, size * sizeof(float));
    const int64_t end = (chunk + 1) * per_chunk < batch ? (chunk + 1) * per_chunk : batch;
    for (int64_t b = chunk * per_chunk; b < end; ++b) {
      add(b, memory.get() + worker * workspace, own);
    }
  });
  constexpr int64_t kAtOnce = 1024;
  parallel_for((size + kAtOnce - 1) / kAtOnce, team_size(workers, chunks * size),
               [&](int64_t block) {
                 const int64_t end = (block + 1) * kAtOnce < size ? (block + 1) * kAtOnce : size;
                 add_chunks(sums.get(), chunks, size, block * kAtOnce, end, out);
               });
}

}  // namespace
}  // namespace crpt::CRPT_ISA
