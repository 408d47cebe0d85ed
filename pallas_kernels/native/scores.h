// How well chunks score for queries that choose what they read: `pallas_kernels.selection.scoring`.
//
// What is found for a query depends on no other: products with codes are sums of integers, and the
// rest is computed for each query in a lane of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "codes.h"
#include "tiles.h"
#include "units.h"
#include "vectors.h"
#include "workers.h"

namespace chunks {

// The arrays of `pallas_kernels.selection.asking`, of which none has another number than it should.
struct Asking {
  int64_t queries, columns, sequences;
  int query_heads, kv_heads, dim;
  float factor, cap;                           // as of `Attention`
  const float* q;                              // [queries, query_heads, dim]
  const int32_t *chunk, *own_column, *table;   // [queries]
  const int32_t* tables;                       // [sequences, columns]
  Items items;
  const int32_t* item_column;
  float* shares;  // [queries, query_heads, columns]

  int group() const { return query_heads / kv_heads; }
  float* of(int64_t query, int64_t head) const {
    return shares + (query * query_heads + head) * columns;
  }
};

// Some queries of one KV head, in lanes: query `i` of them is that of head `i % group` of the asking
// query `first + i / group`.
struct Lanes {
  int count = 0, vectors = 0, dim = 0;
  std::vector<float> numbers;  // [dim, vectors * LANES]
  std::vector<float> largest;  // of each
  std::vector<float*> to;      // the columns of each

  // A vector of them, of which each channel is a stride behind the one before.
  const float* of(int vector) const { return numbers.data() + vector * LANES; }
  int64_t stride() const { return vectors * LANES; }

  void pack(const Asking& asking, int head, int64_t first, int64_t queries) {
    const int group = asking.group();
    count = queries * group;
    dim = asking.dim;
    vectors = (count + LANES - 1) / LANES;
    numbers.resize((int64_t)dim * vectors * LANES);
    largest.resize(vectors * LANES);
    auto query_at = [&](int i) {
      const int64_t query = first + i / group;
      return asking.q + (query * asking.query_heads + head * group + i % group) * dim;
    };
    for (int vector = 0; vector < vectors; vector++) {
      const int lane = vector * LANES;
      float* of_vector = numbers.data() + lane;
      put_side_by_side(std::min(count - lane, LANES), [&](int i) { return query_at(lane + i); },
                       asking.factor, dim, of_vector, stride());
      Vec most = {};
      for (int d = 0; d < dim; d++) {
        const Vec now = load(of_vector + d * stride());
        most = larger(larger(now, -now), most);
      }
      store(largest.data() + lane, most);
    }
    to.resize(count);
    for (int i = 0; i < count; i++) to[i] = asking.of(first + i / group, head * group + i % group);
  }
};

// Sums over channels are sums of parts, which wait for no other.
constexpr int PARTS = 4;

template <class Take>
static inline void in_parts(int dim, const Take& take) {
  int d = 0;
  for (; d + PARTS <= dim; d += PARTS)
    for (int part = 0; part < PARTS; part++) take(d + part, part);
  for (; d < dim; d++) take(d, 0);
}

static inline Vec sum_of(const Vec* parts) { return (parts[0] + parts[1]) + (parts[2] + parts[3]); }

// What a score can be at most, by the least and the largest number of each channel: arrays
// [heads, chunks, 2, dim].
struct Bounds {
  const float* of;
  int64_t chunks;
};

class KeyBounds {
 public:
  explicit KeyBounds(const Bounds& bounds) : bounds_(bounds) {}

  void expect(int, int64_t) const {}

  // Writes the best scores of a chunk, one for each lane.
  void score(int head, int64_t chunk, const Lanes& queries, float* to) {
    const float *least = bounds_.of + (head * bounds_.chunks + chunk) * 2 * queries.dim;
    const float* most = least + queries.dim;
    for (int vector = 0; vector < queries.vectors; vector++) {
      const float* q = queries.of(vector);
      const int64_t next = queries.stride();
      Vec totals[PARTS] = {};
      in_parts(queries.dim, [&](int d, int part) {
        const Vec now = load(q + d * next);
        totals[part] += larger(now * least[d], now * most[d]);
      });
      store(to + vector * LANES, sum_of(totals));
    }
  }

