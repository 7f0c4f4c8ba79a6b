// Random shift of replicate-padded images, and its adjoint: one block per band of rows of a plane,
// sixteen bytes of the result per thread and store.
//
// Floor on an H200 (4.0 TB/s copied): every byte read and written once, [512, 9, 84, 84] uint8 65
// MB in 16 us, fp32 260 MB in 65 us: reached 67% and 84%. Of bytes index arithmetic is the rest.
#include "random_shift.cuh"
#include "shift.cuh"

namespace crpt::cuda {
namespace {

// How far apart, in elements, the images that are read lie, their planes and the rows of these.
struct Strides {
  int64_t image, plane, row;
};

// kPer elements at a time: a pack, or one where planes are no packs. `pixel` elements move
// together.
template <class T, int kPer>
__global__ void __launch_bounds__(kThreads)
    random_shift_kernel(const T* __restrict__ images, Strides strides, const int64_t* shifts,
                        T* __restrict__ out, Bands bands, int64_t planes, int pixel, int64_t pad,
                        Divider by_row, Divider by_pixel) {
  struct alignas(kPer * sizeof(T)) Part {
    T value[kPer];
  };
  const int row = static_cast<int>(bands.row);
  for (int64_t i = blockIdx.x; i < bands.count; i += gridDim.x) {
    const Band band(bands, i);
    const int64_t image = band.plane / planes;
    const int64_t dy = shift_of(shifts, image * 2, pad), dx = shift_of(shifts, image * 2 + 1, pad);
    const int64_t width = row / pixel;
    const int shift = static_cast<int>(max(min(dx, width), -width)) * pixel;
    const T* from = images + image * strides.image + (band.plane - image * planes) * strides.plane;
    T* to = out + (band.plane * bands.height + band.first) * bands.row;
#pragma unroll 2
    for (int first = static_cast<int>(threadIdx.x) * kPer; first < band.rows * row;
         first += kThreads * kPer) {
      int y = by_row.quotient(first);
      int x = first - y * row;
      const T* source = from + clamp_to(band.first + y + dy, bands.height) * strides.row;
      Part part;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        int at = x + shift;
        if (at < 0) at = by_pixel.remainder(x);
        if (at >= row) at = row - pixel + by_pixel.remainder(x);
        part.value[j] = source[at];
        if (++x == row && j + 1 < kPer) {
          x = 0;
          source = from + clamp_to(band.first + ++y + dy, bands.height) * strides.row;
        }
      }
      *reinterpret_cast<Part*>(to + first) = part;
    }
  }
}

__global__ void __launch_bounds__(kThreads, kShiftBlocks)
    random_shift_bytes_kernel(const uint8_t* images, Strides strides, const int64_t* shifts,
                              uint8_t* out, Bands bands, Divider by_planes, int64_t pad,
                              Divider by_fours) {
  for (int64_t i = blockIdx.x; i < bands.count; i += gridDim.x) {
    const Band band(bands, i);
    const int plane = static_cast<int>(band.plane);
    const int64_t image = by_planes.quotient(plane);
    const int64_t dy = shift_of(shifts, image * 2, pad), dx = shift_of(shifts, image * 2 + 1, pad);
    const uint8_t* from =
        images + image * strides.image + by_planes.remainder(plane) * strides.plane;
    shift_bytes(from, strides.row, band, bands, by_fours, dy, dx,
                out + (band.plane * bands.height + band.first) * bands.row);
  }
}

// The outputs [first, last] that read input i along one axis; none when first > last.
struct Readers {
  int64_t first, last;
};
__device__ inline Readers readers_of(int64_t i, int64_t shift, int64_t size) {
  return {i == 0 ? 0 : max(i - shift, int64_t{0}),
          i == size - 1 ? size - 1 : min(i - shift, size - 1)};
}

// Pixels are of one element where kSingle, and else of `pixel`. As many blocks on a multiprocessor
// as there can be without spilled registers.
template <class T, bool kSingle>
__global__ void __launch_bounds__(kThreads, kSingle ? 6 : 5)
    random_shift_backward_kernel(const T* __restrict__ grad, Strides strides, const int64_t* shifts,
                                 T* __restrict__ out, Bands bands, int64_t planes, int pixel,
                                 int64_t pad, Divider by_row, Divider by_pixel) {
  const int row = static_cast<int>(bands.row), step = kSingle ? 1 : pixel;
  const int64_t width = row / step;
  for (int64_t unit = blockIdx.x; unit < bands.count; unit += gridDim.x) {
    const Band band(bands, unit);
    const int64_t image = band.plane / planes;
    const int64_t dy = shift_of(shifts, image * 2, pad), dx = shift_of(shifts, image * 2 + 1, pad);
    const T* from = grad + image * strides.image + (band.plane - image * planes) * strides.plane;
    T* to = out + (band.plane * bands.height + band.first) * bands.row;
    for (int i = static_cast<int>(threadIdx.x); i < band.rows * row; i += kThreads) {
      const int y = by_row.quotient(i), within = i - y * row;
      const int x = kSingle ? within : by_pixel.quotient(within);
      const Readers rows = readers_of(band.first + y, dy, bands.height);
      const Readers columns = readers_of(x, dx, width);
      const T* element = from + (within - x * step);
      compute_t<T> sum = 0;
      for (int64_t r = rows.first; r <= rows.last; ++r) {
        for (int64_t c = columns.first; c <= columns.last; ++c) {
          sum += load(element + r * strides.row + c * step);
        }
      }
      store(to + i, sum);
    }
  }
}

template <class T, int kPer>
cudaError_t run(const void* images, const Strides& strides, const int64_t* shifts, void* out,
                const Bands& bands, int64_t planes, int64_t pixel, int64_t pad,
                cudaStream_t stream) {
  return launch(stream, blocks_for(bands.count, 1), random_shift_kernel<T, kPer>,
                static_cast<const T*>(images), strides, shifts, static_cast<T*>(out), bands, planes,
                static_cast<int>(pixel), pad, Divider(bands.row), Divider(pixel));
}

}  // namespace

