#include <algorithm>

#include "replay_ring.h"

namespace crpt::replay {
namespace {

using namespace testing;

// Tickets below head, in three classes.
struct Tickets {
  uint64_t whole = 0, given_up = 0, lost = 0;
  explicit Tickets(const Ring& ring) {
    const Ticket head = head_of(ring);
    for (Ticket t = ring.oldest(head); t < head; ++t) {
      const uint64_t slot = ring.slot(t);
      const bool gone = ring.stamps[slot] == 0 && ring.previous[slot] == replay::given_up(t);
      ++(is_whole(ring, t) ? whole : gone ? given_up : lost);
    }
  }
};

TEST(ReplayTickets, OneSharedWriterTakesNoTicketInAdvance) {
  Arrays arrays(4096);
  Writer writer(arrays.ring(), true, true);
  append_episode(writer, 0, 0, 100);
  EXPECT_EQ(arrays.head, 101u);
}

TEST(ReplayTickets, WritersSideBySideTakeTicketsInAdvanceAndGiveUpTheRest) {
  for (const uint64_t capacity : {4096, 100}) {  // not round yet, and round
    Arrays arrays(capacity);
    const Ring ring = arrays.ring();
    Writer a(ring, true, true), b(ring, true, true);
    for (uint64_t step = 0; step < 200; ++step) {
      append(a, {0, 0, step}, false);
      append(b, {1, 0, step}, false);
    }
    Writer* const writers[] = {&a, &b};
    const bool in_advance = arrays.head > 400;
    EXPECT_EQ(in_advance, capacity == 4096) << "a small ring has none to spare";
    for (Writer* writer : writers) writer->close();
    const Tickets tickets(ring);
    EXPECT_EQ(tickets.whole, std::min<uint64_t>(400, capacity));
    EXPECT_EQ(tickets.lost, 0u);
    EXPECT_EQ(arrays.head, capacity == 4096 ? 400 + tickets.given_up : 400);
    EXPECT_LT(tickets.given_up, 2 * kTicketsAtOnce);
    for (Writer* writer : writers) writer->close();  // nothing more
    EXPECT_EQ(Tickets(ring).given_up, tickets.given_up);
    Drawn drawn(64, 3, 1);
    ASSERT_EQ(drawn.sample(ring, 1).status, SampleResult::done);
    drawn.expect_whole();
    EXPECT_TRUE(is_plausible(ring));
    append_episode(a, 0, 1, 3);  // a writer may go on after it
    a.close();
    EXPECT_EQ(Tickets(ring).lost, 0u);
  }
}

TEST(ReplayTickets, ASlowWriterUsesNoOldTickets) {
  Arrays arrays(2048);
  const Ring ring = arrays.ring();
  Writer slow(ring, true, true), fast(ring, true, true);
  for (uint64_t step = 0; step < 300; ++step) {
    append(slow, {0, 0, step}, false);
    append(fast, {1, 0, step}, false);
  }
  for (const uint64_t ahead : {1000, 1100, 2000, 2048, 5000}) {
    for (uint64_t step = 0; step < ahead; ++step) append(fast, {1, 1, step}, false);
    const Ticket oldest_used = arrays.head - 1024 - kTicketsAtOnce;
    append(slow, {0, 1, 0}, false);
    const auto written = std::max_element(arrays.stamps.begin(), arrays.stamps.end());
    EXPECT_GE(*written, oldest_used);
    const Identity id{0, 1, 0};
    const auto is_it = [&](Ticket t) {
      return is_whole(ring, t) && arrays.frames[ring.slot(t) * kWords] == id.word();
    };
    Ticket t = arrays.head - 1;
    while (t > oldest_used && !is_it(t)) --t;
    EXPECT_TRUE(is_it(t)) << ahead << " steps later its step is not among the newer half";
    arrays.frames[ring.slot(t) * kWords] = 0;
  }
}

}  // namespace
}  // namespace crpt::replay
