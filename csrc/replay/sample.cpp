#include "replay/sample.h"

#include <new>
#include <vector>

#include "kernels/frame_stack.h"
#include "replay/random.h"
#include "replay/reader.h"

namespace crpt::replay {
namespace {

constexpr int64_t kChunk = 8;     // rows whose frames stay in a core's cache for the second stack
constexpr uint64_t kDraws = 128;  // per row, before all transitions are listed
constexpr int64_t kReadings = 1000;  // of a row that writers overwrite while it is read
constexpr uint64_t kShiftDraw = uint64_t{1} << 32;  // draws of shifts, apart from those of steps

enum class Row : uint8_t { done, rejected, overrun };

class Sampler {
 public:
  Sampler(const Ring& ring, const SampleArgs& args)
      : ring_(ring),
        args_(args),
        length_(args.n_step + args.stack),
        tickets_(static_cast<size_t>(args.batch * length_)),
        epochs_(static_cast<size_t>(args.batch)),
        rows_(static_cast<size_t>(args.batch), Row::rejected),
        obs_index_(static_cast<size_t>(args.batch * args.stack)),
        next_index_(obs_index_.size()),
        shifts_(static_cast<size_t>(4 * args.batch)) {}

  SampleResult run() {
    draw_shifts();
    const int64_t chunks = (args_.batch + kChunk - 1) / kChunk;
    run_parallel(
        chunks, args_.threads,
        [](const void* self, int64_t chunk) {
          // The rows of a chunk belong to the thread that has it.
          const_cast<Sampler*>(static_cast<const Sampler*>(self))->run_chunk(chunk * kChunk);
        },
        this);
    if (load(&no_memory_) != 0) return {SampleResult::no_memory};
    const SampleResult result = run_stragglers();
    if (result.status == SampleResult::done) copy_indices();
    return result;
  }

 private:
  void run_chunk(int64_t begin) noexcept {
    const int64_t end = begin + kChunk < args_.batch ? begin + kChunk : args_.batch;
    try {
      for (int64_t row = begin; row < end; ++row) draw(row);
      // Runs of rows that were found: nearly always the whole chunk.
      for (int64_t row = begin; row < end;) {
        int64_t stop = row;
        while (stop < end && rows_[at(stop)] == Row::done) ++stop;
        gather(row, stop);
        row = stop + 1;
      }
      for (int64_t row = begin; row < end; ++row) {
        if (rows_[at(row)] == Row::done && !confirmed(row)) read_again(row);
      }
    } catch (const std::bad_alloc&) {
      store(&no_memory_, uint8_t{1});
    }
  }

  // A row that a writer overwrote while it was read.
  void read_again(int64_t row) {
    for (int64_t reading = 0; reading < kReadings; ++reading) {
      draw(row, static_cast<uint64_t>(reading + 1) * kDraws);
      if (rows_[at(row)] != Row::done) return;
      gather(row, row + 1);
      if (confirmed(row)) return;
    }
    rows_[at(row)] = Row::overrun;
  }

  // Rows for which no transition was met by chance: drawn from the list of all there are.
  SampleResult run_stragglers() {
    for (int64_t row = 0; row < args_.batch; ++row) {
      if (rows_[at(row)] == Row::rejected && args_.slots != nullptr) {
        return {SampleResult::not_whole, row};
      }
      if (rows_[at(row)] == Row::rejected) {
        for (int64_t reading = 0; reading < kReadings && rows_[at(row)] != Row::done; ++reading) {
          if (reading == 0 || !listed_) list_transitions();
          if (list_.empty()) return {SampleResult::empty, row};
          const uint64_t word =
              random_word(args_.seed, number(row), (kReadings + 2) * kDraws + at(reading));
          if (!take(row, list_[below(word, list_.size())])) {
            listed_ = false;
            continue;
          }
          gather(row, row + 1);
          if (!confirmed(row)) {
            rows_[at(row)] = Row::rejected;
            listed_ = false;
          }
        }
      }
      if (rows_[at(row)] != Row::done) return {SampleResult::overrun, row};
    }
    return {SampleResult::done};
  }

  void list_transitions() {
    if (!listed_) list_ = transitions(ring_, args_.n_step, args_.stack);
    listed_ = true;
  }

  // Finds the row's transition; rows_[row] says whether it did.
  void draw(int64_t row, uint64_t first_draw = 0) {
    rows_[at(row)] = Row::rejected;
    if (args_.slots != nullptr) {
      const uint64_t slot = static_cast<uint64_t>(load(args_.slots + row));  // read once
      if (slot >= ring_.capacity) return;
      // Neither in one whose step is being overwritten, nor in one never counted.
      const uint64_t stamp = load(ring_.stamps + slot, std::memory_order_acquire);
      const bool there = stamp != 0 && !is_busy(stamp) && stamp <= head_of(ring_);
      if (there && ring_.slot(stamp - 1) == slot) take(row, stamp - 1);
      return;
    }
    for (uint64_t i = 0; i < kDraws; ++i) {
      const Ticket head = head_of(ring_), oldest = ring_.oldest(head);
      if (head == 0) return;
      const uint64_t word = random_word(args_.seed, number(row), first_draw + i);
      if (take(row, oldest + below(word, head - oldest))) return;
    }
  }

