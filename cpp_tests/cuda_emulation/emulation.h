// What tests ask of the emulated device.
#pragma once

#include <string>

namespace crpt::emulation {

// In which order blocks, and between two barriers their threads, run. A kernel without races gives the same
// bits in every order.
enum class Order { kAscending, kDescending, kShuffled };
void set_order(Order order);

// Why the last kernel that failed did so, and how many kernels were started so far.
std::string last_failure();
long launch_count();

}  // namespace crpt::emulation
