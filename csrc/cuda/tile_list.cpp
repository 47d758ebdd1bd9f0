#include "tile_list.h"

#include <algorithm>

namespace scfm::cuda {

namespace {

// One side of one cell, cut into tiles. `own` counts from the start of the side.
void cut(std::vector<Tile>& tiles, Tile side, int32_t count, int32_t own) {
  const int32_t begin = side.begin;
  for (int32_t first = 0; first < count; first += kTileRows) {
    side.begin = begin + first;
    side.count = std::min(kTileRows, count - first);
    side.own = std::clamp(own - first, 0, side.count);
    tiles.push_back(side);
  }
}

void longest_first(std::vector<Tile>::iterator begin, std::vector<Tile>::iterator end) {
  std::stable_sort(begin, end, [](const Tile& a, const Tile& b) { return a.n_other > b.n_other; });
}

}  // namespace

TileList list_tiles(const Cells& cells) {
  TileList list;
  std::vector<Tile> key_tiles;
  for (size_t cell = 0; cell + 1 < cells.query.size(); cell++) {
    const auto query = static_cast<int32_t>(cells.query[cell]), key = static_cast<int32_t>(cells.key[cell]);
    const auto n_queries = static_cast<int32_t>(cells.query[cell + 1] - cells.query[cell]);
    const auto n_all = static_cast<int32_t>(cells.key[cell + 1] - cells.key[cell]);
    const int32_t n_keys = cells.n_known.empty() ? n_all : static_cast<int32_t>(cells.n_known[cell]);
    Tile side{};
    side.cell = static_cast<int32_t>(cell);
    side.begin = query, side.other_begin = key, side.n_other = n_keys;
    cut(list.tiles, side, n_queries, cells.n_known.empty() ? n_queries : n_keys);
    side.begin = key, side.other_begin = query, side.n_other = n_queries;
    cut(key_tiles, side, n_keys, n_keys);
  }
  list.n_query_tiles = static_cast<int32_t>(list.tiles.size());
  list.n_key_tiles = static_cast<int32_t>(key_tiles.size());
  list.tiles.insert(list.tiles.end(), key_tiles.begin(), key_tiles.end());
  longest_first(list.tiles.begin(), list.tiles.begin() + list.n_query_tiles);
  longest_first(list.tiles.begin() + list.n_query_tiles, list.tiles.end());
  return list;
}

}  // namespace scfm::cuda
