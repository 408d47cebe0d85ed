// The work that a plan names, cut into units by the plan alone.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <vector>

namespace chunks {

// An array of a plan, whose first axis is over windows.
struct Ints {
  const int32_t* data = nullptr;
  int64_t size = 0;  // numbers of one window

  const int32_t* of(int window) const { return data + window * size; }
};

// The arrays of `pallas_kernels.plans`; those of what is not there are null.
struct Items {
  Ints row_begin, row_count, chunk_begin, chunk_count, chunks, count;
};
struct Hidden {
  Ints size, sinks, begin, offset;
};
struct DecodePlan {
  Ints private_chunks, covered;
  const int32_t* lengths;
  Ints tile_chunks, tile_rows, tile_count;
  const int32_t* own_slots = nullptr;
  int64_t slots = 0;
};
struct PrefillPlan {
  const int32_t *tile_begin, *tile_count, *tile_position, *tile_sequence, *num_tiles;
  int64_t tiles;
  Ints tables, own_chunk;
  bool has_fresh;  // tokens of a query's own chunk are not read in the pool
};
struct Plan {
  int rows, windows;
  Items items;
  Hidden hidden;
};

// Some rows and what they read of chunks that follow one another. Places count these chunks' tokens.
struct Unit {
  int row = 0, rows = 1;          // one after another, unless there is a list
  const int32_t* list = nullptr;  // where a number may be no row
  const int32_t* chunks = nullptr;
  int64_t chunk_count = 0;
  int begin = 0, end = 0;               // places that are read
  int hidden = INT_MAX, opens = INT_MIN;  // but for those from `hidden` to before `opens`

  int own_slot = 0, own_end = 0;  // as many exact tokens of its own has the row
  int own_hidden = INT_MAX, own_opens = INT_MIN;

  // Each row sees what is up to its place, and `opens` is the first row's: it grows with each.
  bool causal = false;
  int place = 0;           // of the first row's token
  bool has_fresh = false;  // of the chunk that it lies in a row reads the call's new tokens,
  int fresh = 0;           // of which this many come before the one of place 0

  int64_t slot = 0;  // of the first row's first query among a head's partial results

  int tokens() const { return std::max(end - begin, 0) + std::max(own_end, 0); }

  // Some of its rows, of which the first is the `first`th.
  Unit of_rows(int first, int count) const {
    Unit some = *this;
    some.rows = count;
    if (list) {
      some.list += first;
    } else {
      some.row += first;
    }
    if (causal) {
      some.place += first;
      some.end = some.place + count;
      if (opens != INT_MIN) some.opens += first, some.own_opens += first;
    }
    return some;
  }
};

// The units of heads with one window, and which partial results each row merges, in what order.
class Units {
 public:
  static constexpr int MOST_QUERIES = 96;
  static constexpr int FEWEST_TOKENS = 256;  // of what is cut from more

  // Of units that are not `whole` none has more queries than `MOST_QUERIES`.
  Units(int rows, int group, int chunk_size, bool whole)
      : rows_(rows), group_(group), size_(chunk_size), whole_(whole) {}

  void add(const Unit& unit) {
    if (unit.rows <= 0 || unit.tokens() <= 0) return;
    int parts = whole_ ? 1 : (unit.rows * group_ + MOST_QUERIES - 1) / MOST_QUERIES;
    parts = std::min(parts, unit.rows);
    for (int part = 0; part < parts; part++) {
      int first = (int64_t)unit.rows * part / parts;
      int end = (int64_t)unit.rows * (part + 1) / parts;
      all.push_back(unit.of_rows(first, end - first));
    }
  }

  // What a unit takes: a token's reading by a query is 1, and by fewer than four as much as by four.
  double cost(const Unit& unit) const {
    return (double)std::max(unit.rows * group_, 4) * unit.tokens();
  }
  double cost() const {
    double total = 0;
    for (const Unit& unit : all) total += cost(unit);
    return total;
  }

