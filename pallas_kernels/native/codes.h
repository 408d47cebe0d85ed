// Chunks that are encoded, and how tokens of them are read: `pallas_kernels.codecs`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace chunks {

// The keys of all chunks of a layer, or their values: arrays [heads, chunks, ...].
struct Codes {
  enum Kind { affine = 1, float8 = 2 };

  Kind kind;
  int bits;         // of an affine code, or behind the point of a float
  bool by_token;    // affine: scales are those of one token's channels, and not of one channel's tokens
  int groups;       // affine: of a token's channels, or of a channel's tokens
  const uint8_t* codes;       // [C * bits / 8, D], or [C, D]
  const Float16* scale;       // affine: [groups, D], or [C, groups]
  const Float16* zero;        // affine: the same
  const float* float_scale;   // float8: one
  const uint8_t* first;       // [D / 2], or null: 4 bits more of the first token
  int64_t chunks;
  int chunk_size, dim;

  // Tokens of a chunk as floats, `width` apart.
  void read(int head, int64_t chunk, int token, int tokens, float* to, int width) const {
    int64_t place = head * chunks + chunk;
    for (int t = token; t < token + tokens; t++, to += width) {
      if (kind == affine) {
        read_affine(place, t, to);
      } else {
        read_float8(place, t, to);
      }
      std::fill(to + dim, to + width, 0.0f);
    }
  }

 private:
  void read_affine(int64_t place, int t, float* to) const {
    int part = chunk_size * bits / 8, shift = t / part * bits, group = dim / groups;
    uint32_t mask = (1u << bits) - 1;
    const uint8_t* from = codes + (place * part + t % part) * dim;
    int64_t scales = by_token ? (place * chunk_size + t) * groups
                              : (place * groups + t / (chunk_size / groups)) * dim;
    const Float16 *by = scale + scales, *above = zero + scales;
    const uint8_t* rest = first && t == 0 ? first + place * (dim / 2) : nullptr;
    int d = 0;
    if (!rest && (!by_token || group % LANES == 0)) {
      for (; d + LANES <= dim; d += LANES) {
        Vec steps = __builtin_convertvector(load(from + d) >> shift & mask, Vec);
        if (by_token) {
          store(to + d, steps * number(by[d / group]) + number(above[d / group]));
        } else {
          store(to + d, steps * load(by + d) + load(above + d));
        }
      }
    }
    for (; d < dim; d++) {
      float steps = from[d] >> shift & mask;
      if (rest) {
        int sixteenth = d < dim / 2 ? rest[d] & 15 : rest[d - dim / 2] >> 4;
        steps += (sixteenth - 7.5f) / 16;
      }
      int at = by_token ? d / group : d;
      to[d] = steps * number(by[at]) + number(above[at]);
    }
  }

  // The bits are moved to where a float has them; without an exponent there is no leading 1.
  void read_float8(int64_t place, int t, float* to) const {
    const uint8_t* from = codes + (place * chunk_size + t) * dim;
    const int least = bits == 3 ? -6 : -14;
    const float smallest = bits_as<float>((uint32_t)(least + 126) << 23);
    const float by = float_scale[place];
    auto widen = [&](uint32_t code) {
      uint32_t size = code & 0x7f;
      float wide = bits_as<float>((size << (23 - bits)) + ((uint32_t)(least + 126) << 23));
      if (size >> bits == 0) wide = (wide - smallest) * 2;
      return code > 0x7f ? -wide : wide;
    };
    int d = 0;
    for (; d + LANES <= dim; d += LANES) {
      BitVec code = load(from + d), size = code & 0x7fu;
      Vec wide = bits_as<Vec>((size << (23 - bits)) + ((uint32_t)(least + 126) << 23));
      wide = size >> bits == 0 ? (wide - smallest) * 2.0f : wide;
      wide = bits_as<Vec>(bits_as<BitVec>(wide) | (code & 0x80u) << 24);
      store(to + d, wide * by);
    }
    for (; d < dim; d++) to[d] = widen(from[d]) * by;
  }
};

struct CodedPool {
  using Element = float;
  static constexpr bool IN_PLACE = false;

  Codes keys, values;
  int64_t chunks;
  int chunk_size, dim;

  void read(int head, int64_t chunk, int token, int tokens, float* k, float* v, int width) const {
    keys.read(head, chunk, token, tokens, k, width);
    values.read(head, chunk, token, tokens, v, width);
  }
};

}  // namespace chunks