 private:
  const Bounds& bounds_;
};

// The best score of any key of a chunk whose channels have scales: a query times the scales, in 16
// bits at most, times the codes. 16 bits are a thousand times as fine as the 4 of a code.
class KeyCodes {
 public:
  explicit KeyCodes(const Codes& codes)
      : codes_(codes), pairs_((codes.dim + 1) / 2), steps_((int64_t)codes.chunk_size * 2 * pairs_),
        scale_(codes.dim), zero_(codes.dim), relative_(codes.dim) {
    const int64_t most_code = codes.first ? FINE * ((1 << codes.bits) - 1) + FINE / 2 - 1
                                          : (1 << codes.bits) - 1;
    limit_ = std::min<int64_t>(INT16_MAX, INT32_MAX / (most_code * codes.dim));
  }

  // Has a chunk come, which is to be scored soon.
  void expect(int head, int64_t chunk) const {
    const int64_t place = head * codes_.chunks + chunk;
    const int64_t bytes = (int64_t)codes_.chunk_size * codes_.bits / 8 * codes_.dim;
    const int64_t scales = (int64_t)codes_.groups * codes_.dim * 2;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(codes_.codes + place * bytes + at);
    for (int64_t at = 0; at < scales; at += 64) {
      __builtin_prefetch((const char*)codes_.scale + place * scales + at);
      __builtin_prefetch((const char*)codes_.zero + place * scales + at);
    }
  }

  void score(int head, int64_t chunk, const Lanes& queries, float* to) {
    const int64_t place = head * codes_.chunks + chunk;
    const int each = codes_.chunk_size / codes_.groups;
    unpack(place);
    folded_.resize((int64_t)queries.vectors * pairs_ * LANES);
    step_.resize(queries.vectors * LANES);
    above_.resize(queries.vectors * LANES);
    std::fill_n(to, queries.vectors * LANES, MASKED);
    for (int group = 0; group < codes_.groups; group++) {
      const int64_t at = (place * codes_.groups + group) * codes_.dim;
      to_floats(codes_.scale + at, 0, 1, codes_.dim, scale_.data(), codes_.dim);
      to_floats(codes_.zero + at, 0, 1, codes_.dim, zero_.data(), codes_.dim);
      fold(queries);
      int token = group * each;
      const int end = token + each;
      if (token == 0 && codes_.first) {
        refine(place);
        look(queries.vectors, 0, 1, 1.0f / FINE, to);
        token = 1;
      }
      look(queries.vectors, token, end, 1.0f, to);
    }
  }

