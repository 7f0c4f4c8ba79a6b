#include "replay/writer.h"

#include <cstring>

namespace crpt::replay {
namespace {

// Relaxed stores of n bytes, eight at a time where they are aligned: a reader may look on.
void store_bytes(void* to, const void* from, size_t n) {
  auto* out = static_cast<uint8_t*>(to);
  const auto* in = static_cast<const uint8_t*>(from);
  size_t i = 0;
  for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 8 != 0; ++i) store(out + i, in[i]);
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, in + i, 8);
    store(reinterpret_cast<uint64_t*>(out + i), word);
  }
  for (; i < n; ++i) store(out + i, in[i]);
}

template <typename T>
void store_values(T* to, const T* from, size_t n) {
  for (size_t i = 0; i < n; ++i) store(to + i, from == nullptr ? T{} : from[i]);
}

// Once the stamps are 0 and before a ticket comes again: whoever sees the new epoch no longer sees
// the old stamps, and whoever saw those sees another epoch beside the new fields.
void next_epoch(const Ring& ring) {
  store(ring.epoch, load(ring.epoch) + 1, std::memory_order_release);
}

// A ticket whose slot is ours.
bool claim(const Ring& ring, Ticket* ticket) {
  for (uint64_t attempt = 0; attempt < ring.capacity; ++attempt) {
    const Ticket t = std::atomic_ref<uint64_t>(*ring.head).fetch_add(1, std::memory_order_relaxed);
    std::atomic_ref<uint64_t> stamp(ring.stamps[ring.slot(t)]);
    uint64_t seen = stamp.load(std::memory_order_relaxed);
    if (is_busy(seen) || seen >= whole(t)) continue;
    if (stamp.compare_exchange_strong(seen, busy(t), std::memory_order_acquire,
                                      std::memory_order_relaxed)) {
      *ticket = t;
      return true;
    }
  }
  return false;
}

}  // namespace

Commit Writer::append(const Step& step) {
  Ticket t;
  if (shared_) {
    if (!claim(ring_, &t)) return Commit::no_slot;
  } else {
    t = load(ring_.head);
    if (!overwrites_ && t >= ring_.capacity) return Commit::full;
    store(ring_.stamps + ring_.slot(t), busy(t));
  }
  std::atomic_thread_fence(std::memory_order_release);
  write(t, step);
  store(ring_.stamps + ring_.slot(t), whole(t), std::memory_order_release);
  if (!shared_) store(ring_.head, t + 1, std::memory_order_release);
  newest_ = t;
  open_ = !step.last;
  return Commit::done;
}

void Writer::write(Ticket t, const Step& step) {
  const Ring& r = ring_;
  const uint64_t slot = r.slot(t);
  store(r.previous + slot, open_ ? newest_ : t);
  store(r.is_first + slot, static_cast<uint8_t>(!open_));
  store(r.is_last + slot, static_cast<uint8_t>(step.last));
  store(r.rewards + slot, step.reward);
  store(r.discounts + slot, step.discount);
  store_values(r.actions + slot * r.action_size, step.action, r.action_size);
  store_values(r.states + slot * r.state_size, step.state, r.state_size);
  store_bytes(r.frames + slot * r.frame_bytes, step.frame, r.frame_bytes);
}

void Writer::roll_back(Ticket step) {
  open_ = false;
  const Ticket head = load(ring_.head);
  if (step >= head) return;
  const Ticket oldest = ring_.oldest(head);
  for (Ticket t = head; t > (step > oldest ? step : oldest); --t) {
    store(ring_.stamps + ring_.slot(t - 1), uint64_t{0}, std::memory_order_release);
  }
  next_epoch(ring_);
  store(ring_.head, step, std::memory_order_release);
}

void repair(const Ring& ring) {
  const Ticket head = load(ring.head);
  const auto is_uncounted = [head](uint64_t stamp) { return !is_busy(stamp) && stamp > head; };
  bool rolls_back = false;
  for (uint64_t slot = 0; slot < ring.capacity; ++slot) {
    const uint64_t stamp = load(ring.stamps + slot);
    rolls_back |= is_uncounted(stamp);  // whole, and its ticket comes again
    if (is_busy(stamp) || is_uncounted(stamp)) store(ring.stamps + slot, uint64_t{0});
  }
  if (rolls_back) next_epoch(ring);
}

namespace {

// Follows the newest episode back from `newest`, as long as its steps lie side by side.
bool start_of_episode(const Ring& ring, Ticket newest, Ticket oldest, Ticket* start) {
  Ticket t = newest;
  while (load(ring.is_first + ring.slot(t)) == 0) {
    if (load(ring.previous + ring.slot(t)) != t - 1) return false;
    if (t == oldest || !is_whole(ring, t - 1)) break;  // the rest is overwritten
    --t;
  }
  *start = t;
  return true;
}

}  // namespace

Ticket end_of_whole_episodes(const Ring& ring) {
  const Ticket head = load(ring.head), oldest = ring.oldest(head);
  Ticket end = head;
  while (end > oldest && !is_whole(ring, end - 1)) --end;
  // Nothing is there. A ring that has not gone round starts anew.
  if (end == oldest) return oldest == 0 ? 0 : head;
  Ticket start;
  if (load(ring.is_last + ring.slot(end - 1)) != 0 ||
      !start_of_episode(ring, end - 1, oldest, &start)) {
    return end;
  }
  return start;
}

bool start_of_last_episode(const Ring& ring, Ticket* start) {
  const Ticket head = load(ring.head), oldest = ring.oldest(head);
  *start = head;
  if (head == oldest || !is_whole(ring, head - 1)) return true;
  return start_of_episode(ring, head - 1, oldest, start);
}

}  // namespace crpt::replay
