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

// n / divisor for 0 <= n < 2^31 by a multiplication (Hacker's Delight, 10-9).
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(static_cast<unsigned>(divisor)) {
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

  __device__ Band(const Bands& bands, int64_t i)
      : plane(i / bands.per_plane),
        first(i % bands.per_plane * bands.rows),
        rows(static_cast<int>(min(bands.rows, bands.height - first))) {}
};

// The bytes at x, x + 1, x + 2 and x + 3 of a row of `width` >= 4 bytes, where x may lie outside
// and what is outside repeats the edge. Reads the one or two aligned words that hold them, and so
// up to three bytes beside the row, but never a word without a byte of it.
__device__ inline unsigned shifted_four(const uint8_t* row, int x, int width) {
  const int first = max(min(x, width - 1), 0);
  const int last = max(min(x + 3, width - 1), 0);
  const uintptr_t from = reinterpret_cast<uintptr_t>(row + first);
  const uintptr_t to = reinterpret_cast<uintptr_t>(row + last);
  const unsigned low = *reinterpret_cast<const unsigned*>(from & ~uintptr_t{3});
  const unsigned high = *reinterpret_cast<const unsigned*>(to & ~uintptr_t{3});
  // Which byte after the first each of the four is, a nibble each: 0123 inside; before the row
  // zeros come first; at its end the last valid one repeats.
  const unsigned before = 0x3210u << 4 * min(max(-x, 0), 4) & 0xffffu;
  const int valid = width - 1 - first;
  const unsigned at_end =
      static_cast<unsigned>(0x3210221011100000u >> 16 * min(valid, 3)) & 0xffffu;
  const unsigned which = x < 0 ? before : at_end;
  return __byte_perm(low, high, which + static_cast<unsigned>(from & 3) * 0x1111u);
}

__device__ inline void store_byte(uint8_t* out, unsigned byte) {
  *out = static_cast<uint8_t>(byte);
}
// byte / 255 rounded once: a quotient and its correction are exact enough for all 256.
template <class T>
__device__ void store_byte(T* out, unsigned byte) {
  using A = compute_t<T>;
  const A x = static_cast<A>(byte);
  const A q = x * (A(1) / A(255));
  store(out, fma_of(fma_of(-q, A(255), x), A(1) / A(255), q));
}

// A band of a plane of bytes, shifted and stored as T, for rows of `width` % 4 == 0 bytes and bands
// that are packs: one thread makes one pack (or, of doubles, two) from words.
template <class T>
__device__ void shift_bytes(const uint8_t* __restrict__ plane, int64_t row_stride, const Band& band,
                            const Bands& bands, const Divider& by_words, int64_t dy, int64_t dx,
                            T* __restrict__ out) {
  constexpr int kWords = sizeof(T) < 4 ? 4 / static_cast<int>(sizeof(T)) : 1;
  constexpr int kPacks = 4 * kWords / Pack<T>::kWidth;
  const int width = static_cast<int>(bands.row);
  const int shift = static_cast<int>(max(min(dx, bands.row), -bands.row));
  const int words = band.rows * (width / 4);
#pragma unroll 2
  for (int word = static_cast<int>(threadIdx.x) * kWords; word < words; word += kThreads * kWords) {
    Pack<T> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int y = by_words.quotient(word + i);
      const int x = (word + i - y * (width / 4)) * 4;
      const uint8_t* row = plane + clamp_to(band.first + y + dy, bands.height) * row_stride;
      const unsigned bytes = shifted_four(row, x + shift, width);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = 4 * i + j;
        store_byte(packs[k / Pack<T>::kWidth].value + k % Pack<T>::kWidth, bytes >> 8 * j & 255u);
      }
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) pack_at(out + 4 * word + i * Pack<T>::kWidth) = packs[i];
  }
}

}  // namespace crpt::cuda
