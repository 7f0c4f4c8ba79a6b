#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/page_pool.h"

namespace crpt {
namespace {

constexpr size_t kMiB = 1 << 20;

class PagePool : public ::testing::Test {
 protected:
  void SetUp() override {
    set_pool_limit(64 * kMiB);
    empty_pool();
  }
};

TEST_F(PagePool, HandsOutWhatWasGivenBack) {
  const PageBlock block = take_pages(9 * kMiB + 1);
  ASSERT_NE(block.data, nullptr);
  EXPECT_GE(block.bytes, 9 * kMiB + 1);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(block.data) % (2 * kMiB), 0u);
  std::memset(block.data, 1, 9 * kMiB + 1);
  EXPECT_EQ(pooled_bytes(), 0u);
  give_pages(block);
  EXPECT_EQ(pooled_bytes(), block.bytes);
  EXPECT_EQ(take_pages(9 * kMiB).data, block.data);
  EXPECT_EQ(pooled_bytes(), 0u);
  give_pages(block);
}

TEST_F(PagePool, TwoInUseAreTwo) {
  const PageBlock one = take_pages(8 * kMiB), two = take_pages(8 * kMiB);
  EXPECT_NE(one.data, two.data);
  give_pages(one);
  give_pages(two);
  EXPECT_EQ(pooled_bytes(), 16 * kMiB);
}

TEST_F(PagePool, TakesTheBestFitAndNoneMuchTooLarge) {
  const PageBlock large = take_pages(40 * kMiB), medium = take_pages(12 * kMiB),
                  small = take_pages(10 * kMiB);
  for (const PageBlock block : {large, medium, small}) give_pages(block);
  const PageBlock taken = take_pages(10 * kMiB), next = take_pages(10 * kMiB);
  EXPECT_EQ(taken.data, small.data);
  EXPECT_EQ(next.data, medium.data);  // a fifth larger
  const PageBlock fresh = take_pages(10 * kMiB);
  EXPECT_NE(fresh.data, large.data);
  EXPECT_EQ(pooled_bytes(), 40 * kMiB);
  for (const PageBlock block : {taken, next, fresh}) give_pages(block);
}

TEST_F(PagePool, KeepsNoMoreThanItsLimitAndTheLatest) {
  std::vector<PageBlock> blocks;
  for (int i = 0; i < 5; ++i) blocks.push_back(take_pages(16 * kMiB));
  for (const PageBlock& block : blocks) give_pages(block);
  EXPECT_EQ(pooled_bytes(), 64 * kMiB);
  give_pages(take_pages(100 * kMiB));  // larger than all of it: not kept, and nothing makes room
  EXPECT_EQ(pooled_bytes(), 64 * kMiB);
  set_pool_limit(20 * kMiB);
  EXPECT_EQ(pool_limit(), 20 * kMiB);
  EXPECT_EQ(pooled_bytes(), 16 * kMiB);
  const PageBlock kept = take_pages(16 * kMiB);
  EXPECT_EQ(kept.data, blocks.back().data);
  give_pages(kept);
  empty_pool();
  EXPECT_EQ(pooled_bytes(), 0u);
  EXPECT_EQ(pool_limit(), 20 * kMiB);
}

TEST_F(PagePool, SwitchedOffGivesNone) {
  const PageBlock before = take_pages(8 * kMiB);
  set_pool_limit(0);
  EXPECT_EQ(take_pages(8 * kMiB).data, nullptr);
  give_pages(before);
  EXPECT_EQ(pooled_bytes(), 0u);
}

TEST_F(PagePool, WhatTheSystemDoesNotHaveIsNone) {
  give_pages(take_pages(8 * kMiB));
  EXPECT_EQ(take_pages(size_t{1} << 60).data, nullptr);
  EXPECT_EQ(pooled_bytes(), 0u);  // given up for it
  EXPECT_EQ(take_pages(SIZE_MAX).data, nullptr);
  EXPECT_EQ(take_pages(0).data, nullptr);
}

// Each thread finds what it wrote: no block is in two hands.
void use(int value, int times) {
  for (int i = 0; i < times; ++i) {
    const PageBlock block = take_pages((2 + static_cast<size_t>(i) % 3 * 2) * kMiB);
    for (size_t at = 0; at < block.bytes; at += 4096) static_cast<char*>(block.data)[at] = value;
    for (size_t at = 0; at < block.bytes; at += 4096) {
      ASSERT_EQ(static_cast<char*>(block.data)[at], value);
    }
    give_pages(block);
  }
}

TEST_F(PagePool, ThreadsShareIt) {
  set_pool_limit(8 * kMiB);
  std::vector<std::thread> threads;
  for (int i = 1; i <= 4; ++i) threads.emplace_back(use, i, 100);
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(pooled_bytes(), 8 * kMiB);
}

// A child forked while other threads are at it finds the pool usable, and the parent's data its
// own.
TEST_F(PagePool, ChildrenOfForkHaveTheirOwn) {
  const PageBlock block = take_pages(4 * kMiB);
  static_cast<char*>(block.data)[0] = 7;
  std::thread busy(use, 1, 200);
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a lock that nobody releases ends here
      const bool same = static_cast<char*>(block.data)[0] == 7;
      static_cast<char*>(block.data)[0] = 8;
      give_pages(take_pages(4 * kMiB));
      give_pages(block);
      _exit(same ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    ASSERT_EQ(status, 0);
  }
  busy.join();
  EXPECT_EQ(static_cast<char*>(block.data)[0], 7);
  give_pages(block);
}

}  // namespace
}  // namespace crpt
