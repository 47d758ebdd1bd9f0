// From a batch of cells to tiles: the list that every layer uses in its forward and backward.
#pragma once

#include <vector>

#include "../cpu/schedule.h"
#include "attention.h"

namespace scfm::cuda {

struct TileList {
  std::vector<Tile> tiles;  // query tiles, then key tiles
  int32_t n_query_tiles = 0, n_key_tiles = 0;
};

// Tiles of every cell's queries, and of the keys that every query of the cell attends to; those with the most work first, so
// that no multiprocessor is left with a long one at the end. A cell without queries keeps its key tiles, which write zeros.
TileList list_tiles(const Cells&);

}  // namespace scfm::cuda
