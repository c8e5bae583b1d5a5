// The tiles of attention.cpp: which are computed, and where their numbers lie between the cores.
#pragma once
#include "kernel_operator.h"

namespace fast_attention {

using namespace AscendC;

constexpr uint32_t LARGE = 256;  // edge of a large tile: rows are queries, columns keys
constexpr uint32_t SMALL = 128;  // edge of a small tile, for L0A, L0B and L0C
constexpr uint32_t STRIP = 16;   // rows that Vector takes at a time
constexpr uint32_t HALF = LARGE / 2;
constexpr uint32_t TEMPLATE = 2 * SMALL;  // edge of the tiling mask: masks are laid on small tiles and narrower, so M = SMALL
constexpr uint32_t FRACTAL = 16, FRACTAL_SIZE = 256, LANES = 64, BLOCK = 32;
constexpr float NOTHING = -3.0e38f;  // the score of what is hidden; every query sees key 0, so that a row's maximum is above it
constexpr uint16_t SCORES = 0, WEIGHTS = 1, VALUES = 2;
constexpr uint8_t CORES_OF_ONE = 2;  // mode of flags between the Cube and the Vector cores of an AI core

__aicore__ inline uint32_t UpTo(uint32_t value, uint32_t unit) { return (value + unit - 1) / unit * unit; }
__aicore__ inline uint32_t AtMost(uint32_t value, uint32_t most) { return value < most ? value : most; }

enum class Kind { HIDDEN, MIXED, VISIBLE };

struct Shape {
    uint32_t batch, heads, kvHeads, queries, keys, qOffset, causal;
    float scale;

    __aicore__ inline uint32_t Blocks() const { return batch * heads * RowBlocks(); }
    __aicore__ inline uint32_t RowBlocks() const { return (queries + LARGE - 1) / LARGE; }

    // Rows standing `distance` after the columns: ../tiling.py, `view`.
    __aicore__ inline Kind Look(int32_t distance, uint32_t rows, uint32_t columns) const {
        if (!causal || distance >= static_cast<int32_t>(columns) - 1) return Kind::VISIBLE;
        return distance <= -static_cast<int32_t>(rows) ? Kind::HIDDEN : Kind::MIXED;
    }
};

// A block of queries of one head. Rows and columns of its tiles are counted from the tile's own.
struct Block {
    Shape shape;
    uint32_t head, kvHead, first, rows;

    __aicore__ inline Block(const Shape& all, uint32_t index) : shape(all) {
        head = index / all.RowBlocks();
        kvHead = head / all.heads * all.kvHeads + head % all.heads / (all.heads / all.kvHeads);
        first = index % all.RowBlocks() * LARGE;
        rows = AtMost(all.queries - first, LARGE);
    }
    __aicore__ inline uint32_t Columns(uint32_t tile) const { return AtMost(shape.keys - tile * LARGE, LARGE); }
    __aicore__ inline uint32_t Tiles() const {
        const uint32_t seen = shape.causal ? AtMost(shape.keys, shape.qOffset + first + rows) : shape.keys;
        return (seen + LARGE - 1) / LARGE;
    }
    __aicore__ inline int32_t Distance(uint32_t tile, uint32_t row, uint32_t column) const {
        return static_cast<int32_t>(shape.qOffset + first + row) - static_cast<int32_t>(tile * LARGE + column);
    }
    __aicore__ inline bool Computed(uint32_t tile, uint32_t row, uint32_t column) const {
        const uint32_t down = AtMost(rows - row, SMALL), across = AtMost(Columns(tile) - column, SMALL);
        return shape.Look(Distance(tile, row, column), down, across) != Kind::HIDDEN;
    }
};

// What the cores of one AI core hand each other, in memory: two slots of each.
template <uint32_t D>
struct Exchange {
    GlobalTensor<float> scores, products;
    GlobalTensor<half> weights;

    static constexpr uint64_t BYTES = 2 * (LARGE * LARGE * (sizeof(float) + sizeof(half)) + LARGE * D * sizeof(float));

    __aicore__ inline void Init(GM_ADDR workspace, uint32_t core) {
        GM_ADDR from = workspace + core * BYTES;
        scores.SetGlobalBuffer((__gm__ float*)from, 2 * LARGE * LARGE);
        products.SetGlobalBuffer((__gm__ float*)(from + 2 * LARGE * LARGE * sizeof(float)), 2 * LARGE * D);
        weights.SetGlobalBuffer((__gm__ half*)(from + 2 * LARGE * (LARGE + D) * sizeof(float)), 2 * LARGE * LARGE);
    }
    __aicore__ inline uint64_t Square(uint32_t turn, uint32_t row, uint32_t column) const {
        return (turn % 2 * LARGE + row) * LARGE + column;
    }
    __aicore__ inline uint64_t Row(uint32_t turn, uint32_t row) const { return (turn % 2 * LARGE + row) * D; }
};

}  // namespace fast_attention
