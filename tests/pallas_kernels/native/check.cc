// The compiled kernel by itself, on random plans: against its definition in double precision, the
// same with any number of threads, batch-invariant and not, and on plans that are wrong in every
// number, which must read nothing that is not there; how chunks score, and tiles of what is chosen;
// and products of rows with weights. Built with a sanitizer by `test_native_alone.py`.
//
//     check SEED PLANS

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "attention.h"
#include "chosen.h"
#include "products.h"
#include "scores.h"

using namespace chunks;

std::mt19937 generator;

int below(int number) { return std::uniform_int_distribution<int>(0, number - 1)(generator); }
int between(int first, int last) { return first + below(last - first + 1); }
bool chance(double of) { return std::uniform_real_distribution<double>()(generator) < of; }
float normal() { return std::normal_distribution<float>()(generator); }


using Numbers = std::vector<int32_t>;

struct Problem {
  int windows, rows, kv_heads, group, dim, layer_chunks, size, tiles, columns, sequences;
  bool prefill, hidden;
  Numbers head_windows, item_row, item_rows, item_chunk, item_chunks, chunks, item_count;
  Numbers hidden_size, hidden_sinks, hidden_begin, hidden_offset;
  Numbers private_chunks, covered, lengths, tile_chunks, tile_rows, tile_counts;
  Numbers tile_begin, tile_tokens, tile_position, tile_sequence, num_tiles, tables, own_chunk;
  std::vector<float> queries, keys, values;
  float scale, softcap;
};

constexpr int ITEMS = 6, ITEM_CHUNKS = 24, TILES = 4, TILE_ROWS = 3;

Problem random_problem(bool wrong) {
  Problem p;
  const int sizes[] = {1, 3, 16, 64, 100}, dims[] = {1, 7, 16, 24, 64, 80, 128};
  p.prefill = chance(0.5);
  p.hidden = chance(0.4);
  p.windows = p.hidden ? between(1, 3) : 1;
  p.rows = between(1, p.prefill ? 80 : 20);
  p.kv_heads = between(1, 3);
  p.group = between(1, chance(0.2) ? 100 : 9);
  p.dim = dims[below(7)];
  p.size = sizes[below(5)];
  p.layer_chunks = between(1, 30);
  p.columns = between(1, 8);
  p.scale = 0.5f / std::sqrt((float)p.dim);
  p.softcap = chance(0.3) ? 3 : 0;
  auto number = [&](int first, int last) {
    if (!wrong || chance(0.7)) return between(first, last);
    const int32_t wild[] = {-1, INT32_MIN, INT32_MAX, -p.size, 1 << 20, p.layer_chunks, 0};
    return wild[below(7)];
  };
  auto numbers = [&](int64_t count, int first, int last) {
    Numbers some(count);
    for (int32_t& one : some) one = number(first, last);
    return some;
  };
  const int W = p.windows;
  p.head_windows = numbers(p.hidden ? p.kv_heads : 0, 0, W - 1);
  for (int w = 0; w < W; w++) {
    p.item_count.push_back(number(0, ITEMS));
    for (int i = 0; i < ITEMS; i++) {
      int row = below(p.rows), chunk = below(ITEM_CHUNKS);
      p.item_row.push_back(number(row, row));
      p.item_rows.push_back(number(1, p.rows - row));
      p.item_chunk.push_back(number(chunk, chunk));
      p.item_chunks.push_back(number(0, ITEM_CHUNKS - chunk));
    }
  }
  p.chunks = numbers(W * ITEM_CHUNKS, 0, p.layer_chunks - 1);
  if (p.hidden) {
    p.hidden_size = numbers(W, 1, 2 * p.size + 3);
    p.hidden_sinks = numbers(W, 0, p.size);
  }
  if (!p.prefill) {
    p.private_chunks = numbers(W * p.rows * p.columns, 0, p.layer_chunks - 1);
    for (int row = 0; row < p.rows; row++) p.lengths.push_back(number(0, p.columns * p.size));
    for (int i = 0; i < W * p.rows; i++)
      p.covered.push_back(number(0, std::clamp(p.lengths[i % p.rows], 0, 1 << 20)));
    if (p.hidden) {
      p.hidden_begin = numbers(W * p.rows, 0, p.size);
      p.hidden_offset = numbers(W * p.rows, 0, p.size);
    }
    if (chance(0.4)) {
      p.tile_counts = numbers(W, 0, TILES);
      p.tile_chunks = numbers(W * TILES, 0, p.layer_chunks - 1);
      for (int i = 0; i < W * TILES; i++) {  // rows come first, each once
        int first = below(p.rows);
        for (int r = 0; r < TILE_ROWS; r++) p.tile_rows.push_back(number(first + r, first + r));
      }
    }
  } else {
    p.sequences = between(1, 3);
    p.tiles = between(1, 5);
    p.tables = numbers(W * p.sequences * p.columns, 0, p.layer_chunks - 1);
    p.own_chunk = numbers(W * p.sequences, 0, p.columns - 1);
    if (p.hidden) {
      p.hidden_begin = numbers(W * p.sequences, 0, p.size);
      p.hidden_offset = numbers(W * p.sequences, 0, p.size);
    }
    int begin = 0;
    for (int tile = 0; tile < p.tiles; tile++) {
      int room = p.columns * p.size;
      int tokens = std::min({(p.rows + p.tiles - 1) / p.tiles, p.rows - begin, room});
      p.tile_begin.push_back(number(begin, begin));
      p.tile_tokens.push_back(number(tokens, tokens));
      p.tile_position.push_back(number(0, room - std::max(tokens, 1)));
      p.tile_sequence.push_back(number(0, p.sequences - 1));
      begin += tokens;
    }
    p.num_tiles = {number(p.tiles, p.tiles)};
  }
  p.queries.resize((int64_t)p.rows * p.kv_heads * p.group * p.dim);
  p.keys.resize((int64_t)p.kv_heads * p.layer_chunks * p.size * p.dim);
  p.values.resize(p.keys.size());
  for (auto* array : {&p.queries, &p.keys, &p.values})
    for (float& one : *array) one = normal();
  return p;
}

