#include "emulation.h"

#include <cuda_runtime.h>
#include <ucontext.h>

#include <array>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace crpt::emulation {
namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr unsigned kWarpSize = 32;

// Tells AddressSanitizer that the stack changes; nothing without it.
class StackSwitch {
 public:
  static void leave([[maybe_unused]] void** own, [[maybe_unused]] const void* bottom,
                    [[maybe_unused]] std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(own, bottom, size);
#endif
  }
  static void arrive([[maybe_unused]] void* own, [[maybe_unused]] const void** bottom,
                     [[maybe_unused]] std::size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, bottom, size);
#endif
  }
};

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<std::byte[]> stack{new std::byte[kStack]};
  void* sanitizer = nullptr;
  State state = State::kDone;
  unsigned mask = 0;
  Site site{};
  unsigned exchanges = 0;
  std::array<uint64_t, 2> handed{};  // two, since a lane may be one exchange ahead of its warp
};

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string place(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

class Device {
 public:
  cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
    const std::lock_guard lock(mutex_);
    ++launches_;
    const dim3 g = config.gridDim;
    const dim3 b = config.blockDim;
    if (g.x == 0 || g.x > 2147483647u || g.y != 1 || g.z != 1 || b.x == 0 || b.x > 1024 ||
        b.x % kWarpSize != 0 || b.y != 1 || b.z != 1) {
      return fail_with(cudaErrorInvalidConfiguration,
                       "grid or block has a size that is not emulated");
    }
    gridDim = g;
    if (block_limit_ != 0) gridDim.x = std::min(gridDim.x, block_limit_);
    blockDim = b;
    thread_ = &thread;
    while (fibers_.size() < b.x) fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned block : permutation(gridDim.x)) {
      blockIdx = {block, 0, 0};
      if (const cudaError_t error = run_block(b.x); error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // --- called by the running fiber ---

  void wait(State state, unsigned mask, Site site) {
    Fiber& fiber = *fibers_[current_];
    fiber.state = state;
    fiber.mask = mask;
    fiber.site = site;
    leave_fiber(&fiber.sanitizer, fiber);
    StackSwitch::arrive(fiber.sanitizer, &host_bottom_, &host_size_);
  }

  uint64_t exchange(unsigned mask, uint64_t bits, unsigned source, Site site) {
    const unsigned turn = hand_over(mask, bits, site);
    return fibers_[current_ / kWarpSize * kWarpSize + source]->handed[turn];
  }

  unsigned ballot(unsigned mask, bool vote, Site site) {
    const unsigned turn = hand_over(mask, vote, site);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      const Fiber& fiber = *fibers_[current_ / kWarpSize * kWarpSize + lane];
      if ((mask >> lane & 1u) && fiber.handed[turn]) votes |= 1u << lane;
    }
    return votes;
  }

  void enter() {
    StackSwitch::arrive(nullptr, &host_bottom_, &host_size_);
    try {
      (*thread_)();
    } catch (const std::exception& error) {
      if (failure_now_.empty()) failure_now_ = error.what();
    }
    Fiber& fiber = *fibers_[current_];
    fiber.state = State::kDone;
    leave_fiber(nullptr, fiber);
  }

  // --- for tests ---

  void set_order(Order order) {
    const std::lock_guard lock(mutex_);
    order_ = order;
    random_.seed(0);
  }
  void set_block_limit(unsigned blocks) {
    const std::lock_guard lock(mutex_);
    block_limit_ = blocks;
  }
  std::string last_failure() {
    const std::lock_guard lock(mutex_);
    return last_failure_;
  }
  long launches() {
    const std::lock_guard lock(mutex_);
    return launches_;
  }

 private:
  // One warp runs as far as it can before another does: threads that only barriers keep together
  // are as far apart as the barriers allow.
  cudaError_t run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t) start(t);
    while (true) {
      for (unsigned warp : permutation(threads / kWarpSize)) {
        do {
          for (unsigned lane : permutation(kWarpSize)) {
            const unsigned t = warp * kWarpSize + lane;
            if (fibers_[t]->state == State::kReady) resume(t);
            if (!failure_now_.empty()) {
              return fail_with(cudaErrorAssert, std::exchange(failure_now_, ""));
            }
          }
        } while (release_warp(warp * kWarpSize));
      }
      if (count(threads, State::kDone) == threads) return cudaSuccess;
      if (!release_block(threads)) return fail_with(cudaErrorLaunchFailure, stuck(threads));
    }
  }

  void start(unsigned t) {
    Fiber& fiber = *fibers_[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Device::entry, 0);
    fiber.sanitizer = nullptr;
    fiber.exchanges = 0;
    fiber.state = State::kReady;
  }

  void resume(unsigned t) {
    Fiber& fiber = *fibers_[t];
    current_ = t;
    threadIdx = {t, 0, 0};
    void* own = nullptr;
    StackSwitch::leave(&own, fiber.stack.get(), kStack);
    swapcontext(&host_, &fiber.context);
    StackSwitch::arrive(own, nullptr, nullptr);
  }

  void leave_fiber(void** own, Fiber& fiber) {
    StackSwitch::leave(own, host_bottom_, host_size_);
    swapcontext(&fiber.context, &host_);
  }

  unsigned hand_over(unsigned mask, uint64_t bits, Site site) {
    Fiber& fiber = *fibers_[current_];
    const unsigned turn = fiber.exchanges++ % 2;
    fiber.handed[turn] = bits;
    wait(State::kAtWarp, mask, site);
    return turn;
  }

  unsigned count(unsigned threads, State state) const {
    unsigned found = 0;
    for (unsigned t = 0; t < threads; ++t) found += fibers_[t]->state == state;
    return found;
  }

  // Lanes go on when all of their mask wait at one place with that mask.
  bool release_warp(unsigned base) {
    bool released = false;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      const Fiber& first = *fibers_[base + lane];
      if (first.state != State::kAtWarp) continue;
      bool complete = (first.mask >> lane & 1u) != 0;
      for (unsigned other = 0; other < kWarpSize && complete; ++other) {
        const Fiber& fiber = *fibers_[base + other];
        if (first.mask >> other & 1u) {
          complete = fiber.state == State::kAtWarp && fiber.mask == first.mask &&
                     same_place(fiber.site, first.site);
        }
      }
      if (!complete) continue;
      const unsigned mask = first.mask;
      for (unsigned other = 0; other < kWarpSize; ++other) {
        if (mask >> other & 1u) fibers_[base + other]->state = State::kReady;
      }
      released = true;
    }
    return released;
  }

  // A block goes on when every thread, none of them returned, waits at one and the same barrier.
  bool release_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t) {
      const Fiber& fiber = *fibers_[t];
      if (fiber.state != State::kAtBlock || !same_place(fiber.site, fibers_[0]->site)) return false;
    }
    for (unsigned t = 0; t < threads; ++t) fibers_[t]->state = State::kReady;
    return true;
  }

  std::string stuck(unsigned threads) const {
    std::string text = "diverged at a barrier: ";
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers_[t]->state == State::kDone) continue;
      text += "thread " + std::to_string(t) + " waits at " + place(fibers_[t]->site) + ", ";
      break;
    }
    return text + std::to_string(count(threads, State::kDone)) + " of " + std::to_string(threads) +
           " threads returned";
  }

  std::vector<unsigned> permutation(unsigned size) {
    std::vector<unsigned> order(size);
    std::iota(order.begin(), order.end(), 0u);
    if (order_ == Order::kDescending) std::reverse(order.begin(), order.end());
    if (order_ == Order::kShuffled) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  cudaError_t fail_with(cudaError_t error, std::string text) {
    last_failure_ = std::move(text);
    return error;
  }

  static void entry();

  std::mutex mutex_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t host_{};
  const void* host_bottom_ = nullptr;
  std::size_t host_size_ = 0;
  const std::function<void()>* thread_ = nullptr;
  unsigned current_ = 0;
  unsigned block_limit_ = 0;
  std::string failure_now_, last_failure_;
  long launches_ = 0;
  Order order_ = Order::kAscending;
  std::mt19937 random_{0};
};

Device& device() {
  static Device instance;
  return instance;
}

void Device::entry() { device().enter(); }

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  return device().run(config, thread);
}
void sync_block(Site site) { device().wait(State::kAtBlock, 0, site); }
void sync_warp(unsigned mask, Site site) { device().wait(State::kAtWarp, mask, site); }
uint64_t exchange(unsigned mask, uint64_t bits, unsigned source, Site site) {
  return device().exchange(mask, bits, source, site);
}
unsigned ballot(unsigned mask, bool vote, Site site) { return device().ballot(mask, vote, site); }
[[noreturn]] void fail(const char* reason) { throw std::runtime_error(reason); }

void set_order(Order order) { device().set_order(order); }
void set_block_limit(unsigned blocks) { device().set_block_limit(blocks); }
std::string last_failure() { return device().last_failure(); }
long launch_count() { return device().launches(); }

}  // namespace crpt::emulation