  // Cuts units that cost more than `most`, puts those together that cost far less, and gives each row
  // its partial results.
  void finish(double most) {
    std::vector<Unit> whole;
    whole.swap(all);
    for (const Unit& unit : whole) cut(unit, most);
    for (Unit& unit : all) {
      unit.slot = slot_count;
      slot_count += (int64_t)unit.rows * group_;
    }
    batches.assign(1, 0);
    double batch = 0;
    for (size_t i = 0; i < all.size(); i++) {
      batch += cost(all[i]);
      if (batch * 8 < most && i + 1 < all.size()) continue;
      batches.push_back(i + 1);
      batch = 0;
    }
    begin.assign(rows_ + 1, 0);
    for_each_row([&](int row, int64_t) { begin[row + 1]++; });
    for (int row = 0; row < rows_; row++) begin[row + 1] += begin[row];
    slots.resize(begin[rows_]);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for_each_row([&](int row, int64_t slot) { slots[next[row]++] = slot; });
  }

  std::vector<Unit> all;
  std::vector<int64_t> batches;       // that one thread takes: batches[i] to before batches[i + 1]
  std::vector<int64_t> begin, slots;  // of row r: slots[begin[r]] to before slots[begin[r + 1]]
  int64_t slot_count = 0;

 private:
  void cut(const Unit& unit, double most) {
    int64_t chunks = (unit.end - unit.begin + size_ - 1) / size_;
    int64_t fewest = (FEWEST_TOKENS + size_ - 1) / size_;
    int64_t parts = std::min(chunks / fewest, (int64_t)(cost(unit) / most));
    if (unit.causal || parts < 2) {
      all.push_back(unit);
      return;
    }
    for (int64_t part = 0; part < parts; part++) {
      Unit some = unit;
      some.begin = unit.begin + (int)(chunks * part / parts) * size_;
      if (part + 1 < parts) {
        some.end = unit.begin + (int)(chunks * (part + 1) / parts) * size_;
        some.own_end = 0;
      }
      all.push_back(some);
    }
  }

  template <class What>
  void for_each_row(What what) const {
    for (const Unit& unit : all) {
      for (int i = 0; i < unit.rows; i++) {
        int row = unit.list ? unit.list[i] : unit.row + i;
        if (row >= 0 && row < rows_) what(row, unit.slot + (int64_t)i * group_);
      }
    }
  }

