#include "kernels/frame_stack.h"

#include "kernels/checked_values.h"
#include "kernels/convert.h"
#include "kernels/parallel.h"
#include "kernels/shift.h"

namespace crpt::CRPT_ISA {
namespace {

// 1/255 in two parts. The first has 9 bits, so that its product with a pixel is exact and the sum
// is rounded once: the correctly rounded pixel / 255 without a division.
constexpr float kHigh = 0x1.01p-8f;
constexpr float kLow = static_cast<float>(1.0 / 255.0 - 0x1.01p-8);

inline void cast(uint8_t pixel, double* out) { *out = pixel / 255.0; }
template <typename T>
inline void cast(uint8_t pixel, T* out) {
  const float x = pixel;
  narrow(x * kHigh + x * kLow, out);
}

// As narrow does, for what is neither NaN nor negative: two thirds of the work.
inline void cast(uint8_t pixel, BFloat16* out) {
  const float x = pixel;
  const uint32_t bits = to_bits(x * kHigh + x * kLow);
  out->bits = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

template <typename T>
inline void cast_row(const uint8_t* in, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) cast(in[i], &out[i]);
}

constexpr int64_t kCastBytes = 4 << 10;  // cast at once: a stage of the result

// n pixels cast, by way of `stage` (kCastBytes) and past the caches where that is wanted.
template <typename T>
inline void write_pixels(const uint8_t* in, T* out, int64_t n, bool streamed, char* stage) {
  if constexpr (sizeof(T) == 1) {
    const char* from = reinterpret_cast<const char*>(in);
    char* to = reinterpret_cast<char*>(out);
    streamed ? stream_bytes(from, to, n) : copy_bytes(from, to, n);
  } else if (!streamed) {
    cast_row(in, out, n);
  } else {
    constexpr int64_t step = kCastBytes / static_cast<int64_t>(sizeof(T));
    // The first step ends at the end of a line, and so do all others but the last.
    int64_t size =
        step - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kLine / sizeof(T));
    for (int64_t i = 0; i < n; i += size, size = step) {
      if (size > n - i) size = n - i;
      T* cast = reinterpret_cast<T*>(stage);
      cast_row(in + i, cast, size);
      stream_bytes(stage, reinterpret_cast<char*>(out + i), size * static_cast<int64_t>(sizeof(T)));
    }
  }
}

// One frame's plane, shifted and cast. `stage` holds RowShift's rows, then kCastBytes, then as many
// rows again.
template <typename T>
void stack_plane(const FrameStackArgs& args, const RowShift& plane, const uint8_t* in, T* out,
                 int64_t dy, int64_t dx, bool streamed, char* stage) {
  const int64_t H = plane.height, W = plane.width;
  char* cast_stage = stage + plane.stage_bytes();
  if (dy == 0 && dx == 0 && args.stride_w == 1 && args.stride_h == W) {
    write_pixels(in, out, H * W, streamed, cast_stage);
    return;
  }
  char* gathered = cast_stage + kCastBytes;
  const char* rows = reinterpret_cast<const char*>(in);
  for (int64_t y = 0; y < H; y += plane.rows) {
    const int64_t end = y + plane.rows < H ? y + plane.rows : H;
    stage_strided_rows(plane, rows, args.stride_h, args.stride_w, y, end, dy, dx, stage, gathered);
    write_pixels(reinterpret_cast<const uint8_t*>(stage), out + y * W, (end - y) * W, streamed,
                 cast_stage);
  }
}

template <typename T>
void typed(const FrameStackArgs& args) {
  const int64_t pixels = args.height * args.width, frames = args.batch * args.stack;
  const int64_t count = frames * args.channels * pixels;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  const bool streamed = (bytes > args.whole_bytes ? bytes : args.whole_bytes) >= kStreamedBytes;
  const int team = team_size(args.threads, count);
  const RowShift plane(args.height, args.width, 1);
  const int64_t stage_bytes = plane.stage_bytes() + kCastBytes + plane.stage_bytes();
  const Scratch<char> stages(team * stage_bytes);
  parallel_for(team, team, [&](int64_t worker) {
    char* stage = stages.get() + worker * stage_bytes;
    for (int64_t i = worker * frames / team; i < (worker + 1) * frames / team; ++i) {
      const int64_t b = i / args.stack;
      const int64_t dy = args.shifts ? args.shifts[2 * b] : 0,
                    dx = args.shifts ? args.shifts[2 * b + 1] : 0;
      const uint8_t* frame = args.frames + args.index[i] * args.stride_n;
      T* out = static_cast<T*>(args.out) + i * args.channels * pixels;
      for (int64_t c = 0; c < args.channels; ++c) {
        stack_plane(args, plane, frame + c * args.stride_c, out + c * pixels, dy, dx, streamed,
                    stage);
      }
    }
    if (streamed) end_streaming();
  });
}

}  // namespace

BadValue frame_stack(const FrameStackArgs& given) {
  const CheckedValues index("index", given.index, given.batch * given.stack, 0,
                            given.frame_count - 1);
  if (index.bad().argument != nullptr) return index.bad();
  const CheckedValues shifts("shifts", given.shifts, 2 * given.batch, -given.pad, given.pad);
  if (shifts.bad().argument != nullptr) return shifts.bad();
  FrameStackArgs args = given;
  args.index = index.get();
  args.shifts = shifts.get();
  if (args.out_bytes == 1) {
    typed<uint8_t>(args);
  } else {
    with_type(args.dtype, [&]<typename T>(T) { typed<T>(args); });
  }
  return {};
}

}  // namespace crpt::CRPT_ISA
