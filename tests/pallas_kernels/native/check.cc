// The compiled kernel by itself, on random plans: against its definition in double precision, the
// same with any number of threads, batch-invariant and not, and on plans that are wrong in every
// number, which must read nothing that is not there; and products of rows with weights. Built with a
// sanitizer by `test_native_alone.py`.
//
//     check SEED PLANS

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "attention.h"
#include "products.h"

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
    const double errors[] = {product_error<float>(), product_error<BFloat16>(),
                             product_error<Float16>()};
    for (double error : errors)
      if (!(error <= largest)) largest = error;
  }
  std::printf("%.3g\n", largest);
  return largest <= 2e-6 ? 0 : 1;
}
