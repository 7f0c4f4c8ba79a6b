// A thread of the emulated device, and what it switches and writes to: emulation.cpp only.
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace crpt::emulation {

inline constexpr std::size_t kStack = 256 * 1024;
inline constexpr unsigned kWarpSize = 32;

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

// Where a fiber, or the host, goes on. After the first entry without sanitizers by setjmp, which
// unlike swapcontext makes no system call.
struct Continuation {
  ucontext_t context{};
  bool entered = false;
#if !defined(__SANITIZE_ADDRESS__)
  jmp_buf jump;
#endif
};

inline void switch_to([[maybe_unused]] Continuation& from, Continuation& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.context, &to.context);
#else
  if (_setjmp(from.jump) != 0) return;
  if (std::exchange(to.entered, true)) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

enum class State { kReady, kAtWarp, kAtBlock, kAtGroup, kDone };

struct Fiber {
  Continuation continuation;
  std::unique_ptr<std::byte[]> stack{new std::byte[kStack]};
  void* sanitizer = nullptr;
  State state = State::kDone;
  unsigned mask = 0;
  Site site{};
  unsigned exchanges = 0;
  std::array<uint64_t, 2> handed{};  // two, since a lane may be one exchange ahead of its warp
};

inline bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

inline std::string place(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

// A block's dynamic shared memory: exactly as large as it was asked for, so that AddressSanitizer
// sees what lies beyond; without it, bytes lie there that have to stay what they are.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t size)
      : size_(size), bytes_(static_cast<std::byte*>(::operator new(size + kBeyond, kAlignment))) {
    // NaN, so that what is read before it is written shows
    std::memset(bytes_.get(), 0xff, size + kBeyond);
  }
  std::byte* get() const { return bytes_.get(); }
  std::size_t size() const { return size_; }
  bool intact() const {
    return std::all_of(get() + size_, get() + size_ + kBeyond,
                       [](std::byte b) { return b == std::byte{0xff}; });
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr std::size_t kBeyond = 0;
#else
  static constexpr std::size_t kBeyond = 256;
#endif
  static constexpr std::align_val_t kAlignment{128};
  struct Delete {
    void operator()(std::byte* bytes) const { ::operator delete(bytes, kAlignment); }
  };
  std::size_t size_;
  std::unique_ptr<std::byte, Delete> bytes_;
};

}  // namespace crpt::emulation
