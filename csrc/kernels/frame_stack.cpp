#include "kernels/frame_stack.h"

#include "kernels/convert.h"
#include "kernels/parallel.h"
#include "kernels/shift.h"

namespace crpt::CRPT_ISA {
namespace {

// 1/255 in two parts. The first has 9 bits, so that its product with a pixel is exact and the sum
// is rounded once: the correctly rounded pixel / 255 without a division.
constexpr float kHigh = 0x1.01p-8f;
constexpr float kLow = static_cast<float>(1.0 / 255.0 - 0x1.01p-8);

inline void cast(uint8_t pixel, uint8_t* out) { *out = pixel; }
inline void cast(uint8_t pixel, double* out) { *out = pixel / 255.0; }
template <typename T>
inline void cast(uint8_t pixel, T* out) {
  const float x = pixel;
  narrow(x * kHigh + x * kLow, out);
}

template <typename T>
inline void cast_row(const uint8_t* in, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) cast(in[i], &out[i]);
}
inline void cast_row(const uint8_t* in, uint8_t* out, int64_t n) {
  memcpy(out, in, static_cast<size_t>(n));
}

template <typename T>
inline void repeat(uint8_t pixel, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) cast(pixel, &out[i]);
}

// One frame's plane, shifted and cast. `row_buffer` holds W pixels of a row that is not contiguous.
template <typename T>
void stack_plane(const FrameStackArgs& args, const uint8_t* in, T* out, int64_t dy, int64_t dx,
                 uint8_t* row_buffer) {
  const int64_t H = args.height, W = args.width;
  if (dy == 0 && dx == 0 && args.stride_w == 1 && args.stride_h == W) {
    cast_row(in, out, H * W);
    return;
  }
  const Segments columns(W, dx);
  for (int64_t y = 0; y < H; ++y) {
    const uint8_t* row = in + clamp(y + dy, 0, H - 1) * args.stride_h;
    if (args.stride_w != 1) {
      for (int64_t x = 0; x < W; ++x) row_buffer[x] = row[x * args.stride_w];
      row = row_buffer;
    }
    T* to = out + y * W;
    repeat(row[0], to, columns.left);
    if (columns.right > columns.left) {
      cast_row(row + columns.left + dx, to + columns.left, columns.right - columns.left);
    }
    repeat(row[W - 1], to + columns.right, W - columns.right);
  }
}

template <typename T>
void typed(const FrameStackArgs& args) {
  const int64_t plane = args.height * args.width, frames = args.batch * args.stack;
  const int team = team_size(args.threads, frames * args.channels * plane);
  const Scratch<uint8_t> scratch(team * args.width);
  parallel_for(team, team, [&](int64_t worker) {
    uint8_t* row_buffer = scratch.get() + worker * args.width;
    for (int64_t i = worker * frames / team; i < (worker + 1) * frames / team; ++i) {
      const int64_t b = i / args.stack;
      const int64_t dy = args.shifts ? args.shifts[2 * b] : 0,
                    dx = args.shifts ? args.shifts[2 * b + 1] : 0;
      const uint8_t* frame = args.frames + args.index[i] * args.stride_n;
      T* out = static_cast<T*>(args.out) + i * args.channels * plane;
      for (int64_t c = 0; c < args.channels; ++c) {
        stack_plane(args, frame + c * args.stride_c, out + c * plane, dy, dx, row_buffer);
      }
    }
  });
}

}  // namespace

BadValue frame_stack(const FrameStackArgs& args) {
  BadValue bad = check_range("index", args.index, args.batch * args.stack, 0, args.frame_count - 1);
  if (bad.argument == nullptr && args.shifts != nullptr) {
    bad = check_range("shifts", args.shifts, 2 * args.batch, -args.pad, args.pad);
  }
  if (bad.argument != nullptr) return bad;
  if (args.out_bytes == 1) {
    typed<uint8_t>(args);
  } else {
    with_type(args.dtype, [&]<typename T>(T) { typed<T>(args); });
  }
  return {};
}

}  // namespace crpt::CRPT_ISA
