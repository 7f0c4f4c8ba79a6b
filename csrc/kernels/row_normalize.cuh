#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// unit = rows / max(|row|, 1e-12), norm = |row|: rows [R, D] of dtype -> unit [R, D], norm [R] in
// the compute type.
cudaError_t launch_row_normalize(Dtype dtype, const void* rows, void* unit, void* norm,
                                 int64_t count, int64_t width, cudaStream_t stream);

// out = (grad - unit <unit, grad>) / norm, or grad / 1e-12 for a row shorter than that:
// grad, unit [R, D], norm [R] -> out [R, D], all of dtype, float32 or float64.
cudaError_t launch_row_normalize_backward(Dtype dtype, const void* grad, const void* unit,
                                          const void* norm, void* out, int64_t count, int64_t width,
                                          cudaStream_t stream);

}  // namespace crpt::cuda
