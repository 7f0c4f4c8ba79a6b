#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// out[n, s, r] = cast(in[n, r, s]): in [count, rows, columns] -> out [count, columns, rows], each
// of float32 or bfloat16, contiguous.
cudaError_t launch_reorder(Dtype in_dtype, Dtype out_dtype, const void* in, void* out,
                           int64_t count, int64_t rows, int64_t columns, cudaStream_t stream);

}  // namespace crpt::cuda