  // The row's transition ends in step `end`, if there is one: its scalars and the slots of its
  // frames.
  bool take(int64_t row, Ticket end) {
    Ticket* chain = tickets_.data() + row * length_;
    epochs_[at(row)] = epoch_of(ring_);
    if (!follow(ring_, end, args_.n_step, length_, chain)) return false;
    const int64_t n = args_.n_step, stack = args_.stack;
    for (int64_t k = 0; k < stack; ++k) {
      const int64_t place = row * stack + stack - 1 - k;  // the newest frame comes last
      next_index_[at(place)] = static_cast<int64_t>(ring_.slot(chain[k]));
      obs_index_[at(place)] = static_cast<int64_t>(ring_.slot(chain[n + k]));
    }
    if (args_.action != nullptr && n > 0) {
      const float* action = ring_.actions + ring_.slot(chain[n - 1]) * ring_.action_size;
      float* out = args_.action + row * args_.action_stride;
      for (size_t i = 0; i < ring_.action_size; ++i) out[i] = load(action + i);
      double reward = 0, discount = 1;
      for (int64_t i = n - 1; i >= 0; --i) {
        const uint64_t slot = ring_.slot(chain[i]);
        reward += discount * static_cast<double>(load(ring_.rewards + slot));
        discount *= args_.gamma * static_cast<double>(load(ring_.discounts + slot));
      }
      args_.reward[row] = static_cast<float>(reward);
      args_.discount[row] = static_cast<float>(discount);
    }
    rows_[at(row)] = Row::done;
    return true;
  }

  bool confirmed(int64_t row) const {
    return still_whole(ring_, epochs_[at(row)], tickets_.data() + row * length_, length_);
  }

  void gather(int64_t begin, int64_t end) const {
    if (end <= begin) return;
    gather_into(args_.obs, obs_index_.data(), shifts_.data(), begin, end);
    gather_into(args_.next_obs, next_index_.data(), shifts_.data() + 2 * args_.batch, begin, end);
  }

  void gather_into(void* out, const int64_t* index, const int64_t* shifts, int64_t begin,
                   int64_t end) const {
    if (out == nullptr) return;
    const SampleArgs& a = args_;
    const int64_t pixels = a.height * a.width;
    const int64_t row_bytes = a.stack * a.channels * pixels * a.out_bytes;
    frame_stack({.frames = ring_.frames,
                 .stride_n = a.channels * pixels,
                 .stride_c = pixels,
                 .stride_h = a.width,
                 .stride_w = 1,
                 .index = index + begin * a.stack,
                 .shifts = a.pad > 0 ? shifts + 2 * begin : nullptr,
                 .out = static_cast<char*>(out) + begin * row_bytes,
                 .out_bytes = a.out_bytes,
                 .dtype = a.dtype,
                 .frame_count = static_cast<int64_t>(ring_.capacity),
                 .batch = end - begin,
                 .stack = a.stack,
                 .channels = a.channels,
                 .height = a.height,
                 .width = a.width,
                 .pad = a.pad,
                 .threads = 1,
                 .whole_bytes = a.batch * row_bytes});
  }

  void draw_shifts() {
    const uint64_t sides = 2 * static_cast<uint64_t>(args_.pad) + 1;
    for (int64_t row = 0; row < args_.batch; ++row) {
      for (int64_t i = 0; i < 4; ++i) {  // dy, dx of obs; dy, dx of next_obs
        const uint64_t word = random_word(args_.seed, number(row), kShiftDraw + at(i));
        shifts_[at(i / 2 * 2 * args_.batch + 2 * row + i % 2)] =
            static_cast<int64_t>(below(word, sides)) - args_.pad;
      }
    }
  }

  void copy_indices() const {
    const auto copy = [](const std::vector<int64_t>& from, int64_t* to) {
      for (size_t i = 0; to != nullptr && i < from.size(); ++i) to[i] = from[i];
    };
    copy(obs_index_, args_.obs_index);
    copy(next_index_, args_.next_index);
    copy(shifts_, args_.shifts);
  }

  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  uint64_t number(int64_t row) const { return static_cast<uint64_t>(args_.first_row + row); }

  const Ring& ring_;
  const SampleArgs& args_;
  const int64_t length_;
  std::vector<Ticket> tickets_;  // [B, n + K]
  std::vector<uint64_t> epochs_;
  std::vector<Row> rows_;
  std::vector<int64_t> obs_index_, next_index_;  // [B, K]
  std::vector<int64_t> shifts_;                  // [2, B, 2]
  std::vector<Ticket> list_;
  bool listed_ = false;
  uint8_t no_memory_ = 0;
};

}  // namespace

SampleResult sample(const Ring& ring, const SampleArgs& args) {
  try {
    return Sampler(ring, args).run();
  } catch (const std::bad_alloc&) {
    return {SampleResult::no_memory};
  }
}

}  // namespace crpt::replay
