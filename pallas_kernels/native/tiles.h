// Attention of a few queries to a block of tokens: online softmax (arXiv 1805.02867) around two
// matrix products whose tiles stay in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace chunks {

constexpr float MASKED = -1e30f;  // finite, so that the difference of two of them is no NaN

#ifndef BLOCK_TOKENS
#define BLOCK_TOKENS 64
#endif

static inline int round_up(int number, int multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

// Tokens one after another, `stride` elements apart, and where the first stands in its sequence.
template <class Element>
struct Piece {
  const Element* keys;
  const Element* values;
  int64_t stride;
  int tokens;
  int place;
};

// Brings the tokens of a block to come near, a few lines at a time, while another is worked on: what
// the processor does by itself stops at every chunk.
class Ahead {
 public:
  Ahead() = default;

  // `steps` calls bring all of it.
  template <class Element>
  void begin(const Piece<Element>* pieces, int count, int steps) {
    count_ = index_ = 0;
    int64_t lines = 0;
    for (int i = 0; i < count; i++) {
      int64_t size = pieces[i].tokens * pieces[i].stride * (int64_t)sizeof(Element);
      for (const Element* from : {pieces[i].keys, pieces[i].values}) {
        ranges_[count_++] = {(const char*)from, (const char*)from + size};
        lines += (size + LINE - 1) / LINE;
      }
    }
    each_ = (lines + steps - 1) / std::max(steps, 1);
  }

  void step() {
    for (int64_t left = each_; left > 0 && index_ < count_; left--) {
      __builtin_prefetch(ranges_[index_].next, 0, 2);
      if ((ranges_[index_].next += LINE) >= ranges_[index_].end) index_++;
    }
  }

 private:
  static constexpr int LINE = 64;
  struct Range {
    const char *next, *end;
  };
  Range ranges_[2 * BLOCK_TOKENS];
  int count_ = 0, index_ = 0;
  int64_t each_ = 0;
};

// What queries have seen so far: weighted sums of values [rows, width], largest scores, and sums of
// weights. All three are in the call's partials; the first `rows` numbers of each are kept.
struct State {
  float* output;
  float* maximum;
  float* total;

  void clear(int rows, int width) {
    std::fill_n(output, (int64_t)rows * width, 0.0f);
    std::fill_n(maximum, rows, MASKED);
    std::fill_n(total, rows, 0.0f);
  }
};

// Which tokens each query sees, by their places: from `lower` to before `upper`, and of those the
// ones before `hidden` or from `opens` on.
struct Sight {
  const int32_t* lower;
  const int32_t* upper;
  const int32_t* opens;
  int32_t hidden;

  IntVec of(int row, int32_t place) const {
    IntVec at = spread(place);
    IntVec open = (at < spread(hidden)) | (at >= load(opens + row));
    return (at >= load(lower + row)) & (at < load(upper + row)) & open;
  }
};

// Scores are binary logarithms of weights: those with a cap are hyperbolic tangents of what queries
// and keys give, times the cap.
static inline Vec capped(Vec scores, float cap) { return tangent_hyperbolic(scores) * cap; }

static inline void scale_row(float* row, int width, float by) {
  if (by == 1.0f) return;
  for (int d = 0; d < width; d += LANES) store(row + d, load(row + d) * by);
}

// Rows += weights^T values, of R rows and V vectors of each. Weights are [tokens, ld] where `by_row`
// is 1 and [rows, by_row] where `ld` is 1.
template <int R, int V, class Element>
static inline void weigh_tile(const Piece<Element>* pieces, int count, const float* weights,
                              int64_t ld, int64_t by_row, int from, float* rows, int width) {
  Vec sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = load(rows + r * width + from + v * LANES);
  for (const Piece<Element>* piece = pieces; piece < pieces + count; piece++) {
    const Element* values = piece->values + from;
    for (int t = 0; t < piece->tokens; t++) {
      Vec value[V];
      for (int v = 0; v < V; v++) value[v] = load(values + v * LANES);
      for (int r = 0; r < R; r++) {
        Vec weight = spread(weights[r * by_row]);
        for (int v = 0; v < V; v++) sums[r][v] += weight * value[v];
      }
      values += piece->stride;
      weights += ld;
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(rows + r * width + from + v * LANES, sums[r][v]);
}

template <int R, int V, class Element>
static inline int weigh_tiles(const Piece<Element>* pieces, int count, const float* weights,
                              int64_t ld, int64_t by_row, int from, float* rows, int width) {
  for (; from + V * LANES <= width; from += V * LANES)
    weigh_tile<R, V>(pieces, count, weights, ld, by_row, from, rows, width);
  return from;
}

// So few queries that tokens are not worth multiplying with whole vectors of them: each score is a
// sum over a vector of dimensions, and tokens are read as they lie, whatever their type.
class FewQueries {
 public:
  static constexpr int MOST = LANES / 2;
  static constexpr int LD = BLOCK_TOKENS + LANES;  // of scores

  // Queries are [rows, width] and scaled.
  FewQueries(const float* queries, int rows, int width, float cap, State state, float* scores)
      : queries(queries), rows(rows), width(width), cap(cap), state(state), scores(scores) {}

  // Calls of `ahead.step` while it attends to so many tokens.
  int steps(int tokens) const { return (rows + 1) / 2 * (tokens / LANES); }

  template <class Element>
  void attend(const Piece<Element>* pieces, int count, Ahead& ahead) {
    int tokens = 0;
    for (int i = 0; i < count; i++) {
      int r = 0;
      for (; r + 2 <= rows; r += 2) score<2>(pieces[i], r, tokens, ahead);
      if (r < rows) score<1>(pieces[i], r, tokens, ahead);
      tokens += pieces[i].tokens;
    }
    for (int r = 0; r < rows; r++) soften(r, tokens);
    int r = 0;
    for (; r + 4 <= rows; r += 4) weigh<4, REGISTERS == 16 ? 2 : 4>(pieces, count, r);
    if (rows - r == 3) weigh<3, 4>(pieces, count, r);
    if (rows - r == 2) weigh<2, 4>(pieces, count, r);
    if (rows - r == 1) weigh<1, 8>(pieces, count, r);
  }

 private:
  template <int R, class Element>
  void score(const Piece<Element>& piece, int row, int at, Ahead& ahead) {
    constexpr int T = LANES / R;
    const float* query = queries + row * width;
    float* to = scores + row * LD + at;
    int t = 0;
    for (; t + T <= piece.tokens; t += T) {
      const Element* keys = piece.keys + t * piece.stride;
      ahead.step();
      Vec products[LANES] = {};
      for (int d = 0; d < width; d += LANES) {
        Vec of[R];
        for (int r = 0; r < R; r++) of[r] = load(query + r * width + d);
        for (int i = 0; i < T; i++) {
          Vec key = load(keys + i * piece.stride + d);
          for (int r = 0; r < R; r++) products[r * T + i] += key * of[r];
        }
      }
      Vec found = sums(products);
      for (int r = 0; r < R; r++) std::memcpy(to + r * LD + t, (float*)&found + r * T, T * 4);
    }
    for (; t < piece.tokens; t++) {
      for (int r = 0; r < R; r++) {
        Vec product = {};
        for (int d = 0; d < width; d += LANES)
          product += load(piece.keys + t * piece.stride + d) * load(query + r * width + d);
        to[r * LD + t] = sum(product);
      }
    }
  }

  // Scores to weights.
  void soften(int row, int tokens) {
    float* of = scores + row * LD;
    std::fill_n(of + tokens, LANES, MASKED);
    Vec most = spread(MASKED);
    for (int t = 0; t < tokens; t += LANES) {
      Vec score = load(of + t);
      if (cap > 0) store(of + t, score = capped(score, cap));
      most = larger(score, most);
    }
    if (cap > 0) std::fill_n(of + tokens, LANES, MASKED);
    float before = state.maximum[row], now = largest(most, before);
    float scale = power_of_two(before - now);
    Vec total = {};
    for (int t = 0; t < tokens; t += LANES) {
      Vec weight = power_of_two(load(of + t) - now);
      store(of + t, weight);
      total += weight;
    }
    state.maximum[row] = now;
    state.total[row] = state.total[row] * scale + sum(total);
    scale_row(state.output + row * width, width, scale);
  }

  template <int R, int V, class Element>
  void weigh(const Piece<Element>* pieces, int count, int row) {
    const float* weights = scores + row * LD;
    float* to = state.output + row * width;
    int from = weigh_tiles<R, V>(pieces, count, weights, 1, LD, 0, to, width);
    if constexpr (V > 4) from = weigh_tiles<R, 4>(pieces, count, weights, 1, LD, from, to, width);
    weigh_tiles<R, 1>(pieces, count, weights, 1, LD, from, to, width);
  }

  const float* queries;
  int rows, width;
  float cap;
  State state;
  float* scores;
};

// Enough queries that each number of a token is multiplied with whole vectors of them.
class ManyQueries {
 public:
  static constexpr int MOST = 96;

  // Numbers of packed queries, and of scores, of so many rows.
  static int64_t packed_size(int rows, int dim) { return (int64_t)round_up(rows, LANES) * dim; }
  static int64_t scores_size(int rows) { return (int64_t)BLOCK_TOKENS * round_up(rows, LANES); }

  // `packed` has the queries as `pack` leaves them.
  ManyQueries(const float* packed, int rows, int dim, int width, float cap, State state,
              float* scores)
      : packed(packed), rows(rows), padded(round_up(rows, LANES)), dim(dim), width(width),
        cap(cap), state(state), scores(scores) {}

  // Writes queries into panels: of up to 3 vectors of them all numbers of a dimension lie side by side.
  template <class QueryAt>
  static void pack(const QueryAt& query_at, float scale, int rows, int dim, float* packed) {
    const int vectors = round_up(rows, LANES) / LANES;
    for (int first = 0, size; first < vectors; first += size, packed += size * LANES * dim) {
      size = panel(vectors - first);
      for (int vector = 0; vector < size; vector++) {
        const int row = (first + vector) * LANES;
        put_side_by_side(std::min(rows - row, LANES), [&](int i) { return query_at(row + i); },
                         scale, dim, packed + vector * LANES, size * LANES);
      }
    }
  }

  int steps(int tokens) const {
    int tiles = 0;
    for (int first = 0, size; first < padded / LANES; first += size) {
      size = panel(padded / LANES - first);
      tiles += tokens / (size == 3 ? T3 : size == 2 ? T2 : T1);
    }
    return tiles * ((dim + AHEAD - 1) / AHEAD) + rows / 6 * (width / (V * LANES));
  }

  // Of `sight` null all queries see all tokens.
  void attend(const Piece<float>* pieces, int count, const Sight* sight, Ahead& ahead) {
    float* to = scores;
    for (int i = 0; i < count; i++) {
      score(pieces[i], to, ahead);
      to += (int64_t)pieces[i].tokens * padded;
    }
    for (int row = 0; row < rows; row += LANES) soften(pieces, count, row, sight);
    int from = 0;
    for (; from + V * LANES <= width; from += V * LANES) weigh<V>(pieces, count, from, ahead);
    for (; from < width; from += LANES) weigh<1>(pieces, count, from, ahead);
  }

 private:
  // Vectors of the next panel, where so many are left: with 16 registers 3 would not fit, and 1 is
  // slower than 2.
  static int panel(int vectors) {
    return FEW || vectors == 4 ? std::min(vectors, 2) : std::min(vectors, 3);
  }

  // Vectors of values that a tile has, and tokens that one of 3, 2 and 1 vectors of queries has.
  static constexpr bool FEW = REGISTERS == 16;
  static constexpr int V = FEW ? 2 : 4, T3 = FEW ? 4 : 8, T2 = FEW ? 6 : 12, T1 = FEW ? 8 : 16;
  static constexpr int AHEAD = 8;  // dimensions of a tile for each step: many lines at once wait

  void score(const Piece<float>& piece, float* to, Ahead& ahead) {
    int vectors = padded / LANES;
    const float* queries = packed;
    for (int first = 0, size; first < vectors; first += size) {
      size = panel(vectors - first);
      float* at = to + first * LANES;
      if (size == 3) score_panel<3, T3>(piece, queries, at, ahead);
      if (size == 2) score_panel<2, T2>(piece, queries, at, ahead);
      if (size == 1) score_panel<1, T1>(piece, queries, at, ahead);
      queries += (int64_t)size * LANES * dim;
    }
  }

  template <int V, int T>
  void score_panel(const Piece<float>& piece, const float* queries, float* to, Ahead& ahead) {
    int t = 0;
    for (; t + T <= piece.tokens; t += T) score_tile<V, T>(piece, t, queries, to, &ahead);
    if constexpr (T > 4)
      for (; t + 4 <= piece.tokens; t += 4) score_tile<V, 4>(piece, t, queries, to, nullptr);
    for (; t < piece.tokens; t++) score_tile<V, 1>(piece, t, queries, to, nullptr);
  }

  template <int V, int T>
  void score_tile(const Piece<float>& piece, int token, const float* queries, float* to,
                  Ahead* ahead) {
    const float* keys = piece.keys + token * piece.stride;
    Vec products[T][V] = {};
    for (int d = 0; d < dim; d++) {
      if (ahead && d % AHEAD == 0) ahead->step();
      Vec of[V];
      for (int v = 0; v < V; v++) of[v] = load(queries + v * LANES);
      for (int t = 0; t < T; t++) {
        Vec key = spread(keys[t * piece.stride + d]);
        for (int v = 0; v < V; v++) products[t][v] += key * of[v];
      }
      queries += V * LANES;
    }
    to += (int64_t)token * padded;
    for (int t = 0; t < T; t++)
      for (int v = 0; v < V; v++) store(to + t * padded + v * LANES, products[t][v]);
  }

  // Scores of a vector of queries to weights.
  void soften(const Piece<float>* pieces, int count, int row, const Sight* sight) {
    float* of = scores + row;
    float before_[LANES], total_[LANES];
    int kept = std::min(rows - row, LANES);
    for (int i = 0; i < LANES; i++) {
      before_[i] = i < kept ? state.maximum[row + i] : MASKED;
      total_[i] = i < kept ? state.total[row + i] : 0;
    }
    Vec before = load(before_), now = before, total = {};
    int t = 0;
    for (int i = 0; i < count; i++) {
      for (int place = pieces[i].place; place < pieces[i].place + pieces[i].tokens; place++, t++) {
        Vec score = load(of + (int64_t)t * padded);
        if (cap > 0) score = capped(score, cap);
        if (sight) score = sight->of(row, place) ? score : spread(MASKED);
        if (cap > 0 || sight) store(of + (int64_t)t * padded, score);
        now = larger(score, now);
      }
    }
    for (int i = 0; i < t; i++) {
      Vec score = load(of + (int64_t)i * padded);
      Vec weight = power_of_two(score - now);
      if (sight) weight = score <= MASKED ? Vec{} : weight;
      store(of + (int64_t)i * padded, weight);
      total += weight;
    }
    Vec scale = power_of_two(before - now);
    total += load(total_) * scale;
    for (int i = 0; i < kept; i++) {
      state.maximum[row + i] = now[i];
      state.total[row + i] = total[i];
      scale_row(state.output + (int64_t)(row + i) * width, width, scale[i]);
    }
  }

  template <int V>
  void weigh(const Piece<float>* pieces, int count, int from, Ahead& ahead) {
    int row = 0;
    for (; row + 6 <= rows; row += 6) {
      ahead.step();
      weigh_rows<6, V>(pieces, count, from, row);
    }
    int left = rows - row;
    if (left >= 4) weigh_rows<4, V>(pieces, count, from, row), row += 4, left -= 4;
    if (left >= 2) weigh_rows<2, V>(pieces, count, from, row), row += 2, left -= 2;
    if (left >= 1) weigh_rows<1, V>(pieces, count, from, row);
  }

  template <int R, int V>
  void weigh_rows(const Piece<float>* pieces, int count, int from, int row) {
    float* to = state.output + (int64_t)row * width;
    weigh_tile<R, V>(pieces, count, scores + row, padded, 1, from, to, width);
  }

  const float* packed;
  int rows, padded, dim, width;
  float cap;
  State state;
  float* scores;
};

}  // namespace chunks
