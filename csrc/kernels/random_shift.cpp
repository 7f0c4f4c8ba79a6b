#include "kernels/random_shift.h"

#include "kernels/checked_values.h"
#include "kernels/convert.h"
#include "kernels/parallel.h"
#include "kernels/shift.h"

namespace crpt::CRPT_ISA {
namespace {

// Planes [first, last), a stage at a time. `stage` holds RowShift's rows twice.
void shift_planes(const RandomShiftArgs& args, const RowShift& plane, int64_t first, int64_t last,
                  bool streamed, char* stage) {
  const int64_t plane_bytes = plane.height * plane.row_bytes;
  for (int64_t i = first; i < last; ++i) {
    const int64_t b = i / args.planes, within = i - b * args.planes;
    const int64_t* shift = args.shifts + 2 * b;
    const char* in =
        static_cast<const char*>(args.images) + b * args.stride_b + within * args.stride_plane;
    char* out = static_cast<char*>(args.out) + i * plane_bytes;
    for (int64_t y = 0; y < plane.height; y += plane.rows) {
      const int64_t end = y + plane.rows < plane.height ? y + plane.rows : plane.height;
      stage_strided_rows(plane, in, args.stride_h, args.stride_w, y, end, shift[0], shift[1], stage,
                         stage + plane.stage_bytes());
      const int64_t bytes = (end - y) * plane.row_bytes;
      char* to = out + y * plane.row_bytes;
      streamed ? stream_bytes(stage, to, bytes) : copy_bytes(stage, to, bytes);
    }
  }
  if (streamed) end_streaming();
}

// sum += each of n pixels.
template <typename A>
inline void add_pixels(const A* pixels, int64_t n, int64_t pixel, A* sum) {
  if (pixel == 1) {
    for (int64_t x = 0; x < n; ++x) *sum += pixels[x];
    return;
  }
  for (int64_t x = 0; x < n; ++x) {
    for (int64_t c = 0; c < pixel; ++c) sum[c] += pixels[x * pixel + c];
  }
}

// Adds the gradients of out[x] to in[clamp(x + dx)], over one row.
template <typename A>
inline void fold_row(const A* grad, A* sum, int64_t W, int64_t pixel, int64_t dx,
                     const Segments& columns) {
  const int64_t moved = dx * pixel, left = columns.left * pixel, right = columns.right * pixel;
  add_pixels(grad, columns.left, pixel, sum);
#pragma omp simd
  for (int64_t i = left; i < right; ++i) sum[i + moved] += grad[i];
  add_pixels(grad + right, W - columns.right, pixel, sum + (W - 1) * pixel);
}

// n pixels that lie `stride` elements apart, side by side and in compute type: in place where they
// already are, else in `buffer`.
template <typename T, typename A>
inline const A* load_pixels(const T* in, int64_t stride, int64_t n, int64_t pixel, A* buffer) {
  if (stride == pixel) return load_row(in, n * pixel, buffer);
  for (int64_t x = 0; x < n; ++x) {
    for (int64_t c = 0; c < pixel; ++c) buffer[x * pixel + c] = widen(in[x * stride + c]);
  }
  return buffer;
}

template <typename T, typename A>
inline void write_row(const A* sum, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(sum[i], &out[i]);
}

template <typename T>
void backward(const RandomShiftBackwardArgs& args) {
  using A = Compute<T>;
  const int64_t H = args.height, W = args.width, pixel = args.pixel, row_size = W * pixel;
  const int64_t count = args.batch * args.planes;
  const int team = team_size(args.threads, count * H * row_size);
  const Scratch<A> scratch(team * 2 * row_size);
  parallel_for(team, team, [&](int64_t worker) {
    A* sum = scratch.get() + worker * 2 * row_size;
    A* converted = sum + row_size;
    for (int64_t plane = worker * count / team; plane < (worker + 1) * count / team; ++plane) {
      const int64_t b = plane / args.planes, within = plane - b * args.planes;
      const T* grad =
          static_cast<const T*>(args.grad) + b * args.stride_b + within * args.stride_plane;
      T* grad_image = static_cast<T*>(args.grad_images) + plane * H * row_size;
      const int64_t dy = args.shifts[2 * b], dx = args.shifts[2 * b + 1];
      const Segments columns(W, dx);
      // Row y of the image was read by the rows [first, last) of the output.
      for (int64_t y = 0; y < H; ++y) {
        const int64_t first = y == 0 ? 0 : clamp(y - dy, 0, H);
        const int64_t last = y == H - 1 ? H : clamp(y - dy + 1, 0, H);
        for (int64_t i = 0; i < row_size; ++i) sum[i] = 0;
        for (int64_t row = first; row < last; ++row) {
          const A* pixels =
              load_pixels(grad + row * args.stride_h, args.stride_w, W, pixel, converted);
          fold_row(pixels, sum, W, pixel, dx, columns);
        }
        write_row(sum, grad_image + y * row_size, row_size);
      }
    }
  });
}

}  // namespace

BadValue random_shift(const RandomShiftArgs& given) {
  const CheckedValues shifts("shifts", given.shifts, 2 * given.batch, -given.pad, given.pad);
  if (shifts.bad().argument != nullptr) return shifts.bad();
  RandomShiftArgs args = given;
  args.shifts = shifts.get();
  const int64_t count = args.batch * args.planes;
  const RowShift plane(args.height, args.width, args.pixel_bytes);
  const int64_t bytes = count * plane.height * plane.row_bytes;
  const int team = team_size(args.threads, bytes / 4);
  const Scratch<char> stages(team * 2 * plane.stage_bytes());
  parallel_for(team, team, [&](int64_t worker) {
    shift_planes(args, plane, worker * count / team, (worker + 1) * count / team,
                 bytes >= kStreamedBytes, stages.get() + worker * 2 * plane.stage_bytes());
  });
  return {};
}

BadValue random_shift_backward(const RandomShiftBackwardArgs& given) {
  const CheckedValues shifts("shifts", given.shifts, 2 * given.batch, -given.pad, given.pad);
  if (shifts.bad().argument != nullptr) return shifts.bad();
  RandomShiftBackwardArgs args = given;
  args.shifts = shifts.get();
  with_type(args.dtype, [&]<typename T>(T) { backward<T>(args); });
  return {};
}

}  // namespace crpt::CRPT_ISA
