// Products of rows with weights, and sums of rows, that are the same bits for a row whatever the
// others are, and however many: each number is a sum whose order depends on the weights alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"
#include "workers.h"

namespace chunks {

struct Product {
  int64_t rows, depth, columns;
  const float* x;  // [rows, depth]
  float* output;   // [rows, columns]
};

// Of a block of weights, which stays near for all rows of a task. Sums are sums of blocks' sums.
constexpr int64_t DEPTH = 96;
constexpr int AHEAD = 16;  // rows of weights that are brought before they are needed
constexpr int64_t TASK_ROWS = 256;
constexpr int LINE = 64;               // bytes
constexpr size_t MOST_KEPT = 1 << 24;  // floats: passes over long texts are rare, and take more

// A sum over some of the depth for R rows of V vectors, added to `output` unless it begins there.
// `x` has R numbers for each step.
template <int R, int V>
static inline void multiply_tile(const float* x, const float* weights, int64_t stride,
                                 int64_t depth, float* output, int64_t ld, bool begins,
                                 bool ahead) {
  Vec sums[R][V] = {};
  for (int64_t k = 0; k < depth; k++, x += R, weights += stride) {
    Vec of[V];
    for (int v = 0; v < V; v++) of[v] = load(weights + v * LANES);
    if (ahead)
      for (int at = 0; at < V * LANES; at += LINE / (int)sizeof(float))
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

// The same for R rows or fewer.
template <int R, int V, class... Arguments>
static inline void multiply_rows(int rows, Arguments... arguments) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<R - 1, V>(rows, arguments...);
  multiply_tile<R, V>(arguments...);
}

// Some columns of weights as V vectors of floats, with zeros behind them.
template <int V, class Element>
static inline void copy_columns(const Element* weights, int64_t stride, int64_t depth,
                                int64_t columns, float* to) {
  for (int64_t k = 0; k < depth; k++, weights += stride, to += V * LANES) {
    for (int64_t at = 0; at < V * LANES; at += LANES) {
      const bool whole = at + LANES <= columns;
      __builtin_prefetch(weights + AHEAD * stride + at, 0, 3);
      store(to + at, whole ? load(weights + at) : load_some(weights + at, columns - at));
    }
  }
}

// Weights are [depth, columns]; R rows and V vectors of columns are taken together.
template <int R, int V, class Element>
static inline void multiply_by(const Product& product, const Element* weights, int64_t threads,
                               const Schedule& schedule) {
  static Buffers buffers(MOST_KEPT);
  constexpr int64_t WIDTH = V * LANES;
  const int64_t rows = product.rows, depth = product.depth, ld = product.columns;
  const int64_t panels = (rows + R - 1) / R, tiles = (ld + WIDTH - 1) / WIDTH;
  const int64_t blocks = (rows + TASK_ROWS - 1) / TASK_ROWS;
  std::vector<float> packed = buffers.take(rows * depth);
  auto rows_of = [&](int64_t panel) { return std::min<int64_t>(R, rows - panel * R); };
  auto pack = [&](int64_t panel) {
    float* to = packed.data() + panel * R * depth;
    const float* from = product.x + panel * R * depth;
    const int64_t of_panel = rows_of(panel);
    for (int64_t k = 0; k < depth; k++)
      for (int64_t r = 0; r < of_panel; r++) *to++ = from[r * depth + k];
  };
  auto multiply = [&](int64_t task) {
    const int64_t first = task % blocks * (TASK_ROWS / R), column = task / blocks * WIDTH;
    const int64_t last = std::min(first + TASK_ROWS / R, panels);
    const int64_t columns = std::min(WIDTH, ld - column);
    const bool in_place = std::is_same_v<Element, float> && columns == WIDTH;
    float copied[DEPTH * WIDTH], sums[R * WIDTH];
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const int64_t some = std::min(DEPTH, depth - k);
      const Element* there = weights + k * ld + column;
      if (!in_place) copy_columns<V>(there, ld, some, columns, copied);
      const float* from = in_place ? (const float*)there : copied;
      const int64_t stride = in_place ? ld : WIDTH;
      for (int64_t panel = first; panel < last; panel++) {
        const int of_panel = rows_of(panel);
        const float* x = packed.data() + panel * R * depth + k * of_panel;
        float* to = product.output + panel * R * ld + column;
        if (columns == WIDTH) {
          const bool ahead = in_place && panel == first;
          multiply_rows<R, V>(of_panel, x, from, stride, some, to, ld, k == 0, ahead);
          continue;
        }
        multiply_rows<R, V>(of_panel, x, from, stride, some, sums, WIDTH, true, false);
        for (int r = 0; r < of_panel; r++, to += ld)
          for (int64_t at = 0; at < columns; at++)
            to[at] = (k == 0 ? 0 : to[at]) + sums[r * WIDTH + at];
      }
    }
  };
  run_tasks(panels, tiles * blocks, threads - 1, schedule, pack, multiply);
  buffers.give_back(std::move(packed));
}

// Weights are [depth, columns]. Sums, as many as there are registers for, wait for no other.
template <class Element>
void multiply(const Product& product, const Element* weights, int64_t threads,
              const Schedule& schedule) {
  constexpr bool FEW = REGISTERS == 16;
  if (product.depth == 0)
    std::fill_n(product.output, product.rows * product.columns, 0.0f);
  else if (product.rows == 1)
    multiply_by<1, FEW ? 8 : 12>(product, weights, threads, schedule);
  else if (product.rows <= 4)
    multiply_by<4, FEW ? 3 : 6>(product, weights, threads, schedule);
  else
    multiply_by<FEW ? 4 : 8, 3>(product, weights, threads, schedule);
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
    take(dot_tile<R, C, Element>, C, R, 0, whole);
    take(dot_tile<1, 1, Element>, 1, 1, 0, whole);
    column = task * TOGETHER;
    take(dot_tile<1, LANES, Element>, LANES, 1, whole, rows);
    take(dot_tile<1, 1, Element>, 1, 1, whole, rows);
  };
  run_tasks((ld + TOGETHER - 1) / TOGETHER, threads - 1, schedule, multiply);
}