 private:
  typedef uint16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 2)));

  static constexpr int FINE = 32;       // parts of a step in which the first token's are whole
  static constexpr int VECTORS = 2;     // of queries in a tile
  static constexpr int TOKENS = REGISTERS == 16 ? 4 : 8;

  // The codes of all tokens, [tokens, 2 * pairs].
  void unpack(int64_t place) {
    const int bits = codes_.bits, dim = codes_.dim;
    const int rows = codes_.chunk_size * bits / 8;
    const uint8_t* from = codes_.codes + place * rows * dim;
    for (int part = 0; part < 8 / bits; part++) {
      const int shift = part * bits, mask = (1 << bits) - 1;
      for (int row = 0; row < rows; row++) {
        const uint8_t* bytes = from + row * dim;
        int16_t* to = steps_.data() + (int64_t)(part * rows + row) * 2 * pairs_;
        int d = 0;
        for (; d + 2 * LANES <= dim; d += 2 * LANES) {
          const Shorts all = __builtin_convertvector(load_any<Bytes>(bytes + d), Shorts);
          const Shorts steps = all >> shift & (uint16_t)mask;
          std::memcpy(to + d, &steps, sizeof steps);
        }
        for (; d < dim; d++) to[d] = bytes[d] >> shift & mask;
      }
    }
  }

  // The first token's steps, in parts of one.
  void refine(int64_t place) {
    const int dim = codes_.dim, half = dim / 2;
    const uint8_t* rest = codes_.first + place * half;
    for (int d = 0; d < dim; d++) {
      const int sixteenth = d < half ? rest[d] & 15 : rest[d - half] >> 4;
      steps_[d] = FINE * steps_[d] + FINE / 16 * sixteenth - FINE / 2 + FINE / 32;
    }
  }

  // Queries times the scales of their channels, rounded, two channels together; what one of what
  // they are rounded to is worth; and what the zeros add.
  void fold(const Lanes& queries) {
    const Vec magic = spread(12582912.0f);  // 1.5 * 2^23: with it a float's last bits are an integer
    const float largest_scale = most_of(scale_);
    for (int d = 0; d < codes_.dim; d++) relative_[d] = scale_[d] / largest_scale;
    for (int vector = 0; vector < queries.vectors; vector++) {
      const Vec largest = load(queries.largest.data() + vector * LANES);
      const Vec per = largest > 1e-30f ? (float)limit_ / largest : Vec{};
      const float *q = queries.of(vector), *relative = relative_.data(), *zero = zero_.data();
      const int64_t next = queries.stride();
      auto whole = [&](int d) {
        return bits_as<IntVec>(load(q + d * next) * per * relative[d] + magic);
      };
      int32_t* to = folded_.data() + (int64_t)vector * pairs_ * LANES;
      for (int pair = 0; pair < pairs_; pair++) {
        const IntVec low = whole(2 * pair) & 0xffff;
        const IntVec high = 2 * pair + 1 < codes_.dim ? whole(2 * pair + 1) << 16 : IntVec{};
        const IntVec both = low | high;
        std::memcpy(to + pair * LANES, &both, sizeof both);
      }
      Vec above[PARTS] = {};
      in_parts(codes_.dim, [&](int d, int part) { above[part] += load(q + d * next) * zero[d]; });
      store(above_.data() + vector * LANES, sum_of(above));
      store(step_.data() + vector * LANES, largest * (largest_scale / (float)limit_));
    }
  }

  // The largest of some numbers, or 1 if none of them is above 0.
  static float most_of(const std::vector<float>& numbers) {
    const int count = numbers.size();
    Vec most = {};
    int d = 0;
    for (; d + LANES <= count; d += LANES) most = larger(load(numbers.data() + d), most);
    float found = largest(most, 0);
    for (; d < count; d++) found = std::max(found, numbers[d]);
    return found > 0 ? found : 1;
  }

  // The larger of what is there and the best score of some tokens, whose steps are `unit`.
  void look(int vectors, int token, int end, float unit, float* to) const {
    int vector = 0;
    for (; vector + VECTORS <= vectors; vector += VECTORS)
      look_by<VECTORS>(vector, token, end, unit, to);
    if (vector < vectors) look_by<1>(vector, token, end, unit, to);
  }

  template <int V>
  void look_by(int vector, int token, int end, float unit, float* to) const {
    IntVec best[V];
    for (int v = 0; v < V; v++) best[v] = spread(INT32_MIN);
    for (; token + TOKENS <= end; token += TOKENS) look_at<V, TOKENS>(vector, token, best);
    for (; token < end; token++) look_at<V, 1>(vector, token, best);
    for (int v = 0; v < V; v++) {
      const int at = (vector + v) * LANES;
      const Vec score = __builtin_convertvector(best[v], Vec) * (load(step_.data() + at) * unit) +
                        load(above_.data() + at);
      store(to + at, larger(score, load(to + at)));
    }
  }

  template <int V, int T>
  void look_at(int vector, int token, IntVec* best) const {
    IntVec products[V][T] = {};
    const int16_t* steps = steps_.data() + (int64_t)token * 2 * pairs_;
    const int32_t* folded = folded_.data() + (int64_t)vector * pairs_ * LANES;
    for (int pair = 0; pair < pairs_; pair++) {
      IntVec q[V];
      for (int v = 0; v < V; v++) q[v] = load(folded + ((int64_t)v * pairs_ + pair) * LANES);
      for (int t = 0; t < T; t++) {
        const IntVec both = spread(load_any<int32_t>(steps + (t * pairs_ + pair) * 2));
        for (int v = 0; v < V; v++) products[v][t] = add_products(products[v][t], q[v], both);
      }
    }
    for (int t = 0; t < T; t++)
      for (int v = 0; v < V; v++) best[v] = products[v][t] > best[v] ? products[v][t] : best[v];
  }

  const Codes& codes_;
  const int pairs_;  // of channels
  int64_t limit_;    // of what queries are rounded to: no sum overflows
  std::vector<int16_t> steps_;
  std::vector<float> scale_, zero_, relative_;  // of channels
  std::vector<int32_t> folded_;      // [vectors, pairs, LANES]
  std::vector<float> step_, above_;  // of queries
};

// Asking queries one after another, and chunks that they look at.
struct Look {
  int64_t first, queries;
  const int32_t* chunks;
  int64_t column, count;
};