  int rows_, group_, size_;
  bool whole_;
};

// Nothing that a plan names may lie outside of its arrays, and no sum of its numbers overflow.
static inline int place_at(int64_t place) {
  return std::clamp<int64_t>(place, -(1 << 30), 1 << 30);
}

static inline void add_items(Units& units, const Plan& plan, int window, int chunk_size) {
  const Items& items = plan.items;
  const int32_t* chunks = items.chunks.of(window);
  int64_t count = std::min<int64_t>(*items.count.of(window), items.row_begin.size);
  for (int64_t i = 0; i < count; i++) {
    int64_t first = std::clamp<int64_t>(items.chunk_begin.of(window)[i], 0, items.chunks.size);
    int64_t number = std::clamp<int64_t>(items.chunk_count.of(window)[i], 0,
                                         std::min<int64_t>(items.chunks.size - first,
                                                           (1 << 29) / chunk_size));
    Unit unit;
    unit.row = std::clamp(items.row_begin.of(window)[i], 0, plan.rows);
    unit.rows = std::clamp(items.row_count.of(window)[i], 0, plan.rows - unit.row);
    unit.chunks = chunks + first;
    unit.chunk_count = number;
    unit.end = (int)number * chunk_size;
    units.add(unit);
  }
}

static inline void add_decoding(Units& units, const Plan& plan, const DecodePlan& decode, int window,
                                int chunk_size) {
  add_items(units, plan, window, chunk_size);
  if (decode.tile_count.data) {
    int64_t most = decode.tile_chunks.size, rows = most ? decode.tile_rows.size / most : 0;
    int64_t count = std::min<int64_t>(*decode.tile_count.of(window), most);
    for (int64_t tile = 0; tile < count; tile++) {
      Unit unit;
      unit.list = decode.tile_rows.of(window) + tile * rows;
      auto is_row = [&](int row) { return row >= 0 && row < plan.rows; };
      for (unit.rows = 0; unit.rows < rows && is_row(unit.list[unit.rows]);) unit.rows++;
      unit.chunks = decode.tile_chunks.of(window) + tile;
      unit.chunk_count = 1;
      unit.end = chunk_size;
      units.add(unit);
    }
  }
  int64_t columns = decode.private_chunks.size / std::max(plan.rows, 1);
  int64_t room = std::min<int64_t>(columns * chunk_size, 1 << 29);
  for (int row = 0; row < plan.rows; row++) {
    int length = place_at(decode.lengths[row]), in_pool = length;
    if (decode.own_slots) in_pool = std::max(length - 1, 0) / chunk_size * chunk_size;
    Unit unit;
    unit.row = row;
    unit.chunks = decode.private_chunks.of(window) + row * columns;
    unit.chunk_count = columns;
    unit.end = std::clamp<int64_t>((int64_t)in_pool - decode.covered.of(window)[row], 0, room);
    if (plan.hidden.size.data) {
      int64_t opens = (int64_t)length - *plan.hidden.size.of(window);
      unit.hidden = place_at(plan.hidden.begin.of(window)[row]);
      unit.opens = place_at(opens - plan.hidden.offset.of(window)[row]);
      unit.own_hidden = place_at((int64_t)*plan.hidden.sinks.of(window) - in_pool);
      unit.own_opens = place_at(opens - in_pool);
    }
    if (decode.own_slots && decode.slots > 0) {
      unit.own_slot = std::clamp<int64_t>(decode.own_slots[row], 0, decode.slots - 1);
      unit.own_end = length - in_pool;
    }
    units.add(unit);
  }
}

static inline void add_prefill(Units& units, const Plan& plan, const PrefillPlan& prefill,
                               int window, int chunk_size) {
  add_items(units, plan, window, chunk_size);
  int64_t sequences = prefill.own_chunk.size;
  int64_t columns = sequences ? prefill.tables.size / sequences : 0;
  int64_t room = std::min<int64_t>(columns * chunk_size, 1 << 29);
  int64_t count = std::min<int64_t>(*prefill.num_tiles, prefill.tiles);
  for (int64_t tile = 0; columns && tile < count; tile++) {
    int64_t sequence = std::clamp<int64_t>(prefill.tile_sequence[tile], 0, sequences - 1);
    Unit unit;
    unit.causal = true;
    unit.row = std::clamp(prefill.tile_begin[tile], 0, plan.rows);
    unit.rows = std::clamp<int64_t>(prefill.tile_count[tile], 0,
                                    std::min<int64_t>(plan.rows - unit.row, room));
    unit.place = std::clamp<int64_t>(prefill.tile_position[tile], 0, room - unit.rows);
    unit.chunks = prefill.tables.of(window) + sequence * columns;
    unit.chunk_count = columns;
    int64_t own_chunk = prefill.own_chunk.of(window)[sequence];
    unit.begin = std::clamp<int64_t>(own_chunk * chunk_size, 0, room);
    unit.end = unit.place + unit.rows;
    unit.has_fresh = prefill.has_fresh;
    unit.fresh = unit.row - unit.place;
    if (plan.hidden.size.data) {
      int64_t opens = (int64_t)unit.place + 1 - *plan.hidden.size.of(window);
      unit.hidden = place_at((int64_t)unit.begin + plan.hidden.begin.of(window)[sequence]);
      unit.opens = place_at(opens + unit.begin - plan.hidden.offset.of(window)[sequence]);
      unit.own_hidden = place_at(*plan.hidden.sinks.of(window));
      unit.own_opens = place_at(opens);
    }
    units.add(unit);
  }
}

}  // namespace chunks
