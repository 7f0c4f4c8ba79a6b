// What the replay tests share: a ring in this process's memory, and steps whose every field and
// every word of pixels says which step of which episode of which writer it is.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "replay/reader.h"
#include "replay/sample.h"
#include "replay/writer.h"

namespace crpt::replay::testing {

#if defined(__SANITIZE_THREAD__)
#define CRPT_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CRPT_TSAN 1
#endif
#endif

// One channel. Frames take long enough to write for readers to come in between.
#if defined(CRPT_TSAN)
constexpr int64_t kHeight = 4, kWidth = 16;
#else
constexpr int64_t kHeight = 16, kWidth = 64;
#endif
constexpr size_t kWords = kHeight * kWidth / 8;
constexpr double kGamma = 0.5;

struct Arrays {
  uint64_t head = 0, epoch = 0;
  std::vector<uint64_t> stamps, previous, frames;
  std::vector<float> actions, rewards, discounts;
  std::vector<uint8_t> is_first, is_last;
  std::vector<double> states;

  explicit Arrays(size_t capacity)
      : stamps(capacity),
        previous(capacity),
        frames(capacity * kWords),
        actions(capacity * 2),
        rewards(capacity),
        discounts(capacity),
        is_first(capacity),
        is_last(capacity),
        states(capacity) {}

  Ring ring() {
    return {.head = &head,
            .epoch = &epoch,
            .stamps = stamps.data(),
            .previous = previous.data(),
            .frames = reinterpret_cast<uint8_t*>(frames.data()),
            .actions = actions.data(),
            .rewards = rewards.data(),
            .discounts = discounts.data(),
            .is_first = is_first.data(),
            .is_last = is_last.data(),
            .states = states.data(),
            .capacity = stamps.size(),
            .frame_bytes = kWords * 8,
            .action_size = 2,
            .state_size = 1};
  }
};

struct Identity {
  uint64_t writer, episode, step;
  uint64_t word() const { return (writer << 56) | (episode << 16) | step; }
  static Identity of(uint64_t word) {
    return {word >> 56, (word >> 16) & 0xFFFFFFFFFFu, word & 0xFFFFu};
  }
  // Exact in float, and different for neighbours in time and among writers.
  float reward() const { return static_cast<float>((writer * 1009 + episode * 31 + step) % 65536); }
  float discount() const { return static_cast<float>((episode + step) % 3) / 2; }
};

inline Commit append(Writer& writer, const Identity& id, bool last) {
  uint64_t frame[kWords];
  for (uint64_t& word : frame) word = id.word();
  const float action[2] = {static_cast<float>(id.episode % 65536), static_cast<float>(id.step)};
  const double state = id.reward();
  return writer.append({.frame = reinterpret_cast<const uint8_t*>(frame),
                        .action = action,
                        .reward = id.reward(),
                        .discount = id.discount(),
                        .state = &state,
                        .last = last});
}

// An episode of `length` transitions.
inline void append_episode(Writer& writer, uint64_t number, uint64_t episode, uint64_t length) {
  for (uint64_t step = 0; step <= length; ++step) {
    ASSERT_EQ(append(writer, {number, episode, step}, step == length), Commit::done);
  }
}

struct Drawn {
  int64_t batch, stack, n_step;
  std::vector<uint64_t> obs, next_obs;  // [B, K, words]
  std::vector<float> action, reward, discount;
  SampleArgs args;

  Drawn(int64_t batch_, int64_t stack_, int64_t n_step_)
      : batch(batch_),
        stack(stack_),
        n_step(n_step_),
        obs(static_cast<size_t>(batch * stack) * kWords),
        next_obs(obs.size()),
        action(static_cast<size_t>(2 * batch)),
        reward(static_cast<size_t>(batch)),
        discount(reward.size()) {
    args = {.batch = batch,
            .stack = stack,
            .n_step = n_step,
            .gamma = kGamma,
            .channels = 1,
            .height = kHeight,
            .width = kWidth,
            .obs = obs.data(),
            .next_obs = next_obs.data(),
            .action = action.data(),
            .action_stride = 2,
            .reward = reward.data(),
            .discount = discount.data()};
  }
  Drawn(const Drawn&) = delete;

  SampleResult sample(const Ring& ring, uint64_t seed) {
    args.seed = seed;
    return crpt::replay::sample(ring, args);
  }

  // The identity that every word of a frame agrees on.
  static Identity frame(const std::vector<uint64_t>& frames, int64_t i) {
    const uint64_t* words = frames.data() + static_cast<size_t>(i) * kWords;
    for (size_t w = 1; w < kWords; ++w) EXPECT_EQ(words[w], words[0]) << "a torn frame";
    return Identity::of(words[0]);
  }

  void expect_stack(const std::vector<uint64_t>& frames, int64_t row,
                    const Identity& newest) const {
    for (int64_t k = 0; k < stack; ++k) {
      const Identity id = frame(frames, row * stack + stack - 1 - k);
      const auto back = static_cast<uint64_t>(k);
      ASSERT_EQ(id.writer, newest.writer);
      ASSERT_EQ(id.episode, newest.episode);
      ASSERT_EQ(id.step, newest.step > back ? newest.step - back : 0);
    }
  }

  // Every field of every row belongs to one transition.
  void expect_whole() const {
    for (int64_t row = 0; row < batch; ++row) {
      const Identity end = frame(next_obs, row * stack + stack - 1);
      const auto n = static_cast<uint64_t>(n_step);
      ASSERT_GE(end.step, n);
      expect_stack(next_obs, row, end);
      expect_stack(obs, row, {end.writer, end.episode, end.step - n});
      double sum = 0, product = 1;
      for (uint64_t step = end.step - n + 1; step <= end.step; ++step) {
        const Identity id{end.writer, end.episode, step};
        sum += product * id.reward();
        product *= kGamma * id.discount();
      }
      const auto at = static_cast<size_t>(row);
      ASSERT_EQ(action[2 * at], static_cast<float>(end.episode % 65536));
      ASSERT_EQ(action[2 * at + 1], static_cast<float>(end.step - n + 1));
      ASSERT_EQ(reward[at], static_cast<float>(sum));
      ASSERT_EQ(discount[at], static_cast<float>(product));
    }
  }
};

}  // namespace crpt::replay::testing
