// Attention of rows to the chunks that a plan names, read where they lie.
//
// Each unit of work leaves what it found in memory of its own, and each row then merges what concerns
// it, in the order of the plan: so results are the same for any number of threads. The division into
// a phase by chunks and one by sequences is ChunkAttention's, arXiv 2402.15220, section 3.2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "codes.h"
#include "pools.h"
#include "tiles.h"
#include "units.h"
#include "workers.h"

namespace chunks {

struct Attention {
  int query_heads, kv_heads, dim;
  float scale;
  float softcap;                // 0 for none
  const float* queries;         // [rows, query_heads, dim]
  float* output;                // the same
  const int32_t* head_windows;  // [kv_heads], or null

  int group() const { return query_heads / kv_heads; }

  // What queries are multiplied by, and tangents of scores with a cap: see `capped`.
  float factor() const { return softcap > 0 ? scale / softcap : scale * LOG2_E; }
  float cap() const { return softcap * LOG2_E; }

  // A query's result is the same bits whatever else is in the call, and however the plan is cut.
  bool batch_invariant = false;

 private:
  static constexpr float LOG2_E = 1.44269504f;
};

// What one thread works with.
struct Scratch {
  std::vector<float> queries, scores, keys, values;
  std::vector<int32_t> lower, upper, opens;

  template <class T>
  static T* room(std::vector<T>& vector, int64_t size) {
    if ((int64_t)vector.size() < size) vector.resize(size);
    return vector.data();
  }

  static Scratch& here() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// Reads a unit's tokens for one head, in blocks, and attends to them; meanwhile the next block comes,
// and at the end the first of the unit that is next.
//
// Batch-invariant, blocks are those of a sequence, not of a unit; each query attends as if there
// were many; and the state is left to whoever reads on.
template <class Pool>
class Reader {
  using Element = typename Pool::Element;

 public:
  Reader(const Attention& call, const Pool& pool, const ExactTokens& exact, int head,
         const Unit& unit, const Unit* next, State state)
      : call_(call), pool_(pool), exact_(exact), head_(head), unit_(unit), next_(next),
        state_(state), width_(round_up(call.dim, LANES)), queries_(unit.rows * call.group()),
        many_(call.batch_invariant || unit.causal || queries_ > FewQueries::MOST) {
    in_place_ = Pool::IN_PLACE && width_ == call.dim && (std::is_same_v<Element, float> || !many_);
    if (!call.batch_invariant) state_.clear(queries_, width_);
    int64_t scores = many_ ? ManyQueries::scores_size(queries_) : queries_ * FewQueries::LD;
    scores_ = Scratch::room(scratch_.scores, scores);
    keys_ = Scratch::room(scratch_.keys, (int64_t)2 * BLOCK_TOKENS * width_);
    values_ = Scratch::room(scratch_.values, (int64_t)2 * BLOCK_TOKENS * width_);
    pack_queries();
  }

  void attend() {
    if (unit_.causal) return attend_causally();
    read_pool(unit_.begin, unit_.end, unit_.hidden, unit_.opens);
    if (call_.batch_invariant) finish();  // what is its own is no part of a block of the pool
    int64_t size = (int64_t)pool_.chunk_size * call_.dim;
    int64_t own = (head_ * exact_.slots + unit_.own_slot) * size;
    read_exact(own, call_.dim, 0, unit_.own_end, unit_.own_hidden, unit_.own_opens);
    finish();
  }

 private:
  void pack_queries() {
    const int group = call_.group();
    const float factor = call_.factor();
    int64_t size = many_ ? ManyQueries::packed_size(queries_, call_.dim)
                         : (int64_t)queries_ * width_;
    packed_ = Scratch::room(scratch_.queries, size);
    auto query_at = [&](int i) {
      int64_t row = unit_.list ? unit_.list[i / group] : unit_.row + i / group;
      int64_t at = row * call_.query_heads + head_ * group + i % group;
      return call_.queries + at * call_.dim;
    };
    if (many_) return ManyQueries::pack(query_at, factor, queries_, call_.dim, packed_);
    std::fill_n(packed_, size, 0.0f);
    for (int i = 0; i < queries_; i++) {
      const float* query = query_at(i);
      for (int d = 0; d < call_.dim; d++) packed_[i * width_ + d] = query[d] * factor;
    }
  }