// Calls with a schedule whose threads are over when it returns.
template <class Call>
void with_threads(Call call) {
  std::vector<std::thread> others;
  call([&](std::function<void()> task) { others.emplace_back(task); });
  for (std::thread& other : others) other.join();
}

std::vector<float> attend(const Problem& p, int threads, bool batch_invariant) {
  std::vector<float> output(p.queries.size(), NAN);
  auto ints = [&](const Numbers& all, int64_t windows) {
    return all.empty() ? Ints{} : Ints{all.data(), (int64_t)all.size() / windows};
  };
  const int W = p.windows;
  Attention call{p.group * p.kv_heads, p.kv_heads, p.dim, p.scale, p.softcap, p.queries.data(),
                 output.data(), p.hidden ? p.head_windows.data() : nullptr, batch_invariant};
  Plan plan{p.rows, W, {}, {}};
  plan.items = {ints(p.item_row, W),    ints(p.item_rows, W), ints(p.item_chunk, W),
                ints(p.item_chunks, W), ints(p.chunks, W),    ints(p.item_count, W)};
  plan.hidden = {ints(p.hidden_size, W), ints(p.hidden_sinks, W), ints(p.hidden_begin, W),
                 ints(p.hidden_offset, W)};
  std::vector<Units> units;
  for (int w = 0; w < W; w++) {
    units.emplace_back(p.rows, p.group, p.size, batch_invariant);
    if (p.prefill) {
      PrefillPlan prefill{p.tile_begin.data(),  p.tile_tokens.data(), p.tile_position.data(),
                          p.tile_sequence.data(), p.num_tiles.data(),   p.tiles,
                          ints(p.tables, W),      ints(p.own_chunk, W), false};
      add_prefill(units[w], plan, prefill, w, p.size);
    } else {
      DecodePlan decode{ints(p.private_chunks, W), ints(p.covered, W), p.lengths.data(),
                        ints(p.tile_chunks, W),    ints(p.tile_rows, W),
                        ints(p.tile_counts, W)};
      add_decoding(units[w], plan, decode, w, p.size);
    }
  }
  ExactPool<float> pool{p.keys.data(), p.values.data(), p.layer_chunks, p.size, p.dim};
  with_threads([&](const Schedule& schedule) {
    chunks::attend(call, p.rows, units, pool, ExactTokens{}, threads, schedule);
  });
  return output;
}