// Calls `of_row` for each row, some rows a task.
template <class OfRow>
static inline void for_each_row(int64_t rows, int64_t columns, int64_t threads,
                                const Schedule& schedule, const OfRow& of_row) {
  constexpr int64_t NUMBERS = 1 << 16;  // of a task
  const int64_t together = std::max<int64_t>(1, NUMBERS / std::max<int64_t>(columns, 1));
  auto some = [&](int64_t task) {
    for (int64_t row = task * together; row < std::min((task + 1) * together, rows); row++)
      of_row(row);
  };
  run_tasks((rows + together - 1) / together, threads - 1, schedule, some);
}

// The sum of each row, [rows].
static inline void sum_rows(const float* x, int64_t rows, int64_t columns, float* output,
                            int64_t threads, const Schedule& schedule) {
  constexpr int PARTS = 4;
  for_each_row(rows, columns, threads, schedule, [&](int64_t row) {
    const float* from = x + row * columns;
    Vec parts[PARTS] = {};
    int64_t at = 0;
    for (; at + PARTS * LANES <= columns; at += PARTS * LANES)
      for (int part = 0; part < PARTS; part++) parts[part] += load(from + at + part * LANES);
    for (; at + LANES <= columns; at += LANES) parts[0] += load(from + at);
    if (at < columns) parts[1] += load_some(from + at, columns - at);
    output[row] = sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
  });
}

// e^(x - m) of each row's numbers, where m is the row's: 0 of what is more than 87 below it.
static inline void exponentials(const float* x, const float* most, int64_t rows, int64_t columns,
                                float* output, int64_t threads, const Schedule& schedule) {
  for_each_row(rows, columns, threads, schedule, [&](int64_t row) {
    const float* from = x + row * columns;
    const float m = most[row];
    float* to = output + row * columns;
    auto of = [&](Vec number) {
      const Vec less = number - m;
      const Power e = power(less);
      return less < -87.0f ? Vec{} : e.scale * e.rest + e.scale;
    };
    int64_t at = 0;
    for (; at + LANES <= columns; at += LANES) store(to + at, of(load(from + at)));
    if (at == columns) return;
    const Vec last = of(load_some(from + at, columns - at));
    std::memcpy(to + at, &last, (columns - at) * sizeof(float));
  });
}

}  // namespace chunks
