// Writing into an array where it is.
#pragma once

#include <cstdint>
#include <cstring>

namespace chunks {

// Puts rows of so many bytes where `places` says, in rows of the array; other places drop one.
inline void put_rows(char* array, int64_t rows, const char* added, const int32_t* places,
                     int64_t count, int64_t bytes) {
  for (int64_t i = 0; i < count; i++) {
    int64_t place = places[i];
    if (place < 0 || place >= rows) continue;
    std::memcpy(array + place * bytes, added + i * bytes, bytes);
  }
}

}  // namespace chunks
