// Many writers and samplers over small rings that go round all the time; every sampled item is
// checked whole. Run under ThreadSanitizer and AddressSanitizer, too.
#include <atomic>
#include <chrono>
#include <thread>

#include "replay_ring.h"

#if defined(CRPT_TSAN)
// The kernel reads frames by plain vectorised loads while a writer may overwrite them: the one race
// that the protocol allows (ring.h), since what was read is then thrown away. Named from both
// sides: of one that lies far back, only the address is still known.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions() {
  return "race:frame_stack\nrace:store_frame\n";
}
#endif

namespace crpt::replay {
namespace {

using namespace testing;

// Writers go on until so many episodes are written and so many rows were checked beside them, or
// for kSeconds where the machine is busy.
constexpr std::chrono::seconds kSeconds{20};
#if defined(CRPT_TSAN)
constexpr uint64_t kEpisodes = 2000;
constexpr int64_t kRows = 10000;
#else
constexpr uint64_t kEpisodes = 20000;
constexpr int64_t kRows = 50000;
#endif

uint64_t length_of(uint64_t episode) { return 1 + episode * 2654435761u % 9; }

// Threads that sample until they are joined.
class Samplers {
 public:
  explicit Samplers(const Ring& ring) {
    for (int i = 0; i < 3; ++i) {
      threads_.emplace_back([this, ring, i] {
        Drawn drawn(32, 3, 1 + i % 2);
        drawn.args.threads = 1 + i / 2;
        for (uint64_t seed = static_cast<uint64_t>(i) << 32; !stop_.load(); ++seed) {
          const SampleResult result = drawn.sample(ring, seed);
          if (result.status != SampleResult::done) continue;  // empty yet, or overrun
          drawn.expect_whole();
          rows_ += drawn.batch;
        }
      });
    }
  }
  bool have_seen_enough() const {
    return rows_ >= kRows || ::testing::Test::HasFailure() ||
           std::chrono::steady_clock::now() > deadline_;
  }
  void join() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
    EXPECT_GT(rows_, kRows / 100);
  }

 private:
  const std::chrono::steady_clock::time_point deadline_ =
      std::chrono::steady_clock::now() + kSeconds;
  std::atomic<int64_t> rows_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

class SharedWriters : public ::testing::TestWithParam<size_t> {};

TEST_P(SharedWriters, EverySampledItemIsWhole) {
  constexpr int writers = 4;
  Arrays arrays(GetParam());
  const Ring ring = arrays.ring();
  std::vector<std::thread> threads;
  std::atomic<uint64_t> refused{0}, steps{0};
  Samplers samplers(ring);
  for (uint64_t number = 0; number < writers; ++number) {
    threads.emplace_back([&, number] {
      Writer writer(ring, true, true);
      for (uint64_t episode = 0; episode < kEpisodes || !samplers.have_seen_enough(); ++episode) {
        for (uint64_t step = 0; step <= length_of(episode);) {
          const bool last = step == length_of(episode);
          // In the smallest ring all slots may be busy for a moment.
          append(writer, {number, episode, step}, last) == Commit::done ? ++step : refused += 1;
        }
        steps += length_of(episode) + 1;
      }
      writer.close();
    });
  }
  for (std::thread& thread : threads) thread.join();
  samplers.join();
  // All is still now: whole steps but for the tickets that led nowhere.
  EXPECT_GE(arrays.head, steps);
  EXPECT_GT(count_whole(ring), 0u);
  EXPECT_TRUE(is_plausible(ring));
  for (const uint64_t stamp : arrays.stamps) EXPECT_FALSE(is_busy(stamp));
  if (GetParam() > 8) {
    EXPECT_EQ(refused, 0u);
  }
}

INSTANTIATE_TEST_SUITE_P(Capacities, SharedWriters, ::testing::Values(8, 33, 500, 3000));

TEST(ExclusiveWriter, RollBacksNeverMixTheStepsOfOneTicket) {
  Arrays arrays(24);
  const Ring ring = arrays.ring();
  Samplers samplers(ring);
  Writer writer(ring, false, true);
  std::mt19937 random(0);
  for (uint64_t episode = 0; episode < kEpisodes || !samplers.have_seen_enough(); ++episode) {
    append_episode(writer, 0, episode, length_of(episode));
    Ticket start;
    if (random() % 2 && start_of_last_episode(ring, &start)) writer.roll_back(start);
  }
  samplers.join();
  EXPECT_GT(arrays.epoch, kEpisodes / 3);
}

TEST(ExclusiveWriter, WhatItCountsIsWhole) {
  Arrays arrays(64);
  const Ring ring = arrays.ring();
  std::atomic<int> running{1};
  std::thread reader([&] {
    while (running.load() > 0) {
      const Ticket head = head_of(ring);
      // Overwritten meanwhile, perhaps, but never not yet there.
      if (head > 0) {
        const uint64_t stamp = load(ring.stamps + ring.slot(head - 1), std::memory_order_acquire);
        ASSERT_GE(count_of(stamp), head);
      }
    }
  });
  Writer writer(ring, false, true);
  for (uint64_t episode = 0; episode < kEpisodes; ++episode) {
    append_episode(writer, 0, episode, length_of(episode));
  }
  --running;
  reader.join();
}

}  // namespace
}  // namespace crpt::replay
