// Where a shifted image reads: shared by random_shift and frame_stack.
#pragma once

#include "device.cuh"

namespace crpt::cuda {

__host__ __device__ constexpr int64_t clamp_to(int64_t i, int64_t size) {
  return i < 0 ? 0 : (i < size ? i : size - 1);
}

// shifts[2 * row] = dy, shifts[2 * row + 1] = dx; no shifts means 0.
__device__ inline int64_t shift_of(const int64_t* shifts, int64_t i, int64_t pad) {
  if (!shifts) return 0;
  const int64_t shift = shifts[i];
  assert(-pad <= shift && shift <= pad && "shifts should be in [-pad, pad]");
  return shift;
}

// n / divisor for 0 <= n < 2^31 by a multiplication (Hacker's Delight, 10-9). Of nothing, where no
// thread will ask, the divisor may be 0.
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(static_cast<unsigned>(divisor > 0 ? divisor : 1)) {
    while (uint64_t{1} << shift_ < divisor_) ++shift_;
    multiplier_ =
        static_cast<unsigned>(((((uint64_t{1} << shift_) - divisor_) << 32) / divisor_) + 1);
  }
  __device__ int quotient(int n) const {
    const unsigned u = static_cast<unsigned>(n);
    return static_cast<int>((__umulhi(u, multiplier_) + u) >> shift_);
  }
  __device__ int remainder(int n) const { return n - quotient(n) * static_cast<int>(divisor_); }

 private:
  unsigned divisor_, multiplier_, shift_ = 0;
};

constexpr int64_t kBandElements = 16384;           // of a block, and of a plane that is not cut
constexpr int64_t kLongestRow = int64_t{1} << 26;  // 16 rows and twice a row are less than 2^31

// Planes of height rows, cut into bands of some rows each, so that within a band 32 bits are enough
// for an index and a few large planes keep all multiprocessors busy. 16 rows are whole packs.
struct Bands {
  int64_t height, row;  // a row has so many elements
  int64_t rows, per_plane, count;

  Bands(int64_t planes, int64_t plane_height, int64_t elements)
      : height(plane_height), row(elements), rows(plane_height) {
    if (height > kBandElements / row) {
      const int64_t sixteens = kBandElements / (16 * row);
      rows = 16 * (sixteens > 1 ? sixteens : 1);
    }
    per_plane = ceil_div(height, rows);
    count = planes * per_plane;
  }
  // Whether every band of a result at `out` is made of packs.
  template <class T>
  bool in_packs_at(const void* out) const {
    return in_packs<T>(out, height * row);
  }
};

// One band: `rows` of them from `first` on, of plane `plane`.
struct Band {
  int64_t plane, first;
  int rows;

  __device__ Band(const Bands& bands, int64_t i) : plane(i), first(0) {
    if (bands.per_plane > 1) {  // a division of 64 bits takes as long as a row
      plane = i / bands.per_plane;
      first = (i - plane * bands.per_plane) * bands.rows;
    }
    rows = static_cast<int>(min(bands.rows, bands.height - first));
  }
};

// The bytes at x, x + 1, x + 2 and x + 3 of a row of `width` >= 4 bytes, where x may lie outside
// and what is outside repeats the edge: where the one or two aligned words are that hold them, in
// bytes from the row's first, and which of their bytes they are. Up to three bytes beside the row
// are read, but never a word without a byte of it.
struct ShiftedFour {
  int low, high;
  unsigned which;

  // `misaligned` is the row's address modulo 4.
  __device__ ShiftedFour(int misaligned, int x, int width) {
    const int first = max(min(x, width - 1), 0);
    const int last = max(min(x + 3, width - 1), 0);
    const int within = (misaligned + first) & 3;
    low = first - within;
    high = last - ((misaligned + last) & 3);
    // Which byte after the first each of the four is, a nibble each: 0123 inside; before the row
    // zeros come first; at its end the last valid one repeats.
    const unsigned before = 0x3210u << 4 * min(max(-x, 0), 4) & 0xffffu;
    const int valid = width - 1 - first;
    const unsigned at_end =
        static_cast<unsigned>(0x3210221011100000u >> 16 * min(valid, 3)) & 0xffffu;
    which = (x < 0 ? before : at_end) + static_cast<unsigned>(within) * 0x1111u;
  }
  // Of the row that begins at plane + row.
  __device__ unsigned operator()(const uint8_t* plane, int row) const {
    return __byte_perm(*reinterpret_cast<const unsigned*>(plane + (row + low)),
                       *reinterpret_cast<const unsigned*>(plane + (row + high)), which);
  }
};

