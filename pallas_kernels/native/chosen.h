// Tiles of what rows have chosen: `pallas_kernels.selection.chosen_tiles`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace chunks {

struct Chosen {
  int64_t rows, width, columns;
  const int32_t* chosen;  // [rows, width]: columns, of which a row's first `counts` are looked at
  const int32_t* counts;  // [rows]
  const int32_t* tables;  // [rows, columns]: the chunks there
};

struct Tiles {
  int64_t most, size;  // room for tiles, and for rows of one
  int32_t* chunks;     // [most]
  int32_t* rows;       // [most, size]
  int32_t* count;      // how many there are, also where there is no room for all
};

// Each chunk with the rows that have chosen it, in the order of the chunks' numbers: where there are
// more rows than a tile has room for there are more tiles.
static inline void make_tiles(const Chosen& chosen, int32_t no_chunk, const Tiles& tiles) {
  std::vector<uint64_t> all;
  for (int64_t row = 0; row < chosen.rows; row++) {
    const int64_t count = std::clamp<int64_t>(chosen.counts[row], 0, chosen.width);
    for (int64_t i = 0; i < count; i++) {
      const int64_t column = chosen.chosen[row * chosen.width + i];
      if (column < 0 || column >= chosen.columns) continue;
      const uint32_t chunk = chosen.tables[row * chosen.columns + column];
      all.push_back((uint64_t)chunk << 32 | row);
    }
  }
  std::sort(all.begin(), all.end());
  std::fill_n(tiles.chunks, tiles.most, no_chunk);
  std::fill_n(tiles.rows, tiles.most * tiles.size, (int32_t)chosen.rows);
  int64_t tile = -1, place = 0;
  for (size_t i = 0; i < all.size(); i++, place++) {
    if (i == 0 || all[i] >> 32 != all[i - 1] >> 32 || place == tiles.size) tile++, place = 0;
    if (tile >= tiles.most) continue;
    tiles.chunks[tile] = (int32_t)(all[i] >> 32);
    tiles.rows[tile * tiles.size + place] = (int32_t)all[i];
  }
  *tiles.count = tile + 1;
}

}  // namespace chunks