// What the plan's items have, and what follows in each sequence.
static inline std::vector<Look> looks_of(const Asking& asking) {
  std::vector<Look> all;
  const Items& items = asking.items;
  auto within = [](int64_t number, int64_t most) { return std::clamp<int64_t>(number, 0, most); };
  const int64_t count = std::min<int64_t>(*items.count.data, items.row_begin.size);
  for (int64_t i = 0; i < count; i++) {
    Look look;
    look.first = within(items.row_begin.data[i], asking.queries);
    look.queries = within(items.row_count.data[i], asking.queries - look.first);
    const int64_t begin = within(items.chunk_begin.data[i], items.chunks.size);
    look.chunks = items.chunks.data + begin;
    look.column = within(asking.item_column[i], asking.columns);
    look.count = within(items.chunk_count.data[i], std::min(items.chunks.size - begin,
                                                            asking.columns - look.column));
    all.push_back(look);
  }
  for (int64_t query = 0, next; query < asking.queries; query = next) {
    const int32_t table = asking.table[query], own = asking.own_column[query];
    int64_t end = 0;
    for (next = query; next < asking.queries && asking.table[next] == table &&
                       asking.own_column[next] == own; next++)
      end = std::max<int64_t>(end, asking.chunk[next]);
    Look look;
    look.first = query;
    look.queries = next - query;
    look.column = within(own, asking.columns);
    look.count = within(end, asking.columns) - look.column;
    look.chunks = asking.tables + within(table, asking.sequences - 1) * asking.columns + look.column;
    all.push_back(look);
  }
  return all;
}

// Of each query head the softmax of the scores of the chunks before the query's own, 0 of others.
static inline void share_out(const Asking& asking, int64_t query) {
  const int64_t before = std::clamp<int64_t>(asking.chunk[query], 0, asking.columns);
  for (int head = 0; head < asking.query_heads; head++) {
    float* of = asking.of(query, head);
    auto each = [&](auto what) {
      int64_t column = 0;
      for (; column + LANES <= before; column += LANES)
        store(of + column, what(load(of + column)));
      if (column == before) return;
      Vec last = spread(MASKED);
      std::memcpy(&last, of + column, (before - column) * sizeof(float));
      last = what(last);
      std::memcpy(of + column, &last, (before - column) * sizeof(float));
    };
    Vec most = spread(MASKED), sums = {};
    each([&](Vec score) {
      // What is behind the last stays far below all others.
      if (asking.cap > 0) score = score <= MASKED ? score : capped(score, asking.cap);
      most = larger(score, most);
      return score;
    });
    const float best = largest(most, MASKED);
    each([&](Vec score) {
      const Vec weight = score <= MASKED ? Vec{} : power_of_two(score - best);
      sums += weight;
      return weight;
    });
    const float total = sum(sums), by = total > 0 ? 1 / total : 0;
    each([&](Vec weight) { return weight * by; });
    std::fill(of + before, of + asking.columns, 0.0f);
  }
}

constexpr int64_t FEWEST_CHUNKS = 8, MOST_CHUNKS = 64;  // of a task, which packs its queries

// Fills `asking.shares`, by what a `Source` knows of chunks.
template <class Source, class Known>
void score_chunks(const Asking& asking, const Known& known, int64_t threads,
                  const Schedule& schedule) {
  struct Task {
    Look look;
    int head;
  };
  const int group = asking.group();
  const int64_t together = std::max(1, Units::MOST_QUERIES / group);
  const std::vector<Look> looks = looks_of(asking);
  int64_t all = 0;
  for (const Look& look : looks) all += (look.queries + together - 1) / together * look.count;
  const int64_t some = std::clamp(all * asking.kv_heads / (8 * threads), FEWEST_CHUNKS, MOST_CHUNKS);
  std::vector<Task> tasks;
  for (const Look& look : looks)
    for (int64_t query = 0; query < look.queries; query += together)
      for (int64_t at = 0; at < look.count; at += some)
        for (int head = 0; head < asking.kv_heads; head++)
          tasks.push_back({{look.first + query, std::min(look.queries - query, together),
                            look.chunks + at, look.column + at, std::min(look.count - at, some)},
                           head});
  std::fill_n(asking.shares, asking.queries * asking.query_heads * asking.columns, MASKED);
  auto score = [&](int64_t number) {
    static thread_local Lanes of_thread;
    static thread_local std::vector<float> best_of_thread;
    Lanes& lanes = of_thread;  // which takes a call each time
    std::vector<float>& best = best_of_thread;
    const auto& [look, head] = tasks[number];
    Source source(known);
    lanes.pack(asking, head, look.first, look.queries);
    best.resize(lanes.vectors * LANES);
    for (int64_t i = 0; i < look.count; i++) {
      auto chunk_at = [&](int64_t i) {
        return std::clamp<int64_t>(look.chunks[i], 0, known.chunks - 1);
      };
      if (i + 1 < look.count) source.expect(head, chunk_at(i + 1));
      source.score(head, chunk_at(i), lanes, best.data());
      for (int lane = 0; lane < lanes.count; lane++) lanes.to[lane][look.column + i] = best[lane];
    }
  };
  auto share = [&](int64_t query) { share_out(asking, query); };
  run_tasks(tasks.size(), asking.queries, threads - 1, schedule, score, share);
}

}  // namespace chunks