// byte / 255 rounded once, for a byte as a number. For doubles and floats a quotient needs a
// correction; for narrower types the product with 1 / 255 in float32 rounds to the same for all 256
// bytes.
template <class T>
__device__ void store_quotient(T* out, compute_t<T> byte) {
  using A = compute_t<T>;
  A q = byte * (A(1) / A(255));
  if constexpr (sizeof(T) >= 4) q = fma_of(fma_of(-q, A(255), byte), A(1) / A(255), q);
  store(out, q);
}

__device__ inline void store_byte(uint8_t* out, unsigned byte) {
  *out = static_cast<uint8_t>(byte);
}
template <class T>
__device__ void store_byte(T* out, unsigned byte) {
  store_quotient(out, static_cast<compute_t<T>>(byte));
}

constexpr int kShiftBlocks = 5;  // of shift_bytes on a multiprocessor: enough reads on their way

// Four neighbours of a result: one store, or two of doubles.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) FourOf {
  T value[4];
};

// Four bytes as four pixels. A byte becomes a number as the last of the mantissa of 2^23: several
// times faster than a conversion.
__device__ inline void store_four(uint8_t* out, unsigned bytes) {
  *reinterpret_cast<unsigned*>(out) = bytes;
}
template <class T>
__device__ void store_four(T* out, unsigned bytes) {
  FourOf<T> some;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const unsigned bits = __byte_perm(bytes, 0x4b000000u, 0x7540u + static_cast<unsigned>(j));
    store_quotient(some.value + j, static_cast<compute_t<T>>(__uint_as_float(bits) - 8388608.0f));
  }
  *reinterpret_cast<FourOf<T>*>(out) = some;
}

// Whether shift_bytes can make this result from rows of bytes that lie so far apart.
template <class T>
bool in_fours(const void* out, const Bands& bands, int64_t row_stride) {
  const int64_t farthest = INT32_MAX / (bands.height + 1);  // in 32 bits, within a plane
  return bands.row % 4 == 0 && row_stride % 4 == 0 && -farthest <= row_stride &&
         row_stride <= farthest && bands.height <= kLongestRow && bands.count <= INT32_MAX &&
         reinterpret_cast<uintptr_t>(out) % alignof(FourOf<T>) == 0;
}

// A band of a plane of bytes, shifted and stored as T. A thread makes four neighbours of several
// rows, always in the same columns: where it reads is found once for all of them.
template <class T>
__device__ void shift_bytes(const uint8_t* plane, int64_t row_stride, const Band& band,
                            const Bands& bands, const Divider& by_fours, int64_t dy, int64_t dx,
                            T* out) {
  constexpr int kAhead = 8;  // rows that are read before the first is written
  const int width = static_cast<int>(bands.row), fours = width / 4;
  const int last = static_cast<int>(bands.height) - 1, stride = static_cast<int>(row_stride);
  const int shift = static_cast<int>(max(min(dx, bands.row), -bands.row));
  const int top = static_cast<int>(band.first + max(min(dy, bands.height), -bands.height));
  const int rows_at_once = max(kThreads / fours, 1);
  const int thread = static_cast<int>(threadIdx.x);
  const int begin = fours < kThreads ? by_fours.quotient(thread) : 0;
  if (begin >= rows_at_once) return;
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(plane) & 3);
  for (int four = thread - begin * fours; four < fours; four += kThreads) {
    const ShiftedFour read(misaligned, 4 * four + shift, width);
    for (int y = begin; y < band.rows; y += kAhead * rows_at_once) {
      unsigned bytes[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int from = max(min(top + y + i * rows_at_once, last), 0);
        bytes[i] = read(plane, from * stride);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int row = y + i * rows_at_once;
        if (row >= band.rows) break;
        store_four(out + (row * width + 4 * four), bytes[i]);
      }
    }
  }
}

}  // namespace crpt::cuda
