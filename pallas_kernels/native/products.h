// Products of rows with weights, and sums of rows, that are the same bits for a row whatever the others
// are, and however many: each number is one sum, in an order that depends on the weights alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"
#include "workers.h"

namespace chunks {

struct Product {
  int64_t rows, depth, columns;
  const float* x;  // [rows, depth]
  float* output;   // [rows, columns]
};

// Rows of a tile; those of a product are cut into panels of as many.
constexpr int PANEL = REGISTERS == 16 ? 4 : 8;
constexpr int64_t DEPTH = 96;   // of a block of weights, which stays near for all panels of a task
constexpr int AHEAD = 16;       // rows of weights that are brought before they are needed
constexpr int64_t MOST = 256;   // rows of a task

// A sum over some of the depth for R rows of V vectors, added to `output` unless it begins there. `x`
// has R numbers for each step.
template <int R, int V, class Element>
static inline void multiply_tile(const float* x, const Element* weights, int64_t stride,
                                 int64_t depth, float* output, int64_t ld, bool begins, bool ahead) {
  constexpr int LINE = 64 / sizeof(Element);
  Vec sums[R][V] = {};
  for (int64_t k = 0; k < depth; k++, x += R, weights += stride) {
    Vec of[V];
    for (int v = 0; v < V; v++) of[v] = load(weights + v * LANES);
    if (ahead)
      for (int at = 0; at < V * LANES; at += LINE)
        __builtin_prefetch(weights + AHEAD * stride + at, 0, 3);
    for (int r = 0; r < R; r++) {
      Vec number = spread(x[r]);
      for (int v = 0; v < V; v++) sums[r][v] += number * of[v];
    }
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < V; v++) {
      float* to = output + r * ld + v * LANES;
      store(to, begins ? sums[r][v] : load(to) + sums[r][v]);
    }
  }
}

template <int V, int R = PANEL, class... Arguments>
static inline void multiply_rows(int rows, Arguments... arguments) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<V, R - 1>(rows, arguments...);
  multiply_tile<R, V>(arguments...);
}

// Columns of weights that are less than a vector, as one.
template <class Element>
static inline void multiply_last(int rows, const float* x, const Element* weights, int64_t stride,
                                 int64_t depth, float* output, int64_t ld, bool begins, int columns) {
  float some[DEPTH * LANES] = {}, sums[PANEL * LANES] = {};
  for (int64_t k = 0; k < depth; k++)
    for (int i = 0; i < columns; i++) some[k * LANES + i] = number(weights[k * stride + i]);
  for (int r = 0; r < rows && !begins; r++)
    std::memcpy(sums + r * LANES, output + r * ld, columns * sizeof(float));
  multiply_rows<1>(rows, x, some, (int64_t)LANES, depth, sums, (int64_t)LANES, begins, false);
  for (int r = 0; r < rows; r++)
    std::memcpy(output + r * ld, sums + r * LANES, columns * sizeof(float));
}

// Weights are [depth, columns]; V vectors of columns are taken together.
template <int V, class Element>
static inline void multiply_by(const Product& product, const Element* weights, int64_t threads,
                               const Schedule& schedule) {
  static Buffers buffers;
  const int64_t rows = product.rows, depth = product.depth, ld = product.columns;
  const int64_t panels = (rows + PANEL - 1) / PANEL, tiles = (ld + V * LANES - 1) / (V * LANES);
  const int64_t blocks = (rows + MOST - 1) / MOST;
  std::vector<float> packed = buffers.take(rows * depth);
  auto rows_of = [&](int64_t panel) { return std::min<int64_t>(PANEL, rows - panel * PANEL); };
  auto pack = [&](int64_t panel) {
    float* to = packed.data() + panel * PANEL * depth;
    const float* from = product.x + panel * PANEL * depth;
    const int64_t of_panel = rows_of(panel);
    for (int64_t k = 0; k < depth; k++)
      for (int64_t r = 0; r < of_panel; r++) *to++ = from[r * depth + k];
  };
  auto multiply = [&](int64_t task) {
    const int64_t first = task % blocks * (MOST / PANEL), column = task / blocks * V * LANES;
    const int64_t last = std::min(first + MOST / PANEL, panels);
    const int64_t columns = std::min<int64_t>(V * LANES, ld - column);
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const int64_t some = std::min(DEPTH, depth - k);
      const Element* from = weights + k * ld + column;
      for (int64_t panel = first; panel < last; panel++) {
        const int of_panel = rows_of(panel);
        const float* x = packed.data() + panel * PANEL * depth + k * of_panel;
        float* output = product.output + panel * PANEL * ld + column;
        if (columns == V * LANES) {
          multiply_rows<V>(of_panel, x, from, ld, some, output, ld, k == 0, panel == first);
          continue;
        }
        int64_t at = 0;
        for (; at + LANES <= columns; at += LANES)
          multiply_rows<1>(of_panel, x, from + at, ld, some, output + at, ld, k == 0, false);
        if (at < columns)
          multiply_last(of_panel, x, from + at, ld, some, output + at, ld, k == 0, columns - at);
      }
    }
  };
  run_tasks(panels, tiles * blocks, threads - 1, schedule, pack, multiply);
  buffers.give_back(std::move(packed));
}

