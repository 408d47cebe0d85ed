// Vectors of floats, as wide as the processor's registers, through the compiler's vector types.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef VECTOR_BYTES
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#endif

namespace chunks {

constexpr int LANES = VECTOR_BYTES / 4;
constexpr int REGISTERS = VECTOR_BYTES == 32 ? 16 : 32;  // of SSE there are 16, of NEON 32

typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t BitVec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint8_t ByteVec __attribute__((vector_size(VECTOR_BYTES / 4)));
typedef uint16_t HalfVec __attribute__((vector_size(VECTOR_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
static inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class Any, class Element>
static inline Any load_any(const Element* from) {
  Any loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

static inline Vec spread(float number) { return number - Vec{}; }
static inline IntVec spread(int32_t number) { return number - IntVec{}; }

static inline Vec load(const float* from) { return load_any<Vec>(from); }
static inline IntVec load(const int32_t* from) { return load_any<IntVec>(from); }

static inline Vec load(const BFloat16* from) {
  return bits_as<Vec>(__builtin_convertvector(load_any<HalfVec>(from), BitVec) << 16);
}

static inline Vec load(const Float16* from) {
#if defined(__F16C__) && VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(load_any<__m256i>(from));
#elif defined(__F16C__) && VECTOR_BYTES == 32
  return (Vec)_mm256_cvtph_ps(load_any<__m128i>(from));
#else
  // The exponent grows by 112: a product does that for subnormal numbers too.
  BitVec half = __builtin_convertvector(load_any<HalfVec>(from), BitVec);
  Vec size = bits_as<Vec>((half & 0x7fffu) << 13) * 0x1p112f;
  BitVec special = (BitVec)((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bits_as<Vec>(bits_as<BitVec>(size) | special | (half & 0x8000u) << 16);
#endif
}

static inline BitVec load(const uint8_t* from) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  return (BitVec)_mm512_cvtepu8_epi32(load_any<__m128i>(from));
#elif defined(__AVX2__) && VECTOR_BYTES == 32
  return (BitVec)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load_any<int64_t>(from)));
#else
  return __builtin_convertvector(load_any<ByteVec>(from), BitVec);
#endif
}

static inline void store(float* to, Vec vec) { std::memcpy(to, &vec, sizeof vec); }

static inline float number(float of) { return of; }
static inline float number(BFloat16 of) { return bits_as<float>((uint32_t)of.bits << 16); }
static inline float number(Float16 of) {
  uint32_t half = of.bits;
  float size = bits_as<float>((half & 0x7fffu) << 13) * 0x1p112f;
  uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  return bits_as<float>(bits_as<uint32_t>(size) | special | (half & 0x8000u) << 16);
}

// A sum, and in each lane the products of both pairs of 16-bit numbers.
static inline IntVec add_products(IntVec sum, IntVec a, IntVec b) {
#if defined(__AVX512VNNI__) && VECTOR_BYTES == 64
  return (IntVec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__) && VECTOR_BYTES == 64
  return sum + (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && VECTOR_BYTES == 32
  return sum + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const BitVec low = bits_as<BitVec>(a) << 16, other = bits_as<BitVec>(b) << 16;
  return sum + (a >> 16) * (b >> 16) + (bits_as<IntVec>(low) >> 16) * (bits_as<IntVec>(other) >> 16);
#endif
}

// The first `size` of what would be a vector, and zeros.
template <class Element>
static inline Vec load_some(const Element* from, int64_t size) {
  float some[LANES] = {};
  for (int64_t i = 0; i < size; i++) some[i] = number(from[i]);
  return load(some);
}

// Where either is NaN this is b, so that a running maximum stays a number.
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// e^x - 1 as 2^n (1 + f) - 1: f alone where n is 0. NaN stays NaN; below -87 as at -87.
struct Power {
  Vec scale, rest;  // 2^n, and e^(x - n log 2) - 1
};

static inline Power power(Vec x) {
  x = x < -87.0f ? spread(-87.0f) : x;
  x = x > 88.0f ? spread(88.0f) : x;
  const Vec magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = (x * 1.44269504f + magic) - magic;
  Vec f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // A polynomial for (e^f - 1 - f) / f^2 on [-log(2) / 2, log(2) / 2].
  Vec p = spread(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return {bits_as<Vec>(exponent), p * f * f + f};
}

// 2^x of what is not positive; below -126 as at -126, and NaN of NaN.
static inline Vec power_of_two(Vec x) {
  x = x < -126.0f ? spread(-126.0f) : x;
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the last bits are those of the next integer
  const Vec f = x - (shifted - 12582912.0f);
  // A polynomial for (2^f - 1) / f on [-1/2, 1/2], off by 2e-9.
  Vec p = spread(1.5353362e-4f);
  p = p * f + 1.3398875e-3f;
  p = p * f + 9.618437e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.931472e-1f;
  const BitVec integer = bits_as<BitVec>(shifted) << 23;
  return (p * f + 1.0f) * bits_as<Vec>(integer + bits_as<uint32_t>(1.0f));
}

static inline float power_of_two(float x) { return power_of_two(spread(x))[0]; }

static inline Vec tangent_hyperbolic(Vec x) {
  Power two = power(x + x);
  Vec less_one = two.rest * two.scale + (two.scale - 1.0f);
  return less_one / (less_one + 2.0f);
}

static inline float sum(Vec vec) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += vec[lane];
  return total;
}

static inline float largest(Vec vec, float start) {
  for (int lane = 0; lane < LANES; lane++) start = vec[lane] > start ? vec[lane] : start;
  return start;
}

// Lane `lane` of two vectors one after another, where blocks of twice `half` lanes are made of the
// halves of both vectors' blocks that begin `from` lanes into them.
constexpr int half_lane(int lane, int half, int from) {
  int block = lane / (2 * half) * 2 * half, place = lane % half;
  return block + from + place + (lane / half % 2 ? LANES : 0);
}

template <int Half, int From, int... Lane>
static inline Vec halves(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, half_lane(Lane, Half, From)...);
}

// The sum of each of as many vectors as a vector has lanes.
template <int Half = LANES / 2>
static inline Vec sums(Vec* of) {
  if constexpr (Half > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    for (int i = 0; i < Half; i++) {
      Vec a = of[i], b = of[i + Half];
      of[i] = halves<Half, 0>(a, b, lanes) + halves<Half, Half>(a, b, lanes);
    }
    return sums<Half / 2>(of);
  } else {
    return of[0];
  }
}

// Numbers i of each vector become vector i.
template <int Half = LANES / 2>
static inline void transpose(Vec* of) {
  if constexpr (Half > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    for (int block = 0; block < LANES; block += 2 * Half) {
      for (int i = block; i < block + Half; i++) {
        Vec a = of[i], b = of[i + Half];
        of[i] = halves<Half, 0>(a, b, lanes);
        of[i + Half] = halves<Half, Half>(a, b, lanes);
      }
    }
    transpose<Half / 2>(of);
  }
}

// Writes rows of `dim` numbers, as many as a vector has lanes at most, side by side, times `by`: a
// vector for each dimension, `stride` numbers behind the one before.
template <class RowAt>
static inline void put_side_by_side(int rows, const RowAt& row_at, float by, int dim, float* to,
                                    int64_t stride) {
  for (int d = 0; d < dim; d += LANES) {
    const int some = dim - d < LANES ? dim - d : LANES;
    Vec numbers[LANES] = {};
    for (int row = 0; row < rows; row++) {
      const float* from = row_at(row) + d;
      numbers[row] = (some == LANES ? load(from) : load_some(from, some)) * by;
    }
    transpose(numbers);
    for (int i = 0; i < some; i++) store(to + (d + i) * stride, numbers[i]);
  }
}

}  // namespace chunks
