// Memory for large results: mapped in huge pages, and kept for the next result of that size.
//
// malloc maps blocks from 32 MiB on afresh each time, and a fresh page costs a fault and 4 KiB of
// zeros before the first byte is written: filling 130 MB takes 33 ms so, 7 ms in fresh huge pages
// and 4 ms in pages that were used before.
#pragma once

#include <cstddef>

namespace crpt {

// Any thread may call these at any time; they block each other for no longer than a system call
// takes. A child of fork has a pool of its own, with copies of the parent's blocks.
struct PageBlock {
  void* data = nullptr;  // null: the system has no memory, or the pool is switched off
  size_t bytes = 0;      // of the mapping
};

// At least `bytes`, uninitialised; from the pool where a block there is at most a quarter larger.
PageBlock take_pages(size_t bytes);
// Back to the pool. Blocks given back longest ago leave it for the system when it grows beyond its
// limit.
void give_pages(PageBlock block) noexcept;

// Most bytes that the pool keeps while nobody uses them; 0 switches it off.
size_t pool_limit();
void set_pool_limit(size_t bytes);
void empty_pool();
// What it keeps now.
size_t pooled_bytes();

}  // namespace crpt