// What each query reads, by the plan's definition: chunk and token, as often as it is named.
std::vector<std::pair<int, int>> read_by(const Problem& p, int row, int head) {
  std::vector<std::pair<int, int>> read;
  const int w = p.hidden ? p.head_windows[head] : 0;
  for (int i = 0; i < p.item_count[w]; i++) {
    int item = w * ITEMS + i, first = p.item_row[item];
    if (row < first || row >= first + p.item_rows[item]) continue;
    for (int c = 0; c < p.item_chunks[item]; c++)
      for (int t = 0; t < p.size; t++)
        read.push_back({p.chunks[w * ITEM_CHUNKS + p.item_chunk[item] + c], t});
  }
  if (!p.prefill) {
    for (int tile = 0; !p.tile_counts.empty() && tile < p.tile_counts[w]; tile++)
      for (int r = 0; r < TILE_ROWS; r++)
        if (p.tile_rows[(w * TILES + tile) * TILE_ROWS + r] == row)
          for (int t = 0; t < p.size; t++) read.push_back({p.tile_chunks[w * TILES + tile], t});
    int left = p.lengths[row] - p.covered[w * p.rows + row];
    for (int place = 0; place < left; place++) {
      if (p.hidden) {
        int opens = p.lengths[row] - p.hidden_size[w] - p.hidden_offset[w * p.rows + row];
        if (place >= p.hidden_begin[w * p.rows + row] && place < opens) continue;
      }
      int column = place / p.size;
      read.push_back({p.private_chunks[(w * p.rows + row) * p.columns + column], place % p.size});
    }
    return read;
  }
  for (int tile = 0; tile < p.tiles; tile++) {
    int inside = row - p.tile_begin[tile], sequence = p.tile_sequence[tile];
    if (inside < 0 || inside >= p.tile_tokens[tile]) continue;
    int position = p.tile_position[tile] + inside;
    int begin = p.own_chunk[w * p.sequences + sequence] * p.size;
    for (int place = begin; place <= position; place++) {
      if (p.hidden) {
        int of = w * p.sequences + sequence, opens = position + 1 - p.hidden_size[w];
        opens -= p.hidden_offset[of] - begin;
        if (place >= begin + p.hidden_begin[of] && place < opens) continue;
      }
      read.push_back({p.tables[(w * p.sequences + sequence) * p.columns + place / p.size],
                      place % p.size});
    }
  }
  return read;
}

double largest_error(const Problem& p, const std::vector<float>& found) {
  double largest = 0;
  for (int row = 0; row < p.rows; row++) {
    for (int query = 0; query < p.group * p.kv_heads; query++) {
      int head = query / p.group;
      int64_t at = ((int64_t)row * p.kv_heads * p.group + query) * p.dim;
      std::vector<double> exact(p.dim, 0), scores;
      auto read = read_by(p, row, head);
      auto place = [&](std::pair<int, int> token) {
        return ((int64_t)(head * p.layer_chunks + token.first) * p.size + token.second) * p.dim;
      };
      double most = -INFINITY, total = 0;
      for (auto token : read) {
        double score = 0;
        for (int d = 0; d < p.dim; d++)
          score += (double)p.queries[at + d] * p.keys[place(token) + d];
        score *= p.scale;
        if (p.softcap > 0) score = std::tanh(score / p.softcap) * p.softcap;
        scores.push_back(score);
        most = std::max(most, score);
      }
      for (size_t i = 0; i < read.size(); i++) {
        double weight = std::exp(scores[i] - most);
        total += weight;
        for (int d = 0; d < p.dim; d++) exact[d] += weight * p.values[place(read[i]) + d];
      }
      for (int d = 0; d < p.dim; d++) {
        double right = total > 0 ? exact[d] / total : 0;
        double error = std::abs(right - found[at + d]);
        if (!(error <= largest)) largest = error;  // NaN is larger than anything
      }
    }
  }
  return largest;
}

// Queries that choose: what they and the chunks are, in random numbers.
struct Choice {
  int queries, columns, sequences, kv_heads, group, dim, chunks, size, bits, groups;
  Numbers chunk, own_column, table, tables, row, rows, begin, counts, ids, count, item_column;
  std::vector<float> q, bounds;
  std::vector<uint8_t> codes, first;
  std::vector<Float16> scale, zero;
  float factor, cap;
};

constexpr int LOOKS = 4, LOOK_IDS = 16;

