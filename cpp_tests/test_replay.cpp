#include <algorithm>
#include <map>

#include "replay/random.h"
#include "replay_ring.h"

namespace crpt::replay {
namespace {

using namespace testing;

Writer exclusive(const Ring& ring, bool overwrites = true) { return {ring, false, overwrites}; }

TEST(Replay, RefusesToOverwriteWhereItIsNotTo) {
  Arrays arrays(3);
  Writer writer = exclusive(arrays.ring(), false);
  append_episode(writer, 0, 0, 2);
  EXPECT_EQ(append(writer, {0, 1, 0}, false), Commit::full);
  EXPECT_EQ(arrays.head, 3u);
  EXPECT_FALSE(writer.is_open());
}

TEST(Replay, ACutEpisodeIsRolledBack) {
  Arrays arrays(8);
  const Ring ring = arrays.ring();
  {
    Writer writer = exclusive(ring);
    append_episode(writer, 0, 0, 2);
    append(writer, {0, 1, 0}, false);
    append(writer, {0, 1, 1}, false);
  }
  store(ring.stamps + 5, busy(5));  // killed in step 5
  repair(ring);
  EXPECT_EQ(arrays.stamps[5], 0u);
  EXPECT_EQ(end_of_whole_episodes(ring), 3u);
  Writer writer = exclusive(ring);
  writer.roll_back(3);
  EXPECT_EQ(arrays.head, 3u);
  EXPECT_EQ(arrays.epoch, 1u);
  EXPECT_EQ(count_whole(ring), 3u);
  EXPECT_EQ(std::count(arrays.stamps.begin(), arrays.stamps.end(), 0u), 5);
  writer.roll_back(3);
  EXPECT_EQ(arrays.epoch, 1u) << "nothing was left to roll back";
}

TEST(Replay, ARollBackThatWasCutShortIsDoneAgain) {
  for (const uint64_t zeroed : {1, 2, 3}) {
    Arrays arrays(8);
    Writer writer = exclusive(arrays.ring());
    append_episode(writer, 0, 0, 2);
    for (uint64_t t = 3 - zeroed; t < 3; ++t) arrays.stamps[t] = 0;  // newest first, then killed
    EXPECT_EQ(end_of_whole_episodes(arrays.ring()), 0u) << zeroed;
  }
}

TEST(Replay, ARolledBackRingMayBeEmpty) {
  Arrays arrays(2);
  Writer writer = exclusive(arrays.ring());
  append_episode(writer, 0, 0, 6);
  Ticket start;
  ASSERT_TRUE(start_of_last_episode(arrays.ring(), &start));
  EXPECT_EQ(start, 5u) << "the rest of the episode is overwritten";
  writer.roll_back(start);
  EXPECT_EQ(count_whole(arrays.ring()), 0u);
  EXPECT_TRUE(is_plausible(arrays.ring()));
  EXPECT_EQ(end_of_whole_episodes(arrays.ring()), 5u);
  append_episode(writer, 0, 1, 1);
  EXPECT_EQ(count_whole(arrays.ring()), 2u);
}

TEST(Replay, AStepThatWasNeverCountedDoesNotCountLater) {
  Arrays arrays(8);
  Writer writer = exclusive(arrays.ring());
  append_episode(writer, 0, 0, 2);
  arrays.head = 2;  // killed between the stamp and the cursor
  repair(arrays.ring());
  EXPECT_EQ(count_whole(arrays.ring()), 2u);
  EXPECT_EQ(arrays.stamps[2], 0u);
  EXPECT_EQ(arrays.epoch, 1u) << "its ticket comes again";
}

// Every state that a kill can leave, store by store, leads to the same ring.
TEST(Replay, ARollBackKilledBetweenAnyTwoStoresIsBegunAgain) {
  constexpr uint64_t length = 5, kept = 4;  // of the episode that goes, and of the one before
  for (const bool ended : {true, false}) {
    for (uint64_t cleared = 0; cleared <= length; ++cleared) {
      Arrays arrays(8);
      const Ring ring = arrays.ring();
      Writer writer = exclusive(ring);
      append_episode(writer, 0, 0, kept - 1);
      for (uint64_t step = 0; step < length; ++step) {
        append(writer, {0, 1, step}, ended && step + 1 == length);
      }
      for (Ticket t = kept + length; t > kept + length - cleared; --t) {
        store(ring.stamps + ring.slot(t - 1), uint64_t{0});
      }
      repair(ring);
      EXPECT_TRUE(is_plausible(ring));
      Writer next = exclusive(ring);
      next.roll_back(end_of_whole_episodes(ring));
      if (ended && cleared == 0) {  // nothing had gone yet: the episode is there, whole
        EXPECT_EQ(arrays.head, kept + length);
        continue;
      }
      EXPECT_EQ(arrays.head, kept) << ended << cleared;
      EXPECT_EQ(count_whole(ring), kept - 1) << "the oldest of its steps was overwritten";
      append_episode(next, 0, 2, 2);
      Drawn drawn(32, 3, 1);
      ASSERT_EQ(drawn.sample(ring, 0).status, SampleResult::done);
      drawn.expect_whole();
    }
  }
}

TEST(Replay, InterleavedTailsOfSharedWritersAreKept) {
  Arrays arrays(8);
  const Ring ring = arrays.ring();
  Writer a(ring, true, true), b(ring, true, true);
  append(a, {0, 0, 0}, false);
  append(b, {1, 0, 0}, false);
  append(a, {0, 0, 1}, false);
  append(b, {1, 0, 1}, false);
  EXPECT_EQ(end_of_whole_episodes(ring), 4u);
  Ticket start;
  EXPECT_FALSE(start_of_last_episode(ring, &start));
  EXPECT_EQ(transitions(ring, 1, 3), (std::vector<Ticket>{2, 3}));
  std::vector<Ticket> steps;
  std::vector<int64_t> episode;
  episodes(ring, 3, &steps, &episode);
  EXPECT_EQ(episode, (std::vector<int64_t>{0, 1, 0, 1}));
  Drawn drawn(64, 3, 1);
  ASSERT_EQ(drawn.sample(ring, 1).status, SampleResult::done);
  drawn.expect_whole();
}

TEST(Replay, ADeadWriterCostsOneSlot) {
  Arrays arrays(4);
  const Ring ring = arrays.ring();
  store(ring.head, Ticket{1});
  store(ring.stamps, busy(0));  // died while it wrote step 0
  Writer writer(ring, true, true);
  append_episode(writer, 0, 0, 8);
  EXPECT_EQ(arrays.stamps[0], busy(0));
  EXPECT_EQ(count_whole(ring), 3u);
  EXPECT_EQ(arrays.head,
            12u);  // 9 steps, and tickets 0, 4 and 8 that led to the dead writer's slot
  repair(ring);
  append_episode(writer, 0, 1, 3);
  EXPECT_EQ(count_whole(ring), 4u);
}

TEST(Replay, AStalledWriterLeavesItsSlotToTheNewerStep) {
  Arrays arrays(4);
  const Ring ring = arrays.ring();
  Writer writer(ring, true, true);
  append_episode(writer, 0, 0, 5);
  arrays.head = 1;  // as a writer sees it that stalled after its ticket, a lap ago
  EXPECT_EQ(append(writer, {0, 1, 0}, false), Commit::no_slot) << "all slots are newer";
  EXPECT_EQ(arrays.stamps, (std::vector<uint64_t>{5, 6, 3, 4}));
}

TEST(Replay, ARingOfFewSlotsMayLoseLapsOfTickets) {
  Arrays arrays(1);
  const Ring ring = arrays.ring();
  Writer writer(ring, true, true);
  store(ring.head, Ticket{1});
  store(ring.stamps, busy(0));  // another one, stalled
  for (int i = 0; i < 10; ++i) EXPECT_EQ(append(writer, {0, 0, 0}, false), Commit::no_slot);
  store(ring.stamps, whole(0));  // that goes on
  EXPECT_TRUE(is_plausible(ring));
}

TEST(Replay, WhereEverySlotIsStalledTheWriterSaysSo) {
  Arrays arrays(3);
  const Ring ring = arrays.ring();
  for (uint64_t t = 0; t < 3; ++t) store(ring.stamps + t, busy(t));
  store(ring.head, Ticket{3});
  Writer writer(ring, true, true);
  EXPECT_EQ(append(writer, {0, 0, 0}, false), Commit::no_slot);
  EXPECT_TRUE(is_plausible(ring));
  repair(ring);
  EXPECT_EQ(append(writer, {0, 0, 0}, false), Commit::done);
}

TEST(Replay, NothingToDrawIsFoundOut) {
  Arrays arrays(1000);
  Drawn drawn(4, 3, 2);
  EXPECT_EQ(drawn.sample(arrays.ring(), 0).status, SampleResult::empty);
  Writer writer = exclusive(arrays.ring());
  for (uint64_t episode = 0; episode < 100; ++episode) append_episode(writer, 0, episode, 1);
  EXPECT_EQ(drawn.sample(arrays.ring(), 0).status, SampleResult::empty);  // no episode of two
  append_episode(writer, 0, 100, 3);
  ASSERT_EQ(drawn.sample(arrays.ring(), 0).status, SampleResult::done);
  drawn.expect_whole();
}

TEST(Replay, RareTransitionsAreDrawnUniformly) {
  Arrays arrays(3000);
  Writer writer = exclusive(arrays.ring());
  append_episode(writer, 0, 0, 3);
  for (uint64_t episode = 1; episode < 1400; ++episode) append_episode(writer, 0, episode, 1);
  Drawn drawn(4000, 1, 2);
  ASSERT_EQ(drawn.sample(arrays.ring(), 5).status, SampleResult::done);
  std::map<float, int> counts;
  for (size_t row = 0; row < 4000; ++row) ++counts[drawn.action[2 * row + 1]];
  ASSERT_EQ(counts.size(), 2u);
  for (const auto& [step, count] : counts) EXPECT_NEAR(count, 2000, 150);
}

TEST(Replay, ABatchDependsOnTheSeedAloneNotOnThreads) {
  Arrays arrays(500);
  Writer writer = exclusive(arrays.ring());
  for (uint64_t episode = 0; episode < 100; ++episode) append_episode(writer, 0, episode, 7);
  Drawn one(100, 3, 2), many(100, 3, 2), other(100, 3, 2);
  one.args.pad = many.args.pad = 2;
  many.args.threads = 5;
  ASSERT_EQ(one.sample(arrays.ring(), 7).status, SampleResult::done);
  ASSERT_EQ(many.sample(arrays.ring(), 7).status, SampleResult::done);
  ASSERT_EQ(other.sample(arrays.ring(), 8).status, SampleResult::done);
  EXPECT_EQ(one.obs, many.obs);
  EXPECT_EQ(one.next_obs, many.next_obs);
  EXPECT_EQ(one.reward, many.reward);
  EXPECT_NE(one.reward, other.reward);
}

TEST(Replay, RowsByThemselvesAreThoseOfTheWholeBatch) {
  Arrays arrays(500);
  Writer writer = exclusive(arrays.ring());
  for (uint64_t episode = 0; episode < 100; ++episode) append_episode(writer, 0, episode, 7);
  Drawn whole(100, 3, 2), part(37, 3, 2);
  whole.args.pad = part.args.pad = 2;
  part.args.first_row = 21;
  ASSERT_EQ(whole.sample(arrays.ring(), 7).status, SampleResult::done);
  ASSERT_EQ(part.sample(arrays.ring(), 7).status, SampleResult::done);
  const size_t pixels = whole.obs.size() / 100;
  for (size_t row = 0; row < 37; ++row) {
    EXPECT_EQ(part.reward[row], whole.reward[21 + row]);
    for (size_t i = 0; i < pixels; ++i) {
      ASSERT_EQ(part.obs[row * pixels + i], whole.obs[(21 + row) * pixels + i]);
      ASSERT_EQ(part.next_obs[row * pixels + i], whole.next_obs[(21 + row) * pixels + i]);
    }
  }
}

TEST(Replay, GivenSlotsAreGathered) {
  Arrays arrays(20);
  Writer writer = exclusive(arrays.ring());
  append_episode(writer, 0, 0, 9);
  const int64_t slots[3] = {4, 2, 9};
  Drawn drawn(3, 3, 1);
  drawn.args.slots = slots;
  ASSERT_EQ(drawn.sample(arrays.ring(), 0).status, SampleResult::done);
  drawn.expect_whole();
  for (size_t row = 0; row < 3; ++row) EXPECT_EQ(drawn.action[2 * row + 1], slots[row]);
  for (const int64_t bad : {int64_t{0}, int64_t{15}, int64_t{20}, int64_t{-1}, INT64_MIN}) {
    const int64_t wrong[3] = {4, bad, 9};
    drawn.args.slots = wrong;
    const SampleResult result = drawn.sample(arrays.ring(), 0);
    EXPECT_EQ(result.status, SampleResult::not_whole);
    EXPECT_EQ(result.row, 1);
  }
}

TEST(Replay, AStepThatWasNeverCountedIsNotGathered) {
  Arrays arrays(8);
  Writer writer(arrays.ring(), false, true);
  for (uint64_t episode = 0; episode < 3; ++episode) append_episode(writer, 0, episode, 3);
  const int64_t slot = 3;  // of ticket 11, the newest: the ring has gone round
  Drawn drawn(1, 2, 1);
  drawn.args.slots = &slot;
  EXPECT_EQ(drawn.sample(arrays.ring(), 0).status, SampleResult::done);
  --arrays.head;  // as if its writer had died before it counted the step
  EXPECT_EQ(drawn.sample(arrays.ring(), 0).status, SampleResult::not_whole);
}

TEST(Replay, RandomWordsBelowABoundAreUniform) {
  std::vector<int> counts(10);
  for (uint64_t row = 0; row < 1000; ++row) {
    for (uint64_t draw = 0; draw < 100; ++draw) ++counts[below(random_word(3, row, draw), 10)];
  }
  double chi_square = 0;
  for (const int count : counts) chi_square += (count - 1e4) * (count - 1e4) / 1e4;
  EXPECT_LT(chi_square, 27.9);  // 9 degrees of freedom, 0.1%
  static_assert(below(UINT64_MAX, 7) == 6 && below(0, 7) == 0);
}

TEST(Replay, AStepFollowsNoneThatIsLaterOrALapBefore) {
  Arrays arrays(10);
  Writer writer = exclusive(arrays.ring());
  append_episode(writer, 0, 0, 9);
  const std::vector<Ticket> all = transitions(arrays.ring(), 1, 1);
  EXPECT_EQ(all.size(), 9u);
  for (const uint64_t before :
       {uint64_t{5}, uint64_t{8}, uint64_t{15}, ~uint64_t{0}, ~uint64_t{4}}) {
    arrays.previous[5] = before;
    std::vector<Ticket> expected = all;
    std::erase(expected, 5u);
    EXPECT_EQ(transitions(arrays.ring(), 1, 1), expected) << before;
  }
}

// Words of shared memory may be anything: no crash, no read outside the arrays (AddressSanitizer),
// no endless loop.
TEST(Replay, HostileWordsAreHarmless) {
  std::mt19937_64 random(0);
  int sampled = 0, plausible = 0;
  for (int round = 0; round < 3000; ++round) {
    const size_t capacity = 1 + random() % 12;
    Arrays arrays(capacity);
    const Ring ring = arrays.ring();
    Writer writer = exclusive(ring);
    for (uint64_t episode = 0; episode < random() % 8; ++episode) {
      append_episode(writer, 0, episode, random() % 6);
    }
    const auto wild = [&]() -> uint64_t {
      switch (random() % 4) {
        case 0:
          return random() % (2 * capacity);
        case 1:
          return arrays.head + random() % 5 - 2;
        case 2:
          return busy(random() % (2 * capacity));
        default:
          return random();
      }
    };
    for (uint64_t changes = random() % 6; changes > 0; --changes) {
      const size_t slot = random() % capacity;
      switch (random() % 6) {
        case 0:
          arrays.head = wild();
          break;
        case 1:
          arrays.epoch = wild();
          break;
        case 2:
          arrays.stamps[slot] = wild();
          break;
        case 3:
          arrays.is_first[slot] = static_cast<uint8_t>(random());
          break;
        case 4:
          arrays.is_last[slot] = static_cast<uint8_t>(random());
          break;
        default:
          arrays.previous[slot] = wild();  // later than the step, a lap before it, in a circle
      }
    }
    Drawn drawn(4, 3, 1 + static_cast<int64_t>(random() % 3));
    sampled += drawn.sample(ring, random()).status == SampleResult::done;
    const int64_t slots[4] = {0, static_cast<int64_t>(random()), 1, -5};
    drawn.args.slots = slots;
    drawn.sample(ring, random());
    std::vector<Ticket> steps;
    std::vector<int64_t> episode;
    episodes(ring, 2, &steps, &episode);
    ASSERT_LE(steps.size(), capacity);
    ASSERT_LE(count_whole(ring), capacity);
    plausible += is_plausible(ring);
    Ticket start;
    start_of_last_episode(ring, &start);
    repair(ring);
    Writer again = exclusive(ring);
    again.roll_back(end_of_whole_episodes(ring));
    append_episode(again, 0, 99, 3);
    Writer shared(ring, true, true);
    append(shared, {0, 100, 0}, false);
  }
  EXPECT_GT(sampled, 300);
  EXPECT_GT(plausible, 300);
  EXPECT_LT(plausible, 2900);
}

}  // namespace
}  // namespace crpt::replay
