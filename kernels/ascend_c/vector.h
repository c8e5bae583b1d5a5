// A Vector core of attention.cpp: the online softmax, by strips of rows.
#pragma once
#include "tiles.h"

namespace fast_attention {

template <uint32_t D>
class Vector {
public:
    __aicore__ inline void Init(GM_ADDR mask, GM_ADDR workspace, GM_ADDR out, GM_ADDR lse, const Shape& all) {
        shape = all;
        const uint64_t rows = static_cast<uint64_t>(shape.batch) * shape.heads * shape.queries;
        outputs.SetGlobalBuffer((__gm__ half*)out, rows * D);
        lses.SetGlobalBuffer((__gm__ float*)lse, rows);
        hidden.SetGlobalBuffer((__gm__ half*)mask, TEMPLATE * TEMPLATE);
        exchange.Init(workspace, GetBlockIdx() / 2);
        pipe.InitBuffer(scores, 2, STRIP * LARGE * sizeof(float));
        pipe.InitBuffer(masks, 2, STRIP * SMALL * sizeof(half));
        pipe.InitBuffer(weights, 2, STRIP * LARGE * sizeof(half));
        pipe.InitBuffer(products, 2, STRIP * D * sizeof(float));
        pipe.InitBuffer(results, 2, STRIP * D * sizeof(half));
        pipe.InitBuffer(ends, 1, HALF * sizeof(float));
        pipe.InitBuffer(sumsBuffer, HALF * D * sizeof(float));
        pipe.InitBuffer(maskBuffer, STRIP * SMALL * sizeof(float));
        pipe.InitBuffer(foldBuffer, STRIP * LANES * sizeof(float));
        pipe.InitBuffer(rowBuffer, 5 * HALF * sizeof(float));
        pipe.InitBuffer(spreadBuffer, STRIP * BLOCK);
        sums = sumsBuffer.Get<float>();
        wideMask = maskBuffer.Get<float>();
        folded = foldBuffer.Get<float>();
        spread = spreadBuffer.Get<float>();
        LocalTensor<float> all5 = rowBuffer.Get<float>();
        largest = all5[0], total = all5[HALF], shrinks = all5[2 * HALF], fresh = all5[4 * HALF];
    }

    __aicore__ inline void Process() {
        uint32_t turn = 0;
        for (uint32_t index = GetBlockIdx() / 2; index < shape.Blocks(); index += GetBlockNum()) {
            const Block block(shape, index);
            // Each of the two takes half of the rows, in whole strips.
            const uint32_t half = UpTo((block.rows + 1) / 2, STRIP);
            start = GetSubBlockIdx() * half;
            rows = start < block.rows ? AtMost(block.rows - start, half) : 0;
            Duplicate(largest, NOTHING, HALF);
            Duplicate(total, 0.0f, HALF);
            Duplicate(sums, 0.0f, HALF * D);
            PipeBarrier<PIPE_V>();
            for (uint32_t tile = 0; tile < block.Tiles(); ++tile, ++turn) {
                CrossCoreWaitFlag(SCORES);
                for (uint32_t row = 0; row < rows; row += STRIP) Soften(block, tile, row, AtMost(rows - row, STRIP), turn);
                CrossCoreSetFlag<CORES_OF_ONE, PIPE_MTE3>(WEIGHTS);
                if (tile > 0) Collect(block, tile - 1, turn - 1);
            }
            Collect(block, block.Tiles() - 1, turn - 1);
            Finish(block);
        }
    }

private:
    // A strip of scores becomes weights relative to the largest score so far; what was summed before shrinks. `row` counts from `start`.
    __aicore__ inline void Soften(const Block& block, uint32_t tile, uint32_t row, uint32_t count, uint32_t turn) {
        const uint32_t columns = block.Columns(tile), width = UpTo(columns, LANES);
        LocalTensor<float> strip = LoadScores(block, tile, row, count, turn);
        Muls(strip, strip, shape.scale, count * width);
        PipeBarrier<PIPE_V>();
        Hide(strip, block, tile, row, count);
        Fold(strip, count, width, true);
        WholeReduceMax(fresh, folded, LANES, count, 1, 1, LANES * sizeof(float) / BLOCK, ReduceOrder::ORDER_ONLY_VALUE);
        PipeBarrier<PIPE_V>();
        LocalTensor<float> before = largest[row], shrink = shrinks[turn % 2 * HALF + row], sum = total[row];
        Max(fresh, fresh, before, count);
        PipeBarrier<PIPE_V>();
        Sub(shrink, before, fresh, count);
        PipeBarrier<PIPE_V>();
        Exp(shrink, shrink, count);
        Adds(before, fresh, 0.0f, count);
        Spread(fresh, count);
        for (uint32_t lane = 0; lane < width; lane += LANES) Sub(strip[lane], strip[lane], spread, LANES, count, PerRow(width));
        PipeBarrier<PIPE_V>();
        Exp(strip, strip, count * width);
        PipeBarrier<PIPE_V>();
        Fold(strip, count, width, false);
        WholeReduceSum(fresh, folded, LANES, count, 1, 1, LANES * sizeof(float) / BLOCK);
        Mul(sum, sum, shrink, count);
        PipeBarrier<PIPE_V>();
        Add(sum, sum, fresh, count);
        PipeBarrier<PIPE_V>();
        StoreWeights(strip, row, count, width, turn);
    }