// A query finds the chunks up to a column in items, each in one of them, and the rest in its table.
Choice random_choice(bool wrong) {
  Choice c;
  const int dims[] = {1, 2, 7, 16, 24, 64, 80}, bits[] = {2, 4, 8};
  c.queries = between(1, 40);
  c.sequences = between(1, 3);
  c.columns = LOOKS + between(1, 40);
  c.kv_heads = between(1, 3);
  c.group = between(1, 9);
  c.dim = dims[below(7)];
  c.bits = bits[below(3)];
  c.groups = between(1, 2);
  c.size = 8 * c.groups * between(1, 4);
  c.chunks = between(1, 20);
  c.factor = 1.44f / std::sqrt((float)c.dim);
  c.cap = chance(0.3) ? 3 : 0;
  auto number = [&](int right) {
    if (!wrong || chance(0.7)) return right;
    const int32_t wild[] = {-1, INT32_MIN, INT32_MAX, 1 << 20, c.queries, c.columns, 0};
    return wild[below(7)];
  };
  const int items = below(LOOKS + 1);  // each has a column, for all queries
  for (int i = 0; i < LOOKS; i++) {
    c.row.push_back(number(0));
    c.rows.push_back(number(c.queries));
    c.begin.push_back(number(i));
    c.counts.push_back(number(1));
    c.item_column.push_back(number(i));
  }
  c.count = {number(items)};
  for (int i = 0; i < LOOK_IDS; i++) c.ids.push_back(number(below(c.chunks)));
  for (int i = 0; i < c.sequences * c.columns; i++) c.tables.push_back(number(below(c.chunks)));
  const int each = (c.queries + c.sequences - 1) / c.sequences;
  for (int query = 0; query < c.queries; query++) {
    c.chunk.push_back(number(below(c.columns + 1)));
    c.own_column.push_back(number(items));
    c.table.push_back(number(query / each));
  }
  c.q.resize((int64_t)c.queries * c.kv_heads * c.group * c.dim);
  c.bounds.resize((int64_t)c.kv_heads * c.chunks * 2 * c.dim);
  for (auto* array : {&c.q, &c.bounds})
    for (float& one : *array) one = normal();
  c.codes.resize((int64_t)c.kv_heads * c.chunks * c.size * c.bits / 8 * c.dim);
  if (c.bits < 8 && c.dim % 2 == 0 && chance(0.5)) c.first.resize((int64_t)c.kv_heads * c.chunks * c.dim / 2);
  for (auto* array : {&c.codes, &c.first})
    for (uint8_t& one : *array) one = below(256);
  c.scale.resize((int64_t)c.kv_heads * c.chunks * c.groups * c.dim);
  c.zero.resize(c.scale.size());
  const int size = c.bits == 8 ? 0x2400 : c.bits == 4 ? 0x3400 : 0x3c00;  // codes span up to 8
  for (Float16& one : c.scale) one.bits = size + below(0x400);
  for (Float16& one : c.zero) one.bits = below(0x3c00) | below(2) << 15;
  return c;
}

Codes codes_of(const Choice& c) {
  return {Codes::affine,  c.bits,         false,   c.groups,
          c.codes.data(), c.scale.data(), c.zero.data(), nullptr,
          c.first.empty() ? nullptr : c.first.data(), c.chunks, c.size, c.dim};
}

// The shares of some queries by the codes of keys, or by their bounds.
std::vector<float> shares(const Choice& c, bool by_codes, int first, int queries, int threads) {
  std::vector<float> found((int64_t)queries * c.kv_heads * c.group * c.columns, NAN);
  auto ints = [](const Numbers& all) { return Ints{all.data(), (int64_t)all.size()}; };
  Numbers row = c.row, rows = c.rows;
  if (queries < c.queries)
    for (int i = 0; i < LOOKS; i++) row[i] = 0, rows[i] = queries;
  Asking asking{queries, c.columns, c.sequences, c.kv_heads * c.group, c.kv_heads, c.dim, c.factor,
                c.cap, c.q.data() + (int64_t)first * c.kv_heads * c.group * c.dim,
                c.chunk.data() + first, c.own_column.data() + first, c.table.data() + first,
                c.tables.data(),
                {ints(row), ints(rows), ints(c.begin), ints(c.counts), ints(c.ids), ints(c.count)},
                c.item_column.data(), found.data()};
  with_threads([&](const Schedule& schedule) {
    if (by_codes)
      score_chunks<KeyCodes>(asking, codes_of(c), threads, schedule);
    else
      score_chunks<KeyBounds>(asking, Bounds{c.bounds.data(), c.chunks}, threads, schedule);
  });
  return found;
}

