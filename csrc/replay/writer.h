// Appends steps to a ring, and puts in order what a killed writer left. The protocol: ring.h.
#pragma once

#include "replay/ring.h"

namespace crpt::replay {

struct Step {
  const uint8_t* frame;
  const float* action;  // null: zeros
  float reward;
  float discount;
  const double* state;  // null: zeros
  bool last;
};

enum class Commit {
  done,
  full,     // exclusive: every slot holds a step, and the writer is not to overwrite
  no_slot,  // shared: `capacity` tickets in a row led to slots of other writers, stalled or dead
};

// Appends one episode after another. Any number of shared writers, one exclusive one; each is used
// by one thread at a time.
class Writer {
 public:
  Writer(const Ring& ring, bool shared, bool overwrites)
      : ring_(ring), shared_(shared), overwrites_(overwrites) {}

  // The next step of the open episode, or the first one of a new episode.
  Commit append(const Step& step);

  // Shared: the end of writing; gives up tickets that were taken and not used. Whoever dies before
  // leaves them as gaps.
  void close() { give_up_tickets(); }

  bool is_open() const { return open_; }
  // The arrays have moved, or become longer or shorter.
  void move(const Ring& ring) { ring_ = ring; }
  const Ring& ring() const { return ring_; }
  // Exclusive: takes the steps from this ticket on away again, and with them the open episode.
  void roll_back(Ticket step);

 private:
  Ticket next_ticket();
  void give_up_tickets();
  void write(Ticket t, const Step& step);

  Ring ring_;
  bool shared_, overwrites_;
  bool open_ = false;
  Ticket newest_ = 0;          // of the open episode
  Ticket next_ = 0, end_ = 0;  // shared: tickets that are ours, not used yet
  uint64_t at_once_ = 1;       // tickets to take next time
};

// All below: only while no other writer has the domain open.

// Frees the slots in which a writer died, and those of steps that were never counted.
void repair(const Ring& ring);

// Where an exclusive writer goes on: after the newest whole step; if its episode was cut, before
// that episode, unless steps of other writers lie among its own.
Ticket end_of_whole_episodes(const Ring& ring);

// The first step of the newest episode, or the oldest one left of it. false: steps of others lie
// among its own.
bool start_of_last_episode(const Ring& ring, Ticket* start);

}  // namespace crpt::replay
