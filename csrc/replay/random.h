// Random numbers by counter: a function of (seed, row, draw), so that neither the number of threads
// nor what other rows needed changes them.
#pragma once

#include <cstdint>

namespace crpt::replay {

// The finaliser of SplitMix64: a bijection in which every bit of the input reaches every bit.
constexpr uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

constexpr uint64_t random_word(uint64_t seed, uint64_t row, uint64_t draw) {
  constexpr uint64_t golden = 0x9E3779B97F4A7C15u, other = 0xD1B54A32D192ED03u;
  return mix(mix(mix(seed + golden) + golden * (row + 1)) + other * (draw + 1));
}

// In [0, n), n >= 1. The bias is below n / 2^64.
constexpr uint64_t below(uint64_t word, uint64_t n) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((static_cast<Wide>(word) * n) >> 64);
}

}  // namespace crpt::replay
