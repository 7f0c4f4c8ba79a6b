// Which steps of a ring can be read, and how they follow each other. The protocol: ring.h.
#pragma once

#include <vector>

#include "replay/ring.h"

namespace crpt::replay {

// The step `end` and those before it in its episode: chain[i] is i steps back, i in [0, length).
// The first step of the episode is repeated where fewer lie before it, but not within the `steps`
// newest: so a transition of n steps and its stacks of K frames is a chain of length n + K, steps
// n.
//
// false: a step is not whole, or the episode has no `steps` steps before `end`. What is_whole saw
// must be confirmed by still_whole once the fields have been read.
bool follow(const Ring& ring, Ticket end, int64_t steps, int64_t length, Ticket* chain);

// Whether fields read since follow() and epoch_of() are those of the chain's steps.
bool still_whole(const Ring& ring, uint64_t epoch, const Ticket* chain, int64_t length);

// Ends of all transitions of `steps` steps with whole stacks of `stack` frames, oldest first; of
// steps 0, all steps with whole stacks.
std::vector<Ticket> transitions(const Ring& ring, int64_t steps, int64_t stack);

// The steps with whole stacks, and the number of each one's episode: episodes are counted in the
// order of their oldest steps here. One whose first steps are lost is an episode like others.
void episodes(const Ring& ring, int64_t stack, std::vector<Ticket>* steps,
              std::vector<int64_t>* episode);

// Whole steps there are.
uint64_t count_whole(const Ring& ring);

// Whether head and stamps can be those of one ring, whatever was killed or is running.
bool is_plausible(const Ring& ring);

}  // namespace crpt::replay