    // Columns that Cube has left out are not read; they are hidden, and filled in `Hide`.
    __aicore__ inline LocalTensor<float> LoadScores(const Block& block, uint32_t tile, uint32_t row, uint32_t count, uint32_t turn) {
        const uint32_t width = UpTo(block.Columns(tile), LANES);
        LocalTensor<float> strip = scores.AllocTensor<float>();
        for (uint32_t column = 0; column < block.Columns(tile); column += SMALL) {
            const uint32_t across = AtMost(block.Columns(tile) - column, SMALL);
            if (shape.Look(block.Distance(tile, start + row, column), count, across) == Kind::HIDDEN) continue;
            const uint32_t length = UpTo(across, FRACTAL) * sizeof(float) / BLOCK;
            DataCopyParams params;
            params.blockCount = count, params.blockLen = length;
            params.srcStride = LARGE * sizeof(float) / BLOCK - length, params.dstStride = width * sizeof(float) / BLOCK - length;
            DataCopy(strip[column], exchange.scores[exchange.Square(turn, start + row, column)], params);
        }
        scores.EnQue(strip);
        return scores.DeQue<float>();
    }

    // What the tiling mask hides, and what lies beyond the last key.
    __aicore__ inline void Hide(LocalTensor<float>& strip, const Block& block, uint32_t tile, uint32_t row, uint32_t count) {
        const uint32_t columns = block.Columns(tile), width = UpTo(columns, LANES);
        const uint8_t pitch = width * sizeof(float) / BLOCK;
        for (uint32_t column = 0; column < columns; column += SMALL) {
            const uint32_t across = AtMost(columns - column, SMALL);
            const int32_t distance = block.Distance(tile, start + row, column);
            const Kind kind = shape.Look(distance, count, across);
            if (kind == Kind::MIXED) AddMask(strip[column], distance, count, UpTo(across, FRACTAL), width);
            for (uint32_t lane = 0; kind == Kind::HIDDEN && lane < UpTo(across, LANES); lane += LANES)
                Duplicate(strip[column + lane], NOTHING, LANES, count, 1, pitch);
        }
        PipeBarrier<PIPE_V>();
        if (columns == width) return;
        uint64_t beyond[2] = {~0ULL << columns % LANES, 0};
        Duplicate(strip[width - LANES], NOTHING, beyond, count, 1, pitch);
        PipeBarrier<PIPE_V>();
    }

    // The mask of a piece is a view of the template: u = distance and v = 0, or the other way round if it is negative.
    __aicore__ inline void AddMask(const LocalTensor<float>& strip, int32_t distance, uint32_t count, uint32_t across, uint32_t width) {
        const uint32_t down = distance >= 0 ? distance : 0, right = distance >= 0 ? 0 : -distance;
        DataCopyParams params;
        params.blockCount = count, params.blockLen = across * sizeof(half) / BLOCK;
        params.srcStride = TEMPLATE * sizeof(half) / BLOCK - params.blockLen;
        params.dstStride = SMALL * sizeof(half) / BLOCK - params.blockLen;
        LocalTensor<half> view = masks.AllocTensor<half>();
        DataCopy(view, hidden[down * TEMPLATE + right], params);
        masks.EnQue(view);
        view = masks.DeQue<half>();
        Cast(wideMask, view, RoundMode::CAST_NONE, count * SMALL);
        masks.FreeTensor(view);
        PipeBarrier<PIPE_V>();
        Muls(wideMask, wideMask, NOTHING, count * SMALL);
        PipeBarrier<PIPE_V>();
        const uint8_t pitch = width * sizeof(float) / BLOCK, own = SMALL * sizeof(float) / BLOCK;
        for (uint32_t lane = 0; lane < across; lane += LANES)
            Add(strip[lane], strip[lane], wideMask[lane], AtMost(across - lane, LANES), count, {1, 1, 1, pitch, pitch, own});
        PipeBarrier<PIPE_V>();
    }

