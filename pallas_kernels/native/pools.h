// Where the keys and values of tokens lie, and how they are read.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace chunks {

template <class Element>
static inline void to_floats(const Element* from, int64_t stride, int tokens, int dim, float* to,
                             int width) {
  for (int t = 0; t < tokens; t++, from += stride, to += width) {
    int d = 0;
    for (; d + LANES <= dim; d += LANES) store(to + d, load(from + d));
    for (; d < dim; d++) to[d] = number(from[d]);
    for (; d < width; d++) to[d] = 0;
  }
}

// Keys and values of a layer [heads, chunks, C, D], as they are.
template <class T>
struct ExactPool {
  using Element = T;
  static constexpr bool IN_PLACE = true;  // chunks can be read where they are

  const T* keys;
  const T* values;
  int64_t chunks;
  int chunk_size, dim;

  int64_t place(int head, int64_t chunk, int token) const {
    return ((head * chunks + chunk) * chunk_size + token) * dim;
  }

  // Tokens of a chunk as floats, `width` apart.
  void read(int head, int64_t chunk, int token, int tokens, float* k, float* v, int width) const {
    to_floats(keys + place(head, chunk, token), dim, tokens, dim, k, width);
    to_floats(values + place(head, chunk, token), dim, tokens, dim, v, width);
  }
};

enum class Type { float32, bfloat16, float16 };

// Exact tokens beside a pool whose chunks are encoded.
struct ExactTokens {
  Type type = Type::float32;
  const void* keys = nullptr;
  const void* values = nullptr;
  int64_t slots = 0;  // of which each head has so many, of rows that decode

  // Tokens from `at` elements on, `stride` elements apart, as floats, `width` apart.
  void read(int64_t at, int64_t stride, int tokens, int dim, float* k, float* v, int width) const {
    auto both = [&](auto element) {
      using T = decltype(element);
      to_floats((const T*)keys + at, stride, tokens, dim, k, width);
      to_floats((const T*)values + at, stride, tokens, dim, v, width);
    };
    if (type == Type::float32) both(0.0f);
    if (type == Type::bfloat16) both(BFloat16{});
    if (type == Type::float16) both(Float16{});
  }
};

}  // namespace chunks
