// What tests ask of the emulated device.
#pragma once

#include <string>

namespace crpt::emulation {

// In which order blocks, the warps of a block and the lanes of a warp run. A kernel without races
// gives the same bits in every order.
enum class Order { kAscending, kDescending, kShuffled };
void set_order(Order order);

// Launches get at most so many blocks, 0 being no limit: a kernel must stride over what its grid
// does not cover, as it does on a device when there is more work than a grid may have blocks.
void set_block_limit(unsigned blocks);

// Why the last kernel that failed did so, and how many kernels were started so far.
std::string last_failure();
long launch_count();

}  // namespace crpt::emulation