  // The places from the unit's first on that all rows see are read as they are; others are masked.
  void attend_causally() {
    int last = unit_.place + unit_.rows, size = pool_.chunk_size;
    bool windowed = unit_.opens != INT_MIN;
    int64_t padded = round_up(queries_, LANES);
    int32_t* lower = Scratch::room(scratch_.lower, padded);
    int32_t* upper = Scratch::room(scratch_.upper, padded);
    int32_t* opens = Scratch::room(scratch_.opens, padded);
    auto look = [&](auto of_row) {
      std::fill_n(lower, padded, 0);
      std::fill_n(upper, padded, 0);
      std::fill_n(opens, padded, INT_MIN);
      for (int i = 0; i < queries_; i++) of_row(i, i / call_.group());
    };
    auto chunk_of = [&](int place) { return place / size * size; };
    int common = unit_.has_fresh ? chunk_of(unit_.place) : unit_.place + 1;
    if (call_.batch_invariant) common = chunk_of(common);
    int end = unit_.has_fresh ? chunk_of(last - 1) : last;
    look([&](int i, int row) {
      int place = unit_.place + row;
      upper[i] = unit_.has_fresh ? chunk_of(place) : place + 1;
      if (windowed) opens[i] = unit_.opens + row;
    });
    Sight sight{lower, upper, opens, unit_.hidden};
    if (!windowed) {
      read_pool(unit_.begin, common, INT_MAX, INT_MIN);
      finish();
    }
    sight_ = &sight;
    read_pool(windowed ? unit_.begin : std::max(unit_.begin, common), end, unit_.hidden,
              unit_.opens);
    finish();
    if (unit_.has_fresh) {
      look([&](int i, int row) {
        int place = unit_.place + row;
        lower[i] = chunk_of(place);
        upper[i] = place + 1;
        if (windowed) opens[i] = unit_.own_opens + row;
      });
      sight.hidden = unit_.own_hidden;
      int64_t stride = (int64_t)call_.kv_heads * call_.dim;
      int64_t at = unit_.fresh * stride + head_ * call_.dim;
      read_exact(at, stride, std::max(chunk_of(unit_.place), -unit_.fresh), last, INT_MAX, INT_MIN);
      finish();
    }
  }

  // Calls `read(begin, end)` for the places that are not hidden.
  template <class Read>
  static void unhidden(int begin, int end, int hidden, int opens, Read read) {
    if (opens <= hidden) return read(begin, end);
    read(begin, std::min(end, hidden));
    read(std::max(begin, opens), end);
  }

  void read_pool(int begin, int end, int hidden, int opens) {
    unhidden(begin, end, hidden, opens, [this](int place, int end) {
      for (int tokens; place < end; place += tokens) {
        int token = place % pool_.chunk_size;
        tokens = std::min({end - place, pool_.chunk_size - token, BLOCK_TOKENS});
        if (call_.batch_invariant) tokens = begin_block_of(place, tokens);
        make_room(tokens, in_place_);
        int64_t chunk = chunk_at(unit_, place);
        if (in_place_) {
          if constexpr (Pool::IN_PLACE) {
            int64_t at = pool_.place(head_, chunk, token);
            const Element *k = pool_.keys + at, *v = pool_.values + at;
            block_->there[block_->count++] = {k, v, pool_.dim, tokens, place};
          }
        } else {
          auto [k, v] = room_for_copies();
          pool_.read(head_, chunk, token, tokens, k, v, width_);
          block_->copied[block_->count++] = {k, v, width_, tokens, place};
        }
        block_->tokens += tokens;
      }
    });
  }

