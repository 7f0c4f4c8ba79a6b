// How high the bands of a convolution are: the shared memory of the device decides.
#pragma once

#include "conv_tiles.cuh"

namespace crpt::cuda {

// The highest bands for which bytes_of(bands) of shared memory are there, and these bytes.
template <class Kernel, class Bytes>
cudaError_t plan_bands(Kernel* kernel, int64_t batch, int64_t height, int64_t width, Bytes bytes_of,
                       ConvBands* bands, std::size_t* shared) {
  // Tiles, and what is added to their numbers, are counted in 32 bits.
  if (batch * height >= int64_t{1} << 30) return cudaErrorInvalidValue;
  int device = 0, room = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  for (int64_t rows = height; rows >= 1; rows = bands->rows - 1) {
    *bands = ConvBands(batch, height, width, rows);
    *shared = static_cast<std::size_t>(bytes_of(*bands));
    if (*shared <= static_cast<std::size_t>(room)) {
      return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace crpt::cuda