cudaError_t launch_random_shift(int64_t element_size, const void* images, const int64_t* shifts,
                                void* out, int64_t batch, int64_t planes, int64_t height,
                                int64_t width, int64_t pixel, int64_t image_stride,
                                int64_t plane_stride, int64_t row_stride, int64_t pad,
                                cudaStream_t stream) {
  if (width > kLongestRow / pixel) return cudaErrorInvalidValue;
  const Bands bands(batch * planes, height, width * pixel);
  const Strides strides{image_stride, plane_stride, row_stride};
  if (element_size == 1 && pixel == 1 && in_fours<uint8_t>(out, bands, row_stride)) {
    return launch(stream, blocks_for(bands.count, 1), random_shift_bytes_kernel,
                  static_cast<const uint8_t*>(images), strides, shifts, static_cast<uint8_t*>(out),
                  bands, Divider(planes), pad, Divider(width / 4));
  }
  const auto run_type = [&](auto type) {
    using T = typename decltype(type)::type;
    const auto start = bands.in_packs_at<T>(out) ? run<T, Pack<T>::kWidth> : run<T, 1>;
    return start(images, strides, shifts, out, bands, planes, pixel, pad, stream);
  };
  switch (element_size) {
    case 1:
      return run_type(Type<uint8_t>{});
    case 2:
      return run_type(Type<uint16_t>{});
    case 4:
      return run_type(Type<uint32_t>{});
    case 8:
      return run_type(Type<uint64_t>{});
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_random_shift_backward(Dtype dtype, const void* grad, const int64_t* shifts,
                                         void* out, int64_t batch, int64_t planes, int64_t height,
                                         int64_t width, int64_t pixel, int64_t image_stride,
                                         int64_t plane_stride, int64_t row_stride, int64_t pad,
                                         cudaStream_t stream) {
  if (width > kLongestRow / pixel) return cudaErrorInvalidValue;
  const Bands bands(batch * planes, height, width * pixel);
  const Strides strides{image_stride, plane_stride, row_stride};
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel =
        pixel == 1 ? random_shift_backward_kernel<T, true> : random_shift_backward_kernel<T, false>;
    return launch(stream, blocks_for(bands.count, 1), kernel, static_cast<const T*>(grad), strides,
                  shifts, static_cast<T*>(out), bands, planes, static_cast<int>(pixel), pad,
                  Divider(bands.row), Divider(pixel));
  });
}

}  // namespace crpt::cuda