// Weights are [depth, columns]. Few rows take more columns together, so that all sums do not wait for
// one another.
template <class Element>
void multiply(const Product& product, const Element* weights, int64_t threads,
              const Schedule& schedule) {
  constexpr bool FEW = REGISTERS == 16;
  if (product.rows == 1)
    return multiply_by<FEW ? 8 : 12>(product, weights, threads, schedule);
  if (product.rows <= 4 && !FEW) return multiply_by<6>(product, weights, threads, schedule);
  multiply_by<3>(product, weights, threads, schedule);
}

// The first `size` of what would be a vector, and zeros.
template <class Element>
static inline Vec load_some(const Element* from, int64_t size) {
  float some[LANES] = {};
  for (int64_t i = 0; i < size; i++) some[i] = number(from[i]);
  return load(some);
}

// R rows with C columns of weights, whose sums make a vector or a part of one.
template <int R, int C, class Element>
static inline void dot_tile(const float* x, const Element* weights, int64_t depth, float* output,
                            int64_t ld) {
  Vec products[LANES] = {};
  auto add = [&](auto read) {
    Vec of[C];
    for (int c = 0; c < C; c++) of[c] = read(weights + c * depth);
    for (int r = 0; r < R; r++) {
      Vec row = read(x + r * depth);
      for (int c = 0; c < C; c++) products[r * C + c] += row * of[c];
    }
  };
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) add([&](const auto* from) { return load(from + k); });
  if (k < depth) add([&](const auto* from) { return load_some(from + k, depth - k); });
  Vec found = sums(products);
  for (int r = 0; r < R; r++)
    std::memcpy(output + r * ld, (float*)&found + r * C, C * sizeof(float));
}

// Weights are [columns, depth]. Each product is a sum over a vector of the depth.
template <class Element>
void multiply_transposed(const Product& product, const Element* weights, int64_t threads,
                         const Schedule& schedule) {
  constexpr int R = LANES >= 16 ? 4 : 2, C = LANES / R;
  constexpr int64_t TOGETHER = 3 * LANES;  // columns of a task
  const int64_t rows = product.rows, depth = product.depth, ld = product.columns;
  auto multiply = [&](int64_t task) {
    const int64_t end = std::min((task + 1) * TOGETHER, ld);
    int64_t column = task * TOGETHER;
    auto take = [&](auto with, int64_t columns, int64_t rows_each, int64_t first, int64_t last) {
      for (; column + columns <= end; column += columns)
        for (int64_t row = first; row + rows_each <= last; row += rows_each)
          with(product.x + row * depth, weights + column * depth, depth,
               product.output + row * ld + column, ld);
    };
    const int64_t whole = rows / R * R;
    if (whole) take(dot_tile<R, C, Element>, C, R, 0, whole);
    if (whole) take(dot_tile<1, 1, Element>, 1, 1, 0, whole);
    column = task * TOGETHER;
    if (whole < rows) take(dot_tile<1, LANES, Element>, LANES, 1, whole, rows);
    if (whole < rows) take(dot_tile<1, 1, Element>, 1, 1, whole, rows);
  };
  run_tasks((ld + TOGETHER - 1) / TOGETHER, 0, threads - 1, schedule, multiply, [](int64_t) {});
}

// The sum of each row, [rows].
static inline void sum_rows(const float* x, int64_t rows, int64_t columns, float* output,
                            int64_t threads, const Schedule& schedule) {
  constexpr int PARTS = 4;
  constexpr int64_t NUMBERS = 1 << 16;  // of a task
  const int64_t together = std::max<int64_t>(1, NUMBERS / std::max<int64_t>(columns, 1));
  auto sum_some = [&](int64_t task) {
    for (int64_t row = task * together; row < std::min((task + 1) * together, rows); row++) {
      const float* from = x + row * columns;
      Vec parts[PARTS] = {};
      int64_t at = 0;
      for (; at + PARTS * LANES <= columns; at += PARTS * LANES)
        for (int part = 0; part < PARTS; part++) parts[part] += load(from + at + part * LANES);
      for (; at + LANES <= columns; at += LANES) parts[0] += load(from + at);
      if (at < columns) parts[1] += load_some(from + at, columns - at);
      output[row] = sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
  };
  run_tasks((rows + together - 1) / together, 0, threads - 1, schedule, sum_some, [](int64_t) {});
}

}  // namespace chunks