  // Where a unit begins to read, in a block's worth of pieces; none where it copies them.
  int first_pieces(const Unit& unit, Piece<Element>* pieces) const {
    int count = 0;
    if constexpr (Pool::IN_PLACE) {
      int end = std::min(unit.end, unit.begin + BLOCK_TOKENS);
      for (int place = unit.begin, tokens; place < end; place += tokens) {
        int token = place % pool_.chunk_size;
        tokens = std::min(end - place, pool_.chunk_size - token);
        int64_t at = pool_.place(head_, chunk_at(unit, place), token);
        pieces[count++] = {pool_.keys + at, pool_.values + at, pool_.dim, tokens, place};
      }
    }
    return count;
  }

  int64_t chunk_at(const Unit& unit, int place) const {
    int64_t index = std::min<int64_t>(place / pool_.chunk_size, unit.chunk_count - 1);
    return std::clamp<int64_t>(unit.chunks[index], 0, pool_.chunks - 1);
  }

  // Tokens beside the pool, of which the one at place 0 begins `at` elements into them.
  void read_exact(int64_t at, int64_t stride, int begin, int end, int hidden, int opens) {
    unhidden(begin, end, hidden, opens, [&](int place, int end) {
      for (int tokens; place < end; place += tokens) {
        tokens = std::min(end - place, BLOCK_TOKENS);
        if (call_.batch_invariant) tokens = begin_block_of(place, tokens);
        make_room(tokens, false);
        auto [k, v] = room_for_copies();
        exact_.read(at + place * stride, stride, tokens, call_.dim, k, v, width_);
        block_->copied[block_->count++] = {k, v, width_, tokens, place};
        block_->tokens += tokens;
      }
    });
  }

  // Has what comes begin another block, unless it lies in that of what came last: chunks are cut
  // into blocks alike wherever they are read. Returns how many of the tokens lie in it.
  int begin_block_of(int place, int tokens) {
    const int size = pool_.chunk_size, token = place % size;
    const int blocks = (size + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const int number = place / size * blocks + token / BLOCK_TOKENS;
    if (block_->count > 0 && block_->number != number) next_block();
    block_->number = number;
    return std::min({tokens, size - token, BLOCK_TOKENS - token % BLOCK_TOKENS});
  }

  // Pieces that are attended to together: all read where they lie, or all copied.
  struct Block {
    bool in_place = false;
    int tokens = 0, count = 0, number = 0;
    Piece<Element> there[BLOCK_TOKENS];
    Piece<float> copied[BLOCK_TOKENS];
  };

  std::pair<float*, float*> room_for_copies() {
    int64_t place = (int64_t)((block_ - blocks_) * BLOCK_TOKENS + block_->tokens) * width_;
    return {keys_ + place, values_ + place};
  }

  void make_room(int tokens, bool in_place) {
    bool fits = block_->tokens + tokens <= BLOCK_TOKENS;
    if (block_->count > 0 && (!fits || block_->in_place != in_place)) next_block();
    block_->in_place = in_place;
  }

  // Attends to the block before this one, while this one comes, and begins another.
  void next_block() {
    Block* before = block_ == blocks_ ? blocks_ + 1 : blocks_;
    attend(*before, *block_);
    before->count = before->tokens = 0;
    block_ = before;
  }

  // Attends to all that is there.
  void finish() {
    next_block();
    next_block();
  }

  void attend(const Block& block, const Block& next) {
    if (block.count == 0) return;
    Ahead ahead;
    auto expect = [&](auto& all) {
      int steps = all.steps(block.tokens);
      if (next.count == 0 && next_) {
        Piece<Element> first[BLOCK_TOKENS];
        ahead.begin(first, first_pieces(*next_, first), steps);
      } else if (next.in_place) {
        ahead.begin(next.there, next.count, steps);
      }
    };
    if (many_) {
      ManyQueries all(packed_, queries_, call_.dim, width_, call_.cap(), state_, scores_);
      expect(all);
      if constexpr (std::is_same_v<Element, float>) {
        const Piece<float>* pieces = block.in_place ? block.there : block.copied;
        all.attend(pieces, block.count, sight_, ahead);
      } else {
        all.attend(block.copied, block.count, sight_, ahead);
      }
    } else {
      FewQueries all(packed_, queries_, width_, call_.cap(), state_, scores_);
      expect(all);
      if (block.in_place) {
        all.attend(block.there, block.count, ahead);
      } else {
        all.attend(block.copied, block.count, ahead);
      }
    }
  }

  const Attention& call_;
  const Pool& pool_;
  const ExactTokens& exact_;
  const int64_t head_;
  const Unit& unit_;
  const Unit* const next_;
  State state_;
  const int width_, queries_;
  const bool many_;
  bool in_place_;
  Scratch& scratch_ = Scratch::here();
  float *packed_, *scores_, *keys_, *values_;
  const Sight* sight_ = nullptr;
  Block blocks_[2], *block_ = blocks_;
};

// The partial results of one head: an output, a largest score, and a sum of weights in each slot.
struct Partials {
  float *output, *maximum, *total;
  int64_t width;

