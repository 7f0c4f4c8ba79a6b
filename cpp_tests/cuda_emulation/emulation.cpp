// A jump from one fiber to another is what a fortified longjmp would refuse.
#undef _FORTIFY_SOURCE

#include "emulation.h"

#include <cuda_runtime.h>

#include <cassert>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace crpt::emulation {
namespace {

class Device {
 public:
  Device() { host_.entered = true; }

  cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                  const std::function<void()>& thread) {
    const std::lock_guard lock(mutex_);
    ++launches_;
    const dim3 g = config.gridDim;
    const dim3 b = config.blockDim;
    if (g.x == 0 || g.x > 2147483647u || g.y != 1 || g.z != 1 || b.x == 0 || b.x > 1024 ||
        b.x % kWarpSize != 0 || b.y != 1 || b.z != 1) {
      return fail_with(cudaErrorInvalidConfiguration,
                       "grid or block has a size that is not emulated");
    }
    cluster_ = 1;
    bool cooperative = false;
    for (unsigned i = 0; i < config.numAttrs; ++i) {
      const cudaLaunchAttribute& attribute = config.attrs[i];
      if (attribute.id == cudaLaunchAttributeClusterDimension)
        cluster_ = attribute.val.clusterDim.x;
      if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative;
    }
    const cudaError_t refused = check_shape(config, kernel, cooperative);
    if (refused != cudaSuccess) return refused;
    gridDim = g;
    if (block_limit_ != 0) {
      gridDim.x = std::min(gridDim.x, std::max(cluster_, block_limit_ / cluster_ * cluster_));
    }
    blockDim = b;
    thread_ = &thread;
    const unsigned together = cooperative ? gridDim.x : cluster_;
    while (fibers_.size() < together * b.x) fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned group : permutation(gridDim.x / together)) {
      const cudaError_t error = run_group(group * together, together, config.dynamicSmemBytes);
      if (error != cudaSuccess) return error;
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

  std::byte* shared_memory() { return shared_[current_ / blockDim.x].get(); }

  unsigned cluster_size() const { return cluster_; }

  void* of_block(void* address, unsigned rank) {
    const std::size_t own = current_ / blockDim.x;
    const std::size_t other = own / cluster_ * cluster_ + rank;
    const std::ptrdiff_t offset = static_cast<std::byte*>(address) - shared_[own].get();
    if (rank >= cluster_ || offset < 0 || static_cast<std::size_t>(offset) >= shared_[own].size()) {
      crpt::emulation::fail("only dynamic shared memory of the cluster can be mapped");
    }
    if (fibers_[other * blockDim.x]->state == State::kDone) {
      crpt::emulation::fail("shared memory of a block that has returned");
    }
    return shared_[other].get() + offset;
  }

  // --- for tests ---

  void set_order(Order order) {
    const std::lock_guard lock(mutex_);
    order_ = order;
    random_.seed(0);
  }
  void set_properties(const Properties& properties) {
    const std::lock_guard lock(mutex_);
    properties_ = properties;
    shared_allowed_.clear();  // another device
  }
  Properties properties() {
    const std::lock_guard lock(mutex_);
    return properties_;
  }
  // A device would take less, and then refuse another thread's launch that relied on more.
  cudaError_t allow_shared(const void* kernel, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    std::size_t& allowed = shared_allowed_[kernel];
    if (bytes < allowed) {
      return fail_with(cudaErrorInvalidValue, "less shared memory than the kernel was allowed");
    }
    allowed = bytes;
    return cudaSuccess;
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
  cudaError_t check_shape(const cudaLaunchConfig_t& config, const void* kernel, bool cooperative) {
    const auto allowed = shared_allowed_.find(kernel);
    if (config.dynamicSmemBytes >
        (allowed == shared_allowed_.end() ? 48u << 10 : allowed->second)) {
      return fail_with(cudaErrorInvalidValue, "more shared memory than the kernel was allowed");
    }
    if (cluster_ == 0 || config.gridDim.x % cluster_ != 0 || cluster_ > properties_.cluster ||
        (cooperative && cluster_ > 1)) {
      return fail_with(cudaErrorInvalidConfiguration, "a cluster that the device does not have");
    }
    if (cooperative && config.gridDim.x > properties_.processors * properties_.resident) {
      return fail_with(cudaErrorCooperativeLaunchTooLarge, "more blocks than run at once");
    }
    return cudaSuccess;
  }

  // The blocks of a cluster, or of a cooperative grid, meet at barriers of their own; every other
  // block is a group by itself.
  cudaError_t run_group(unsigned first, unsigned blocks, std::size_t shared) {
    shared_.clear();
    for (unsigned block = 0; block < blocks; ++block) shared_.emplace_back(shared);
    const unsigned threads = blocks * blockDim.x;
    for (unsigned t = 0; t < threads; ++t) start(t);
    while (true) {
      for (unsigned block : permutation(blocks)) {
        blockIdx = {first + block, 0, 0};
        const cudaError_t error = run_block(block * blockDim.x, blockDim.x);
        if (error != cudaSuccess) return error;
      }
      if (count(0, threads, State::kDone) == threads) {
        for (const auto& memory : shared_) {
          if (!memory.intact()) {
            return fail_with(cudaErrorLaunchFailure, "a write beyond the block's shared memory");
          }
        }
        return cudaSuccess;
      }
      if (!release(State::kAtGroup, 0, threads)) {
        return fail_with(cudaErrorLaunchFailure, stuck(0, threads));
      }
    }
  }

  // One warp runs as far as it can before another does: threads that only barriers keep together
  // are as far apart as the barriers allow. Ends when all threads have returned or wait for other
  // blocks.
  cudaError_t run_block(unsigned base, unsigned threads) {
    while (true) {
      for (unsigned warp : permutation(threads / kWarpSize)) {
        do {
          for (unsigned lane : permutation(kWarpSize)) {
            const unsigned t = base + warp * kWarpSize + lane;
            if (fibers_[t]->state == State::kReady) resume(t);
            if (!failure_now_.empty()) {
              return fail_with(cudaErrorAssert, std::exchange(failure_now_, ""));
            }
          }
        } while (release_warp(base + warp * kWarpSize));
      }
      if (count(base, threads, State::kDone) == threads) return cudaSuccess;
      if (count(base, threads, State::kAtGroup) == threads) return cudaSuccess;
      if (!release(State::kAtBlock, base, threads)) {
        return fail_with(cudaErrorLaunchFailure, stuck(base, threads));
      }
    }
  }

  void start(unsigned t) {
    Fiber& fiber = *fibers_[t];
    ucontext_t& context = fiber.continuation.context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Device::entry, 0);
    fiber.continuation.entered = false;
    fiber.sanitizer = nullptr;
    fiber.exchanges = 0;
    fiber.state = State::kReady;
  }

  void resume(unsigned t) {
    Fiber& fiber = *fibers_[t];
    current_ = t;
    threadIdx = {t % blockDim.x, 0, 0};
    void* own = nullptr;
    StackSwitch::leave(&own, fiber.stack.get(), kStack);
    switch_to(host_, fiber.continuation);
    StackSwitch::arrive(own, nullptr, nullptr);
  }

  void leave_fiber(void** own, Fiber& fiber) {
    StackSwitch::leave(own, host_bottom_, host_size_);
    switch_to(fiber.continuation, host_);
  }

  unsigned hand_over(unsigned mask, uint64_t bits, Site site) {
    Fiber& fiber = *fibers_[current_];
    const unsigned turn = fiber.exchanges++ % 2;
    fiber.handed[turn] = bits;
    wait(State::kAtWarp, mask, site);
    return turn;
  }

  unsigned count(unsigned base, unsigned threads, State state) const {
    unsigned found = 0;
    for (unsigned t = base; t < base + threads; ++t) found += fibers_[t]->state == state;
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

  // Threads go on when every one, none of them returned, waits at one and the same barrier.
  bool release(State barrier, unsigned base, unsigned threads) {
    for (unsigned t = base; t < base + threads; ++t) {
      const Fiber& fiber = *fibers_[t];
      if (fiber.state != barrier || !same_place(fiber.site, fibers_[base]->site)) return false;
    }
    for (unsigned t = base; t < base + threads; ++t) fibers_[t]->state = State::kReady;
    return true;
  }

  std::string stuck(unsigned base, unsigned threads) const {
    std::string text = "diverged at a barrier: ";
    for (unsigned t = base; t < base + threads; ++t) {
      if (fibers_[t]->state == State::kDone) continue;
      text += "thread " + std::to_string(t) + " waits at " + place(fibers_[t]->site) + ", ";
      break;
    }
    return text + std::to_string(count(base, threads, State::kDone)) + " of " +
           std::to_string(threads) + " threads returned";
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
  Continuation host_;
  const void* host_bottom_ = nullptr;
  std::size_t host_size_ = 0;
  const std::function<void()>* thread_ = nullptr;
  unsigned current_ = 0;
  unsigned block_limit_ = 0;
  unsigned cluster_ = 1;
  Properties properties_;
  std::vector<SharedMemory> shared_;  // of the blocks of the running group
  std::map<const void*, std::size_t> shared_allowed_;
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

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void()>& thread) {
  return device().run(config, kernel, thread);
}
cudaError_t allow_shared(const void* kernel, std::size_t bytes) {
  return device().allow_shared(kernel, bytes);
}
void sync_group(Site site) { device().wait(State::kAtGroup, 0, site); }
std::byte* shared_memory() { return device().shared_memory(); }
unsigned cluster_size() { return device().cluster_size(); }
void* of_block(void* address, unsigned rank) { return device().of_block(address, rank); }
void sync_block(Site site) { device().wait(State::kAtBlock, 0, site); }
void sync_warp(unsigned mask, Site site) { device().wait(State::kAtWarp, mask, site); }
uint64_t exchange(unsigned mask, uint64_t bits, unsigned source, Site site) {
  return device().exchange(mask, bits, source, site);
}
unsigned ballot(unsigned mask, bool vote, Site site) { return device().ballot(mask, vote, site); }
[[noreturn]] void fail(const char* reason) { throw std::runtime_error(reason); }

void set_order(Order order) { device().set_order(order); }
void set_properties(const Properties& properties) { device().set_properties(properties); }
Properties properties() { return device().properties(); }
void set_block_limit(unsigned blocks) { device().set_block_limit(blocks); }
std::string last_failure() { return device().last_failure(); }
long launch_count() { return device().launches(); }

}  // namespace crpt::emulation