    // [count,width] -> [count,64] in `folded`: the maximum or the sum of the columns 64 apart.
    __aicore__ inline void Fold(const LocalTensor<float>& strip, uint32_t count, uint32_t width, bool maximum) {
        const uint8_t pitch = width * sizeof(float) / BLOCK, own = LANES * sizeof(float) / BLOCK;
        Adds(folded, strip, 0.0f, LANES, count, {1, 1, own, pitch});
        PipeBarrier<PIPE_V>();
        for (uint32_t lane = LANES; lane < width; lane += LANES) {
            if (maximum)
                Max(folded, folded, strip[lane], LANES, count, {1, 1, 1, own, own, pitch});
            else
                Add(folded, folded, strip[lane], LANES, count, {1, 1, 1, own, own, pitch});
            PipeBarrier<PIPE_V>();
        }
    }

    // Each number of a row fills a block of 32 bytes of `spread`, which operations with `PerRow` read again and again.
    __aicore__ inline void Spread(const LocalTensor<float>& numbers, uint32_t count) {
        Brcb(spread, numbers, UpTo(count, 8) / 8, {1, 8});
        PipeBarrier<PIPE_V>();
    }
    __aicore__ inline BinaryRepeatParams PerRow(uint32_t width) const {
        const uint8_t pitch = width * sizeof(float) / BLOCK;
        return {1, 1, 0, pitch, pitch, 1};
    }

    __aicore__ inline void StoreWeights(LocalTensor<float>& strip, uint32_t row, uint32_t count, uint32_t width, uint32_t turn) {
        LocalTensor<half> weight = weights.AllocTensor<half>();
        Cast(weight, strip, RoundMode::CAST_RINT, count * width);
        scores.FreeTensor(strip);
        weights.EnQue(weight);
        weight = weights.DeQue<half>();
        DataCopyParams params;
        params.blockCount = count, params.blockLen = width * sizeof(half) / BLOCK;
        params.srcStride = 0, params.dstStride = (LARGE - width) * sizeof(half) / BLOCK;
        DataCopy(exchange.weights[exchange.Square(turn, start + row, 0)], weight, params);
        weights.FreeTensor(weight);
    }

    // sums = sums * shrink + products of a tile. Rows that see nothing of it have no products and do not shrink.
    __aicore__ inline void Collect(const Block& block, uint32_t tile, uint32_t turn) {
        CrossCoreWaitFlag(VALUES);
        for (uint32_t row = 0; row < rows; row += STRIP) {
            const uint32_t count = AtMost(rows - row, STRIP);
            if (!block.Computed(tile, (start + row) / SMALL * SMALL, 0)) continue;
            LocalTensor<float> product = products.AllocTensor<float>();
            DataCopy(product, exchange.products[exchange.Row(turn, start + row)], count * D);
            products.EnQue(product);
            product = products.DeQue<float>();
            Spread(shrinks[turn % 2 * HALF + row], count);
            for (uint32_t lane = 0; lane < D; lane += LANES)
                Mul(sums[row * D + lane], sums[row * D + lane], spread, LANES, count, PerRow(D));
            PipeBarrier<PIPE_V>();
            Add(sums[row * D], sums[row * D], product, count * D);
            PipeBarrier<PIPE_V>();
            products.FreeTensor(product);
        }
    }

    __aicore__ inline void Finish(const Block& block) {
        if (rows == 0) return;
        const uint64_t first = static_cast<uint64_t>(block.head) * shape.queries + block.first + start;
        for (uint32_t row = 0; row < rows; row += STRIP) {
            const uint32_t count = AtMost(rows - row, STRIP);
            Spread(total[row], count);
            for (uint32_t lane = 0; lane < D; lane += LANES)
                Div(sums[row * D + lane], sums[row * D + lane], spread, LANES, count, PerRow(D));
            PipeBarrier<PIPE_V>();
            LocalTensor<half> result = results.AllocTensor<half>();
            Cast(result, sums[row * D], RoundMode::CAST_RINT, count * D);
            results.EnQue(result);
            result = results.DeQue<half>();
            DataCopy(outputs[(first + row) * D], result, count * D);
            results.FreeTensor(result);
        }
        LocalTensor<float> end = ends.AllocTensor<float>();
        Ln(end, total, rows);
        PipeBarrier<PIPE_V>();
        Add(end, end, largest, rows);
        ends.EnQue(end);
        end = ends.DeQue<float>();
        DataCopyPad(lses[first], end, DataCopyExtParams{1, static_cast<uint32_t>(rows * sizeof(float)), 0, 0, 0});
        ends.FreeTensor(end);
    }

    Shape shape;
    Exchange<D> exchange;
    GlobalTensor<half> outputs, hidden;
    GlobalTensor<float> lses;
    TPipe pipe;
    TQue<TPosition::VECIN, 1> scores, masks, products;
    TQue<TPosition::VECOUT, 1> weights, results, ends;
    TBuf<TPosition::VECCALC> sumsBuffer, maskBuffer, foldBuffer, rowBuffer, spreadBuffer;
    LocalTensor<float> sums, wideMask, folded, spread, largest, total, shrinks, fresh;
    uint32_t start, rows;
};

}  // namespace fast_attention
