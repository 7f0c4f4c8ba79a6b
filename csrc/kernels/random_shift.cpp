#include "kernels/random_shift.h"

#include "kernels/checked_values.h"
#include "kernels/convert.h"
#include "kernels/parallel.h"
#include "kernels/shift.h"

namespace crpt::CRPT_ISA {
namespace {

// Planes [first, last), a stage at a time.
void shift_planes(const RandomShiftArgs& args, const RowShift& plane, int64_t first, int64_t last,
                  bool streamed, char* stage) {
  const int64_t plane_bytes = plane.height * plane.row_bytes;
  for (int64_t i = first; i < last; ++i) {
    const int64_t* shift = args.shifts + 2 * (i / args.planes);
    const char* in = static_cast<const char*>(args.images) + i * plane_bytes;
    char* out = static_cast<char*>(args.out) + i * plane_bytes;
    for (int64_t y = 0; y < plane.height; y += plane.rows) {
      const int64_t end = y + plane.rows < plane.height ? y + plane.rows : plane.height;
      stage_rows(plane, in, plane.row_bytes, y, end, shift[0], shift[1], stage);
      const int64_t bytes = (end - y) * plane.row_bytes;
      char* to = out + y * plane.row_bytes;
      streamed ? stream_bytes(stage, to, bytes) : copy_bytes(stage, to, bytes);
    }
  }
  if (streamed) end_streaming();
}

// Adds the gradients of out[x] to in[clamp(x + dx)], over one row.
template <typename A>
inline void fold_row(const A* grad, A* sum, int64_t W, int64_t dx, const Segments& columns) {
  for (int64_t x = 0; x < columns.left; ++x) sum[0] += grad[x];
#pragma omp simd
  for (int64_t x = columns.left; x < columns.right; ++x) sum[x + dx] += grad[x];
  for (int64_t x = columns.right; x < W; ++x) sum[W - 1] += grad[x];
}

template <typename T, typename A>
inline void write_row(const A* sum, T* out, int64_t W) {
#pragma omp simd
  for (int64_t x = 0; x < W; ++x) narrow(sum[x], &out[x]);
}

template <typename T>
void backward(const RandomShiftBackwardArgs& args) {
  using A = Compute<T>;
  const int64_t H = args.height, W = args.width, count = args.batch * args.planes;
  const int team = team_size(args.threads, count * H * W);
  const Scratch<A> scratch(team * 2 * W);
  parallel_for(team, team, [&](int64_t worker) {
    A* sum = scratch.get() + worker * 2 * W;
    A* converted = sum + W;
    for (int64_t plane = worker * count / team; plane < (worker + 1) * count / team; ++plane) {
      const T* grad = static_cast<const T*>(args.grad) + plane * H * W;
      T* grad_image = static_cast<T*>(args.grad_images) + plane * H * W;
      const int64_t b = plane / args.planes;
      const int64_t dy = args.shifts[2 * b], dx = args.shifts[2 * b + 1];
      const Segments columns(W, dx);
      // Row y of the image was read by the rows [first, last) of the output.
      for (int64_t y = 0; y < H; ++y) {
        const int64_t first = y == 0 ? 0 : clamp(y - dy, 0, H);
        const int64_t last = y == H - 1 ? H : clamp(y - dy + 1, 0, H);
        for (int64_t x = 0; x < W; ++x) sum[x] = 0;
        for (int64_t row = first; row < last; ++row) {
          fold_row(load_row(grad + row * W, W, converted), sum, W, dx, columns);
        }
        write_row(sum, grad_image + y * W, W);
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
  const Scratch<char> stages(team * plane.stage_bytes());
  parallel_for(team, team, [&](int64_t worker) {
    shift_planes(args, plane, worker * count / team, (worker + 1) * count / team,
                 bytes >= kStreamedBytes, stages.get() + worker * plane.stage_bytes());
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
