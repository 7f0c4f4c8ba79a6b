// What tests ask of the emulated device.
#pragma once

#include <cstddef>
#include <string>

namespace crpt::emulation {

// In which order blocks, the warps of a block and the lanes of a warp run. A kernel without races
// gives the same bits in every order.
enum class Order { kAscending, kDescending, kShuffled };
void set_order(Order order);

// Launches get at most so many blocks, 0 being no limit: a kernel must stride over what its grid
// does not cover, as it does on a device when there is more work than a grid may have blocks.
void set_block_limit(unsigned blocks);

// What the emulated device can do: 1 for `cluster` is a device without clusters, and `ptx` is the
// architecture that the kernels were compiled for.
struct Properties {
  unsigned processors = 2;
  unsigned resident = 2;  // blocks of any kernel on one processor
  unsigned cluster = 16;  // blocks at most
  int ptx = 90;
  std::size_t shared = 227 << 10;  // bytes of a block at most
};
void set_properties(const Properties& properties);
Properties properties();

// Why the last kernel that failed did so, and how many kernels were started so far.
std::string last_failure();
long launch_count();

}  // namespace crpt::emulation
