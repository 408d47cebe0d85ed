// Chunks that are encoded, and how tokens of them are read: `pallas_kernels.codecs`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pools.h"
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
    const int64_t place = head * chunks + chunk;
    int group = -1;
    static thread_local std::vector<float> known;  // scales and zeros of the channels' group
    if ((int)known.size() < 2 * dim) known.resize(2 * dim);
    float *by = known.data(), *above = by + dim;
    for (int t = token; t < token + tokens; t++, to += width) {
      if (kind == float8) {
        read_float8(place, t, to);
      } else if (by_token) {
        read_by_token(place, t, to);
      } else {
        if (t / (chunk_size / groups) != group) {
          group = t / (chunk_size / groups);
          to_floats(scale + (place * groups + group) * dim, 0, 1, dim, by, dim);
          to_floats(zero + (place * groups + group) * dim, 0, 1, dim, above, dim);
        }
        read_by_channel(place, t, by, above, to);
      }
      if (kind == affine && first && t == 0) refine(place, by, above, to);
      std::fill(to + dim, to + width, 0.0f);
    }
  }

 private:
  // Where a token's codes are, and how far its bits are to be moved: of `8 / bits` equal parts that
  // a chunk's tokens are divided into the first has the lowest bits of each byte.
  const uint8_t* codes_of(int64_t place, int t, int* shift) const {
    int part = chunk_size * bits / 8;
    *shift = t / part * bits;
    return codes + (place * part + t % part) * dim;
  }

  void read_by_channel(int64_t place, int t, const float* by, const float* above, float* to) const {
    int shift, d = 0;
    const uint8_t* from = codes_of(place, t, &shift);
    const uint32_t mask = (1u << bits) - 1;
    for (; d + LANES <= dim; d += LANES) {
      Vec steps = __builtin_convertvector((IntVec)(load(from + d) >> shift & mask), Vec);
      store(to + d, steps * load(by + d) + load(above + d));
    }
    for (; d < dim; d++) to[d] = (float)(from[d] >> shift & mask) * by[d] + above[d];
  }

  void read_by_token(int64_t place, int t, float* to) const {
    int shift;
    const uint8_t* from = codes_of(place, t, &shift);
    const uint32_t mask = (1u << bits) - 1;
    const int64_t at = (place * chunk_size + t) * groups;
    for (int g = 0, d = 0; g < groups; g++) {
      const float by = number(scale[at + g]), above = number(zero[at + g]);
      const int end = (g + 1) * (dim / groups);
      for (; d + LANES <= end; d += LANES) {
        Vec steps = __builtin_convertvector((IntVec)(load(from + d) >> shift & mask), Vec);
        store(to + d, steps * by + above);
      }
      for (; d < end; d++) to[d] = (float)(from[d] >> shift & mask) * by + above;
    }
  }

  // Adds to the first token's numbers what 4 bits more say of them: which sixteenth of a step.
  void refine(int64_t place, const float* by_channel, const float* above, float* to) const {
    const uint8_t* rest = first + place * (dim / 2);
    int shift;
    const uint8_t* from = codes_of(place, 0, &shift);
    for (int d = 0; d < dim; d++) {
      int sixteenth = d < dim / 2 ? rest[d] & 15 : rest[d - dim / 2] >> 4;
      float steps = (float)(from[d] & ((1 << bits) - 1)) + (sixteenth - 7.5f) / 16;
      int64_t at = place * chunk_size * groups + d / (dim / groups);
      to[d] = by_token ? steps * number(scale[at]) + number(zero[at])
                       : steps * by_channel[d] + above[d];
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
