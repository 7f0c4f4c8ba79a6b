// One domain's ring of steps, in arrays that threads and processes share.
//
// Every step has a ticket, its number. The step with ticket t lies in slot t % capacity of every
// array. Three kinds of words, each an aligned 8-byte atomic, say what can be relied on:
//
//   head      tickets handed out: no step with this ticket or a later one exists
//   stamps    per slot, which step lies there: 0 none; busy(t) while t is being written; whole(t)
//   epoch     roll-backs, the only event that makes a ticket come twice
//
// Writing. Shared writers: any number, in any threads and processes. Exclusive writer: the only
// one. The file lock that keeps the two kinds apart is taken when a writer opens, never by a write.
//
//   1  shared: t = the next of those taken by head.fetch_add(n), relaxed; exclusive: t = head
//   2  stamps[slot]: older whole(.) or 0 -> busy(t), by one CAS, acquire. The acquire pairs
//      with 5 of the step that is overwritten, so that its stores and ours do not mix. Where the
//      slot is still busy (its writer stalled or died a lap ago) or newer than t (we stalled),
//      ticket t stays without a step, and the writer takes the next one. Exclusive: a store.
//   3  fence, release
//   4  the fields, relaxed; frames by streaming stores between two fences of their own
//   5  stamps[slot] = whole(t), release
//   6  exclusive: head = t + 1, release. So what lies before it is whole: the commit word.
//
// A shared writer takes one ticket at a time while it is alone, and up to 32 where others write,
// too: steps side by side then come from one core, and the lines of small fields, in which many
// slots lie, do not go to and fro. It never uses a ticket more than half a lap old. Tickets that it
// gives up, then or when it closes, go back if they are the newest; otherwise their slots, claimed
// by 2, get previous = given_up(t) and stamp 0, so that nobody takes them for steps that were lost.
//
// Reading. Any number of threads and processes, at the same time as writers; readers never write.
//
//   1  e = epoch, acquire; a ticket t below head
//   2  stamps[slot] == whole(t), acquire: pairs with 5, so the fields are those of t or of a
//      later step
//   3  the fields: scalars relaxed, frames by the plain loads of a vectorised kernel
//   4  fence, acquire: pairs with 3 of a later writer. Whoever read one of its fields sees its
//      busy(.) now, and the epoch of the roll-back before it
//   5  stamps[slot] == whole(t) and epoch == e, relaxed; otherwise what was read is thrown away
//
// The plain loads of frames race with the stores of a writer that overwrites them, as in every
// seqlock: the result is then thrown away, and no value read from a frame is used as an index.
//
// Rolling back to ticket s (exclusive writer): stamps of tickets >= s to 0, newest first; epoch +
// 1, release; head = s, release. The epoch changes after the stamps and before a ticket comes
// again: a reader that has the new epoch sees no old stamp, and one that saw an old stamp has the
// old epoch and finds the new one beside the fields that were written since. A writer killed on the
// way leaves a tail that is not whole, and the next exclusive writer begins again; before a shared
// one the tail stays as a gap. A writer killed between 5 and 6 leaves a step that is whole and not
// counted: the next one to open rolls it back.
//
// Progress. Exclusive append: wait-free. Shared append: wait-free where fetch_add is (x86-64,
// ARMv8.1; lock-free elsewhere): at most `capacity` tickets, then it fails. A writer that dies
// costs one slot, until a writer opens while no other has the domain open, and for a lap those of
// the tickets that it had taken. Sample: lock-free; a row is read again only if a writer overwrote
// it meanwhile, and after a bounded number of times the sample fails. Rolling back, repairing and
// growing: by the one exclusive writer, and no reader waits for them.
//
// The arrays may come from anybody. Every ticket read from them is checked before it leads
// anywhere.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace crpt::replay {

using Ticket = uint64_t;

constexpr uint64_t kBusy = uint64_t{1} << 63;
// Far from where whole(t) would look busy.
constexpr Ticket kLastTicket = uint64_t{1} << 62;

constexpr uint64_t whole(Ticket t) { return t + 1; }
constexpr uint64_t busy(Ticket t) { return kBusy | (t + 1); }
constexpr bool is_busy(uint64_t stamp) { return (stamp & kBusy) != 0; }
// One more than the ticket; 0: none.
constexpr uint64_t count_of(uint64_t stamp) { return stamp & ~kBusy; }
// In `previous`, no ticket at all.
constexpr uint64_t given_up(Ticket t) { return ~t; }

// Tickets that a shared writer takes at once where others write: four lines of stamps. But no more
// than this part of the ring.
constexpr uint64_t kTicketsAtOnce = 32, kShare = 64;

static_assert(sizeof(uint64_t) == 8 && sizeof(float) == 4 && sizeof(double) == 8);
static_assert(std::atomic_ref<uint64_t>::is_always_lock_free);
static_assert(std::atomic_ref<uint64_t>::required_alignment == 8);
static_assert(std::atomic_ref<float>::is_always_lock_free);
static_assert(std::atomic_ref<uint8_t>::is_always_lock_free);
static_assert(count_of(busy(5)) == whole(5) && is_busy(busy(0)) && !is_busy(whole(kLastTicket)));

struct Ring {
  uint64_t* head;
  uint64_t* epoch;
  uint64_t* stamps;    // [capacity]
  uint64_t* previous;  // [capacity]: ticket of the step before in its episode; its own for a first
  uint8_t* frames;     // [capacity, frame_bytes]
  float* actions;      // [capacity, action_size]
  float* rewards;
  float* discounts;
  uint8_t* is_first;
  uint8_t* is_last;
  double* states;  // [capacity, state_size]
  uint64_t capacity;
  size_t frame_bytes, action_size, state_size;

  uint64_t slot(Ticket t) const { return t % capacity; }
  // The oldest ticket whose slot no later one has taken.
  Ticket oldest(Ticket end) const { return end > capacity ? end - capacity : 0; }
};

// Loads work on memory that is mapped read-only, too: at these sizes they are plain instructions.
template <typename T>
T load(const T* word, std::memory_order order = std::memory_order_relaxed) {
  return std::atomic_ref<T>(*const_cast<T*>(word)).load(order);
}
template <typename T>
void store(T* word, T value, std::memory_order order = std::memory_order_relaxed) {
  std::atomic_ref<T>(*word).store(value, order);
}

inline Ticket head_of(const Ring& ring) { return load(ring.head, std::memory_order_acquire); }
inline uint64_t epoch_of(const Ring& ring) { return load(ring.epoch, std::memory_order_acquire); }
inline bool is_whole(const Ring& ring, Ticket t) {
  return load(ring.stamps + ring.slot(t), std::memory_order_acquire) == whole(t);
}

}  // namespace crpt::replay
