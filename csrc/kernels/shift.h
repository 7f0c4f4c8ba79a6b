// What random_shift and frame_stack share: out[x] = in[clamp(x + d, 0, n - 1)] is one value
// repeated, a run copied, or both; and whole rows of that.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/stream.h"

namespace crpt::CRPT_ISA {
namespace {

inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// out[0, left) = in[0]; out[left, right) = in[left + d, right + d); out[right, n) = in[n - 1].
struct Segments {
  int64_t left, right;
  Segments(int64_t n, int64_t d) : left(clamp(-d, 0, n)), right(clamp(n - d, left, n)) {}
};

// Rows are put together in a stage of about this many bytes, a part of the first-level cache.
constexpr int64_t kStageBytes = 4096;
// Beyond its last row a stage has room for a vector that overshoots.
constexpr int64_t kStageSlack = 64;

// How the rows of one plane are shifted and staged.
struct RowShift {
  int64_t height, width, pixel_bytes;
  int64_t row_bytes, rows;  // of a stage
  RowShift(int64_t height, int64_t width, int64_t pixel_bytes)
      : height(height),
        width(width),
        pixel_bytes(pixel_bytes),
        row_bytes(width * pixel_bytes),
        rows(clamp(kStageBytes / row_bytes, 1, height)) {}
  int64_t stage_bytes() const {
    return (rows * row_bytes + kStageSlack + kLine - 1) / kLine * kLine;
  }
};

// Rows this far ahead are asked for while one is copied: between two planes, and while stages are
// written, the hardware does not look ahead by itself.
constexpr int64_t kAhead = 4 << 10;

// Eight bytes of the pixel over and over; for pixels of 1, 2, 4 or 8 bytes.
template <typename Pixel>
inline uint64_t repeated(const char* pixel) {
  Pixel value;
  memcpy(&value, pixel, sizeof(Pixel));
  return value * (~uint64_t{0} / static_cast<Pixel>(~Pixel{0}));
}

// n pixels, all the same; may write up to 7 bytes beyond them.
struct AnyPixel {};
template <typename Pixel>
inline void repeat(const char* pixel, char* out, int64_t n, int64_t bytes) {
  if constexpr (__is_same(Pixel, AnyPixel)) {
    for (int64_t i = 0; i < n; ++i) memcpy(out + i * bytes, pixel, static_cast<size_t>(bytes));
  } else {
    const uint64_t word = repeated<Pixel>(pixel);
    for (int64_t i = 0; i < n * bytes; i += 8) memcpy(out + i, &word, 8);
  }
}

// stage[y - begin] = row y of the shifted plane, for y in [begin, end). Row by row upwards, so that
// what overshoots one row is overwritten by the next.
template <typename Pixel>
inline void stage_pixels(const RowShift& plane, const char* in, int64_t stride_h, int64_t begin,
                         int64_t end, int64_t dy, int64_t dx, char* stage) {
  const int64_t bytes = __is_same(Pixel, AnyPixel) ? plane.pixel_bytes : sizeof(Pixel);
  const int64_t row_bytes = plane.row_bytes;
  const Segments columns(plane.width, dx);
  const int64_t right = plane.width - columns.right;
  const int64_t left_bytes = columns.left * bytes, right_at = columns.right * bytes;
  for (int64_t y = begin; y < end; ++y) {
    const char* from = in + clamp(y + dy, 0, plane.height - 1) * stride_h;
    char* to = stage + (y - begin) * row_bytes;
    for (int64_t i = 0; i < row_bytes; i += kLine) __builtin_prefetch(from + kAhead + i);
    if (left_bytes > 0) repeat<Pixel>(from, to, columns.left, bytes);
    copy_bytes(from + left_bytes + dx * bytes, to + left_bytes, right_at - left_bytes);
    if (right > 0) repeat<Pixel>(from + row_bytes - bytes, to + right_at, right, bytes);
  }
}

inline void stage_rows(const RowShift& plane, const char* in, int64_t stride_h, int64_t begin,
                       int64_t end, int64_t dy, int64_t dx, char* stage) {
  switch (plane.pixel_bytes) {
    case 1:
      return stage_pixels<uint8_t>(plane, in, stride_h, begin, end, dy, dx, stage);
    case 2:
      return stage_pixels<uint16_t>(plane, in, stride_h, begin, end, dy, dx, stage);
    case 4:
      return stage_pixels<uint32_t>(plane, in, stride_h, begin, end, dy, dx, stage);
    case 8:
      return stage_pixels<uint64_t>(plane, in, stride_h, begin, end, dy, dx, stage);
    default:
      return stage_pixels<AnyPixel>(plane, in, stride_h, begin, end, dy, dx, stage);
  }
}

// n pixels that lie `stride` bytes apart, side by side.
template <typename Pixel>
inline void gather_pixels(const char* row, int64_t stride, int64_t n, int64_t bytes, char* out) {
  const int64_t size = __is_same(Pixel, AnyPixel) ? bytes : sizeof(Pixel);
  for (int64_t x = 0; x < n; ++x) {
    memcpy(out + x * size, row + x * stride, static_cast<size_t>(size));
  }
}

inline void gather_row(const RowShift& plane, const char* row, int64_t stride, char* out) {
  switch (plane.pixel_bytes) {
    case 1:
      return gather_pixels<uint8_t>(row, stride, plane.width, 1, out);
    case 2:
      return gather_pixels<uint16_t>(row, stride, plane.width, 2, out);
    case 4:
      return gather_pixels<uint32_t>(row, stride, plane.width, 4, out);
    case 8:
      return gather_pixels<uint64_t>(row, stride, plane.width, 8, out);
    default:
      return gather_pixels<AnyPixel>(row, stride, plane.width, plane.pixel_bytes, out);
  }
}

// The same of a plane whose pixels may lie apart too; `gathered` has the size of a stage.
inline void stage_strided_rows(const RowShift& plane, const char* in, int64_t stride_h,
                               int64_t stride_w, int64_t begin, int64_t end, int64_t dy, int64_t dx,
                               char* stage, char* gathered) {
  if (stride_w != plane.pixel_bytes) {
    for (int64_t y = begin; y < end; ++y) {
      const char* row = in + clamp(y + dy, 0, plane.height - 1) * stride_h;
      gather_row(plane, row, stride_w, gathered + (y - begin) * plane.row_bytes);
    }
    // Now they are the first rows of a plane, each in its place.
    in = gathered;
    stride_h = plane.row_bytes;
    end -= begin;
    begin = dy = 0;
  }
  stage_rows(plane, in, stride_h, begin, end, dy, dx, stage);
}

}  // namespace
}  // namespace crpt::CRPT_ISA