// The largest error of the shares, by the definition.
double share_error(const Choice& c, bool by_codes, const std::vector<float>& found) {
  const Codes codes = codes_of(c);
  std::vector<float> keys((int64_t)c.size * c.dim);
  double largest = 0;
  for (int query = 0; query < c.queries; query++) {
    for (int h = 0; h < c.kv_heads * c.group; h++) {
      const int head = h / c.group, before = c.chunk[query];
      const int64_t at = (int64_t)query * c.kv_heads * c.group + h;
      std::vector<double> best(before, -INFINITY);
      double most = -INFINITY, total = 0;
      for (int column = 0; column < before; column++) {
        const int id = column < c.own_column[query] ? c.ids[column]
                                                    : c.tables[c.table[query] * c.columns + column];
        codes.read(head, id, 0, c.size, keys.data(), c.dim);
        const float* least = c.bounds.data() + (int64_t)(head * c.chunks + id) * 2 * c.dim;
        for (int t = 0; t < (by_codes ? c.size : 1); t++) {
          double score = 0;
          for (int d = 0; d < c.dim; d++) {
            const double q = (double)c.q[at * c.dim + d] * c.factor;
            score += by_codes ? q * keys[t * c.dim + d]
                              : std::max(q * least[d], q * least[c.dim + d]);
          }
          best[column] = std::max(best[column], score);
        }
        if (c.cap > 0) best[column] = std::tanh(best[column]) * c.cap;
        most = std::max(most, best[column]);
      }
      for (double& one : best) total += one = std::exp2(one - most);
      for (int column = 0; column < c.columns; column++) {
        const double right = column < before ? best[column] / total : 0;
        const double error = std::abs(right - found[at * c.columns + column]);
        if (!(error <= largest)) largest = error;
      }
    }
  }
  return largest;
}

// Whether shares are what they are to be: by the definition, and the same bits for any number of
// threads and of other queries.
bool scores_right(bool wrong) {
  const Choice c = random_choice(wrong);
  for (bool by_codes : {false, true}) {
    const std::vector<float> all = shares(c, by_codes, 0, c.queries, 1);
    if (wrong) continue;
    const double error = share_error(c, by_codes, all);
    if (!(error <= (by_codes ? 5e-4 : 2e-6)))  // of scores to 40, of queries in 16 bits
      return std::fprintf(stderr, "shares are off by %g\n", error), false;
    const int first = below(c.queries), count = between(1, c.queries - first);
    const std::vector<float> again = shares(c, by_codes, 0, c.queries, 4);
    const std::vector<float> some = shares(c, by_codes, first, count, 2);
    const int64_t each = (int64_t)c.kv_heads * c.group * c.columns;
    if (std::memcmp(again.data(), all.data(), all.size() * sizeof(float)) ||
        std::memcmp(some.data(), all.data() + first * each, count * each * sizeof(float)))
      return std::fprintf(stderr, "shares depend on others\n"), false;
  }
  return true;
}

// Whether tiles have every row that has chosen a chunk once, as far as there is room.
bool tiles_right(bool wrong) {
  const int rows = between(1, 20), width = between(1, 12), columns = between(width, 20);
  const int size = between(1, 8), most = wrong ? between(1, 20) : rows * width;
  Numbers chosen, counts, tables;
  for (int row = 0; row < rows; row++) {
    counts.push_back(wrong && chance(0.3) ? INT32_MAX : below(width + 1));
    for (int i = 0; i < width; i++) chosen.push_back(wrong && chance(0.3) ? -i : i);
    for (int i = 0; i < columns; i++) tables.push_back(i * 4 + below(3));
  }
  Numbers chunks(most, -7), tile_rows(most * size, -7), count(1, -7);
  make_tiles({rows, width, columns, chosen.data(), counts.data(), tables.data()}, 99,
             {most, size, chunks.data(), tile_rows.data(), count.data()});
  if (wrong) return count[0] >= 0;
  std::vector<std::pair<int, int>> right, found;
  for (int row = 0; row < rows; row++)
    for (int i = 0; i < counts[row]; i++) right.push_back({tables[row * columns + i], row});
  for (int tile = 0; tile < most; tile++)
    for (int i = 0; i < size; i++)
      if (tile_rows[tile * size + i] < rows) found.push_back({chunks[tile], tile_rows[tile * size + i]});
  for (int tile = 0; tile < most; tile++)
    if ((tile_rows[tile * size] < rows) != (tile < count[0])) return false;
  std::sort(right.begin(), right.end());
  return right == found;  // which are in order
}