  State at(int64_t slot) const {
    return {output + slot * width, maximum + slot, total + slot};
  }

  // Of several slots, in order; zeros where there was nothing to see.
  void merge(const int64_t* slots, int64_t count, int64_t query, int dim, float* to) const {
    float most = MASKED, sum = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, maximum[slots[i] + query]);
    float* weights = Scratch::room(Scratch::here().scores, count);
    for (int64_t i = 0; i < count; i++) {
      weights[i] = power_of_two(maximum[slots[i] + query] - most);
      sum += total[slots[i] + query] * weights[i];
    }
    const float by = sum == 0 ? 0 : 1 / sum;
    for (int d = 0; d < dim; d += LANES) {
      Vec merged = {};
      for (int64_t i = 0; i < count; i++)
        merged += load(output + (slots[i] + query) * width + d) * weights[i];
      merged *= by;
      std::memcpy(to + d, &merged, std::min(dim - d, LANES) * sizeof(float));
    }
  }
};

constexpr int CUT_INTO = 128;      // as many units and more, where there is enough to read
constexpr double ALONE = 1 << 18;  // products that take less time than waking a thread
constexpr int64_t MERGE_ROWS = 8;  // of a task
constexpr int64_t TASKS = 3;       // of a thread, where rows are taken together

// Which of the units each head has.
static inline std::vector<int> windows_of(const Attention& call, int windows) {
  std::vector<int> window_of(call.kv_heads, 0);
  for (int head = 0; call.head_windows && head < call.kv_heads; head++)
    window_of[head] = std::clamp(call.head_windows[head], 0, windows - 1);
  return window_of;
}

// Fills `call.output`, of the plan of each window, batch-invariant. A row reads one unit after
// another, in the order of the plan, which is that of its sequence, and goes on from what it found.
template <class Pool>
void attend_in_order(const Attention& call, int rows, const std::vector<Units>& units,
                     const Pool& pool, const ExactTokens& exact, int64_t threads,
                     const Schedule& schedule) {
  static Buffers buffers;
  const int group = call.group(), width = round_up(call.dim, LANES);
  const std::vector<int> window_of = windows_of(call, units.size());
  int64_t together = std::max(1, Units::MOST_QUERIES / group);
  auto blocks_of = [&] { return (rows + together - 1) / together; };
  while (blocks_of() * call.kv_heads < TASKS * threads && together > 1)
    together = (together + 1) / 2;
  const int64_t blocks = blocks_of();
  auto attend_rows = [&](int64_t task) {
    const int head = task / blocks, begin = task % blocks * together;
    const int count = std::min<int64_t>(together, rows - begin);
    const int64_t queries = (int64_t)count * group;
    std::vector<float> buffer = buffers.take(queries * (width + 2));
    float* data = buffer.data();
    Partials found{data, data + queries * width, data + queries * (width + 1), width};
    found.at(0).clear(queries, width);
    auto attend_unit = [&](const Unit& unit, int row) {
      const State state = found.at((int64_t)(row - begin) * group);
      Reader(call, pool, exact, head, unit, nullptr, state).attend();
    };
    for (const Unit& unit : units[window_of[head]].all) {
      for (int i = 0; unit.list && i < unit.rows; i++) {
        const int row = unit.list[i];
        if (row >= begin && row < begin + count) attend_unit(unit.of_rows(i, 1), row);
      }
      if (unit.list) continue;
      const int first = std::max(begin, unit.row);
      const int end = std::min(begin + count, unit.row + unit.rows);
      if (first < end) attend_unit(unit.of_rows(first - unit.row, end - first), first);
    }
    for (int64_t slot = 0; slot < queries; slot++) {
      int64_t query = (begin + slot / group) * call.query_heads + head * group + slot % group;
      found.merge(&slot, 1, 0, call.dim, call.output + query * call.dim);
    }
    buffers.give_back(std::move(buffer));
  };
  run_tasks(blocks * call.kv_heads, threads - 1, schedule, attend_rows);
}

// Fills `call.output`, of the plan of each window.
template <class Pool>
void attend(const Attention& call, int rows, std::vector<Units>& units, const Pool& pool,
            const ExactTokens& exact, int64_t threads, const Schedule& schedule) {
  if (call.batch_invariant)
    return attend_in_order(call, rows, units, pool, exact, threads, schedule);
  static Buffers buffers;
  const int group = call.group(), width = round_up(call.dim, LANES);
  const std::vector<int> window_of = windows_of(call, units.size());
  double cost = 0;
  for (int head = 0; head < call.kv_heads; head++) cost += units[window_of[head]].cost();
  for (Units& of_window : units) of_window.finish(std::max(cost / CUT_INTO, 1.0));

  std::vector<int64_t> first_task(call.kv_heads + 1, 0), first_slot(call.kv_heads + 1, 0);
  for (int head = 0; head < call.kv_heads; head++) {
    const Units& of_head = units[window_of[head]];
    first_task[head + 1] = first_task[head] + of_head.batches.size() - 1;
    first_slot[head + 1] = first_slot[head] + of_head.slot_count;
  }
  const int64_t slots = first_slot.back(), blocks = (rows + MERGE_ROWS - 1) / MERGE_ROWS;
  std::vector<float> buffer = buffers.take(slots * (width + 2));
  float* data = buffer.data();
  auto partials_of = [&](int head) {
    int64_t first = first_slot[head];
    return Partials{data + first * width, data + slots * width + first,
                    data + slots * (width + 1) + first, width};
  };

  auto attend_batch = [&](int64_t task) {
    auto after = std::upper_bound(first_task.begin(), first_task.end(), task);
    const int head = after - first_task.begin() - 1;
    const Units& of_head = units[window_of[head]];
    const int64_t* batch = &of_head.batches[task - first_task[head]];
    const Unit *unit = &of_head.all[batch[0]], *end = of_head.all.data() + batch[1];
    for (; unit < end; unit++) {
      const Unit* next = unit + 1 < end ? unit + 1 : nullptr;
      Reader(call, pool, exact, head, *unit, next, partials_of(head).at(unit->slot)).attend();
    }
  };
  auto merge_rows = [&](int64_t task) {
    int head = task / blocks;
    Partials partials = partials_of(head);
    const Units& of_head = units[window_of[head]];
    int64_t first = task % blocks * MERGE_ROWS;
    for (int64_t row = first; row < std::min<int64_t>(first + MERGE_ROWS, rows); row++) {
      const int64_t* of_row = of_head.slots.data() + of_head.begin[row];
      int64_t count = of_head.begin[row + 1] - of_head.begin[row];
      for (int g = 0; g < group; g++) {
        int64_t query = row * call.query_heads + head * group + g;
        partials.merge(of_row, count, g, call.dim, call.output + query * call.dim);
      }
    }
  };
  int64_t helpers = cost * call.dim < ALONE ? 0 : threads - 1;
  helpers = std::min(helpers, first_task.back() - 1);
  run_tasks(first_task.back(), blocks * call.kv_heads, helpers, schedule, attend_batch, merge_rows);
  buffers.give_back(std::move(buffer));
}

}  // namespace chunks
