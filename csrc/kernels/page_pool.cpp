#include "kernels/page_pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace crpt {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kDefaultLimit = 256 << 20;

struct Pool {
  std::mutex mutex;
  std::vector<PageBlock> blocks;  // given back longest ago first
  size_t bytes = 0;               // of all of them
  size_t limit = kDefaultLimit;
};

// Never destroyed: results may outlive everything that runs when the process ends.
Pool& pool() {
  static Pool* const instance = [] {
    Pool* made = new Pool;
    // No thread of the child would unlock what another thread of the parent had locked.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] { pool().mutex.unlock(); });
    return made;
  }();
  return *instance;
}

PageBlock map_pages(size_t bytes) {
  // One huge page more, so that the rest starts at the start of one.
  void* const mapped =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {};
  char* const begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(begin + before + bytes, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(begin + before, bytes, MADV_HUGEPAGE);  // a kernel without huge pages refuses: no matter
#endif
  return {begin + before, bytes};
}

// Takes blocks out, oldest first, until no more than `limit` bytes are left; for unmapping when the
// lock is no longer held.
std::vector<PageBlock> evict(Pool& held, size_t limit) {
  size_t count = 0;
  for (size_t bytes = held.bytes; bytes > limit; ++count) bytes -= held.blocks[count].bytes;
  const auto end = held.blocks.begin() + static_cast<ptrdiff_t>(count);
  std::vector<PageBlock> evicted(held.blocks.begin(), end);
  held.blocks.erase(held.blocks.begin(), end);
  for (const PageBlock& block : evicted) held.bytes -= block.bytes;
  return evicted;
}

void unmap(const std::vector<PageBlock>& blocks) {
  for (const PageBlock& block : blocks) munmap(block.data, block.bytes);
}

}  // namespace

PageBlock take_pages(size_t bytes) {
  if (bytes == 0 || bytes > SIZE_MAX - 2 * kHugePage) return {};
  const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Pool& p = pool();
  {
    const std::lock_guard lock(p.mutex);
    if (p.limit == 0) return {};
    auto best = p.blocks.end();
    for (auto block = p.blocks.begin(); block != p.blocks.end(); ++block) {
      const bool fits = block->bytes >= rounded && block->bytes - rounded <= rounded / 4;
      // The latest of equals: its pages are the likeliest to be in the caches.
      if (fits && (best == p.blocks.end() || block->bytes <= best->bytes)) best = block;
    }
    if (best != p.blocks.end()) {
      const PageBlock found = *best;
      p.blocks.erase(best);
      p.bytes -= found.bytes;
      return found;
    }
  }
  PageBlock fresh = map_pages(rounded);
  if (fresh.data == nullptr) {
    empty_pool();  // what lies idle there may be what is missing
    fresh = map_pages(rounded);
  }
  return fresh;
}

void give_pages(PageBlock block) noexcept {
  if (block.data == nullptr) return;
  Pool& p = pool();
  try {
    std::vector<PageBlock> evicted;
    {
      const std::lock_guard lock(p.mutex);
      if (block.bytes <= p.limit) {
        evicted = evict(p, p.limit - block.bytes);
        p.blocks.push_back(block);
        p.bytes += block.bytes;
        block.data = nullptr;
      }
    }
    unmap(evicted);
  } catch (const std::bad_alloc&) {
    // No room to remember the block.
  }
  if (block.data != nullptr) munmap(block.data, block.bytes);
}

size_t pool_limit() {
  const std::lock_guard lock(pool().mutex);
  return pool().limit;
}

void set_pool_limit(size_t bytes) {
  std::vector<PageBlock> evicted;
  {
    const std::lock_guard lock(pool().mutex);
    pool().limit = bytes;
    evicted = evict(pool(), bytes);
  }
  unmap(evicted);
}

void empty_pool() {
  std::vector<PageBlock> evicted;
  {
    const std::lock_guard lock(pool().mutex);
    evicted = evict(pool(), 0);
  }
  unmap(evicted);
}

size_t pooled_bytes() {
  const std::lock_guard lock(pool().mutex);
  return pool().bytes;
}

}  // namespace crpt