// The largest error of a product with random weights, and of its sums of rows; infinity where fewer
// rows or more threads have other bits.
template <class Element>
double product_error() {
  const int sizes[] = {1, 7, 16, 48, 64, 130, 300}, most_rows = between(1, 40);
  const int depth = sizes[below(7)], columns = sizes[below(7)];
  const bool transposed = chance(0.5);
  std::vector<float> x((int64_t)most_rows * depth);
  std::vector<Element> weights((int64_t)depth * columns);
  for (float& one : x) one = normal();
  for (Element& one : weights) {
    float random = normal();
    if constexpr (std::is_same_v<Element, float>) one = random;
    if constexpr (std::is_same_v<Element, BFloat16>) one.bits = bits_as<uint32_t>(random) >> 16;
    if constexpr (std::is_same_v<Element, Float16>) one.bits = below(0x4000) | below(2) << 15;
  }
  auto multiply = [&](int rows, int threads) {
    std::vector<float> output((int64_t)rows * columns + rows, NAN);
    Product product{rows, depth, columns, x.data(), output.data()};
    with_threads([&](const Schedule& schedule) {
      auto* run = transposed ? chunks::multiply_transposed<Element> : chunks::multiply<Element>;
      run(product, weights.data(), threads, schedule);
      float* sums = output.data() + (int64_t)rows * columns;
      sum_rows(output.data(), rows, columns, sums, threads, schedule);
    });
    return output;
  };
  const std::vector<float> all = multiply(most_rows, 1);
  for (int threads : {1, 3}) {
    const int rows = between(1, most_rows);
    const std::vector<float> some = multiply(rows, threads);
    const int64_t products = (int64_t)rows * columns, of_all = (int64_t)most_rows * columns;
    if (std::memcmp(some.data(), all.data(), products * sizeof(float)) ||
        std::memcmp(some.data() + products, all.data() + of_all, rows * sizeof(float)))
      return INFINITY;
  }
  double largest = 0;
  for (int row = 0; row < most_rows; row++) {
    double sum = 0;
    for (int column = 0; column < columns; column++) {
      double exact = 0;
      for (int k = 0; k < depth; k++) {
        int64_t at = transposed ? (int64_t)column * depth + k : (int64_t)k * columns + column;
        exact += (double)x[(int64_t)row * depth + k] * number(weights[at]);
      }
      const float found = all[(int64_t)row * columns + column];
      sum += found;
      const double error = std::abs(exact - found) / std::sqrt(depth);
      if (!(error <= largest)) largest = error;
    }
    const double error = std::abs(sum - all[(int64_t)most_rows * columns + row]);
    if (!(error / columns <= largest)) largest = error / columns;
  }
  return largest;
}

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: check SEED PLANS\n"), 2;
  generator.seed(std::atoi(arguments[1]));
  double largest = 0;
  for (int plan = 0; plan < std::atoi(arguments[2]); plan++) {
    bool wrong = plan % 2 == 1;
    Problem problem = random_problem(wrong);
    for (bool batch_invariant : {false, true}) {
      std::vector<float> alone = attend(problem, 1, batch_invariant);
      for (int threads : {2, 5}) {
        std::vector<float> found = attend(problem, threads, batch_invariant);
        if (std::memcmp(found.data(), alone.data(), found.size() * sizeof(float)))
          return std::fprintf(stderr, "plan %d: %d threads differ\n", plan, threads), 1;
      }
      if (wrong) continue;
      double error = largest_error(problem, alone);
      if (!(error <= largest)) largest = error;
    }
    if (!scores_right(wrong)) return std::fprintf(stderr, "choice %d\n", plan), 1;
    if (!tiles_right(wrong)) return std::fprintf(stderr, "tiles %d are wrong\n", plan), 1;
    const double errors[] = {product_error<float>(), product_error<BFloat16>(),
                             product_error<Float16>()};
    for (double error : errors)
      if (!(error <= largest)) largest = error;
  }
  std::printf("%.3g\n", largest);
  return largest <= 2e-6 ? 0 : 1;
}
