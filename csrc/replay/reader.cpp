#include "replay/reader.h"

#include <algorithm>

namespace crpt::replay {

bool follow(const Ring& ring, Ticket end, int64_t steps, int64_t length, Ticket* chain) {
  Ticket t = end;
  for (int64_t i = 0;; ++i) {
    if (!is_whole(ring, t)) return false;
    chain[i] = t;
    if (i + 1 == length) return true;
    const uint64_t slot = ring.slot(t);
    if (load(ring.is_first + slot) != 0) {
      if (i < steps) return false;
      std::fill(chain + i + 1, chain + length, t);
      return true;
    }
    const Ticket before = load(ring.previous + slot);
    // Strictly older, so that no chain goes round in a circle.
    if (before >= t || t - before >= ring.capacity) return false;
    t = before;
  }
}

bool still_whole(const Ring& ring, uint64_t epoch, const Ticket* chain, int64_t length) {
  std::atomic_thread_fence(std::memory_order_acquire);
  for (int64_t i = 0; i < length; ++i) {
    if (load(ring.stamps + ring.slot(chain[i])) != whole(chain[i])) return false;
  }
  return load(ring.epoch) == epoch;
}

std::vector<Ticket> transitions(const Ring& ring, int64_t steps, int64_t stack) {
  std::vector<Ticket> chain(static_cast<size_t>(steps + stack)), found;
  const int64_t length = steps + stack;
  const Ticket head = head_of(ring);
  for (Ticket t = ring.oldest(head); t < head; ++t) {
    const uint64_t epoch = epoch_of(ring);
    if (follow(ring, t, steps, length, chain.data()) &&
        still_whole(ring, epoch, chain.data(), length)) {
      found.push_back(t);
    }
  }
  return found;
}

void episodes(const Ring& ring, int64_t stack, std::vector<Ticket>* steps,
              std::vector<int64_t>* episode) {
  *steps = transitions(ring, 0, stack);
  episode->clear();
  episode->reserve(steps->size());
  std::vector<int64_t> of_slot(ring.capacity, -1);
  int64_t count = 0;
  for (const Ticket t : *steps) {
    const uint64_t slot = ring.slot(t);
    const Ticket before = load(ring.previous + slot);
    int64_t number = -1;
    if (load(ring.is_first + slot) == 0 && before < t && t - before < ring.capacity) {
      number = of_slot[ring.slot(before)];
    }
    if (number < 0) number = count++;
    of_slot[slot] = number;
    episode->push_back(number);
  }
}

uint64_t count_whole(const Ring& ring) {
  const Ticket head = head_of(ring);
  uint64_t count = 0;
  for (Ticket t = ring.oldest(head); t < head; ++t) count += is_whole(ring, t);
  return count;
}

bool is_plausible(const Ring& ring) {
  uint64_t newest = 0;
  bool stalled = false;
  for (uint64_t slot = 0; slot < ring.capacity; ++slot) {
    const uint64_t stamp = load(ring.stamps + slot, std::memory_order_acquire);
    newest = std::max(newest, count_of(stamp));
    stalled |= is_busy(stamp);
  }
  // After the stamps: a writer may be at work. An exclusive one counts a step after its stamp.
  const Ticket head = head_of(ring);
  if (head > kLastTicket || newest > head + 1) return false;
  // Shared writers lose a few tickets now and then, but not a lap of them without a stamp, unless
  // the ring is so small that all its slots are busy at once. A roll-back may leave none at all.
  constexpr uint64_t few_slots = 64;
  return stalled || newest == 0 || ring.capacity < few_slots ||
         head - std::min(head, newest) <= ring.capacity;
}

}  // namespace crpt::replay
