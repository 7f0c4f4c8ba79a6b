#include "replay/writer.h"

#include <algorithm>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace crpt::replay {
namespace {

// Streaming stores keep no order with others, not even by std::atomic's fences: this comes before
// and after them.
void streaming_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Relaxed stores of n bytes, eight at a time where they are aligned: a reader may look on. Whole
// lines go past the caches, for a ring is larger than those: so no line is read before it is
// overwritten, and none of the next frame's, which another core may be writing, is asked for ahead.
void store_frame(uint8_t* out, const uint8_t* in, size_t n) {
  size_t i = 0;
  const auto store_until = [&](size_t end) {
    for (; i < end && reinterpret_cast<uintptr_t>(out + i) % 8 != 0; ++i) store(out + i, in[i]);
    for (; i + 8 <= end; i += 8) {
      uint64_t word;
      std::memcpy(&word, in + i, 8);
      store(reinterpret_cast<uint64_t*>(out + i), word);
    }
    for (; i < end; ++i) store(out + i, in[i]);
  };
#if defined(__SSE2__)
  constexpr size_t line = 64;
  const size_t head = (line - reinterpret_cast<uintptr_t>(out) % line) % line;
  store_until(head < n ? head : n);
  for (; i + line <= n; i += line) {
    for (size_t j = i; j < i + line; j += sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j)));
    }
  }
#endif
  store_until(n);
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

// Makes the ticket's slot ours, unless another writer is in it or has written a newer step.
bool claim(const Ring& ring, Ticket t) {
  std::atomic_ref<uint64_t> stamp(ring.stamps[ring.slot(t)]);
  uint64_t seen = stamp.load(std::memory_order_relaxed);
  if (is_busy(seen) || seen >= whole(t)) return false;
  return stamp.compare_exchange_strong(seen, busy(t), std::memory_order_acquire,
                                       std::memory_order_relaxed);
}

}  // namespace

Ticket Writer::next_ticket() {
  const uint64_t most = std::clamp<uint64_t>(ring_.capacity / kShare, 1, kTicketsAtOnce);
  // Too old a ticket would be overwritten too soon, or lie a lap behind.
  if (next_ < end_ && load(ring_.head) - next_ > ring_.capacity / 2) give_up_tickets();
  if (next_ == end_) {
    const std::atomic_ref<uint64_t> head(*ring_.head);
    next_ = head.fetch_add(at_once_, std::memory_order_relaxed);
    const bool others_write = next_ != end_;
    end_ = next_ + at_once_;
    at_once_ = others_write ? std::min(2 * at_once_, most) : std::max<uint64_t>(at_once_ / 2, 1);
  }
  return next_++;
}

void Writer::give_up_tickets() {
  Ticket end = end_;
  // As if they had never been taken, where nobody has taken later ones.
  if (next_ < end && std::atomic_ref<uint64_t>(*ring_.head)
                         .compare_exchange_strong(end, next_, std::memory_order_relaxed)) {
    end_ = next_;
  }
  for (; next_ < end_; ++next_) {
    if (!claim(ring_, next_)) continue;
    std::atomic_thread_fence(std::memory_order_release);
    const uint64_t slot = ring_.slot(next_);
    store(ring_.previous + slot, given_up(next_));
    store(ring_.stamps + slot, uint64_t{0}, std::memory_order_release);
  }
}

Commit Writer::append(const Step& step) {
  Ticket t;
  if (shared_) {
    uint64_t attempts = 0;
    do {
      if (attempts++ == ring_.capacity) return Commit::no_slot;
      t = next_ticket();
    } while (!claim(ring_, t));
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
  streaming_fence();
  store_frame(r.frames + slot * r.frame_bytes, step.frame, r.frame_bytes);
  store(r.previous + slot, open_ ? newest_ : t);
  store(r.is_first + slot, static_cast<uint8_t>(!open_));
  store(r.is_last + slot, static_cast<uint8_t>(step.last));
  store(r.rewards + slot, step.reward);
  store(r.discounts + slot, step.discount);
  store_values(r.actions + slot * r.action_size, step.action, r.action_size);
  store_values(r.states + slot * r.state_size, step.state, r.state_size);
  streaming_fence();
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
