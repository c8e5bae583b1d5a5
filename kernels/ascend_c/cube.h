// The Cube core of attention.cpp: both products, by small tiles.
#pragma once
#include "tiles.h"

namespace fast_attention {

template <uint32_t D>
class Cube {
public:
    __aicore__ inline void Init(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR workspace, const Shape& all) {
        shape = all;
        queries.SetGlobalBuffer((__gm__ half*)q, static_cast<uint64_t>(shape.batch) * shape.heads * shape.queries * D);
        keys.SetGlobalBuffer((__gm__ half*)k, static_cast<uint64_t>(shape.batch) * shape.kvHeads * shape.keys * D);
        values.SetGlobalBuffer((__gm__ half*)v, static_cast<uint64_t>(shape.batch) * shape.kvHeads * shape.keys * D);
        exchange.Init(workspace, GetBlockIdx());
        pipe.InitBuffer(queriesL1, 1, LARGE * D * sizeof(half));
        pipe.InitBuffer(keysL1, 2, LARGE * D * sizeof(half));
        pipe.InitBuffer(valuesL1, 2, LARGE * D * sizeof(half));
        pipe.InitBuffer(weightsL1, 1, LARGE * LARGE * sizeof(half));
        pipe.InitBuffer(left, 2, SMALL * SMALL * sizeof(half));
        pipe.InitBuffer(right, 2, SMALL * SMALL * sizeof(half));
        pipe.InitBuffer(sums, 2, SMALL * SMALL * sizeof(float));
    }

    __aicore__ inline void Process() {
        uint32_t turn = 0;  // of the slots, over all blocks
        for (uint32_t index = GetBlockIdx(); index < shape.Blocks(); index += GetBlockNum()) {
            const Block block(shape, index);
            const uint64_t from = (static_cast<uint64_t>(block.head) * shape.queries + block.first) * D;
            LocalTensor<half> query = Load(queriesL1, queries[from], block.rows, D, D);
            Scores(block, 0, query, turn);
            for (uint32_t tile = 0; tile < block.Tiles(); ++tile, ++turn) {
                if (tile + 1 < block.Tiles()) Scores(block, tile + 1, query, turn + 1);
                Values(block, tile, turn);
            }
            queriesL1.FreeTensor(query);
        }
    }

private:
    using QueueA1 = TQue<TPosition::A1, 1>;
    using QueueB1 = TQue<TPosition::B1, 1>;

    // Rows of `width` numbers, `pitch` apart in memory, to L1 as fractals of 16 x 16, columns of them one after another.
    template <typename Queue>
    __aicore__ inline LocalTensor<half> Load(Queue& queue, const GlobalTensor<half>& from, uint32_t rows, uint32_t width, uint32_t pitch) {
        LocalTensor<half> to = queue.template AllocTensor<half>();
        Nd2NzParams params;
        params.ndNum = 1, params.nValue = rows, params.dValue = width;
        params.srcNdMatrixStride = 0, params.srcDValue = pitch;
        params.dstNzC0Stride = LARGE, params.dstNzNStride = 1, params.dstNzMatrixStride = 0;
        DataCopy(to, from, params);
        queue.EnQue(to);
        return queue.template DeQue<half>();
    }

    __aicore__ inline GlobalTensor<half> OfTile(const GlobalTensor<half>& all, const Block& block, uint32_t tile) const {
        return all[(static_cast<uint64_t>(block.kvHead) * shape.keys + tile * LARGE) * D];
    }

    __aicore__ inline void Scores(const Block& block, uint32_t tile, const LocalTensor<half>& query, uint32_t turn) {
        LocalTensor<half> key = Load(keysL1, OfTile(keys, block, tile), block.Columns(tile), D, D);
        for (uint32_t row = 0; row < block.rows; row += SMALL)
            for (uint32_t column = 0; column < block.Columns(tile); column += SMALL) {
                if (!block.Computed(tile, row, column)) continue;
                const uint32_t rows = AtMost(block.rows - row, SMALL);
                const uint32_t columns = UpTo(AtMost(block.Columns(tile) - column, SMALL), FRACTAL);
                LocalTensor<float> sum = sums.AllocTensor<float>();
                LoadLeft(query, row, rows, 0, D);
                LoadKeys(key, column, columns);
                Multiply(sum, rows, columns, D, true);
                Store(exchange.scores[exchange.Square(turn, row, column)], sum, rows, columns, LARGE);
            }
        keysL1.FreeTensor(key);
        CrossCoreSetFlag<CORES_OF_ONE, PIPE_FIX>(SCORES);
    }

    __aicore__ inline void Values(const Block& block, uint32_t tile, uint32_t turn) {
        LocalTensor<half> value = Load(valuesL1, OfTile(values, block, tile), block.Columns(tile), D, D);
        CrossCoreWaitFlag(WEIGHTS);
        const uint32_t width = UpTo(block.Columns(tile), FRACTAL);
        LocalTensor<half> weight = Load(weightsL1, exchange.weights[exchange.Square(turn, 0, 0)], block.rows, width, LARGE);
        for (uint32_t row = 0; row < block.rows; row += SMALL) {
            if (!block.Computed(tile, row, 0)) continue;
            const uint32_t rows = AtMost(block.rows - row, SMALL);
            LocalTensor<float> sum = sums.AllocTensor<float>();
            for (uint32_t column = 0; column < block.Columns(tile); column += SMALL) {
                if (!block.Computed(tile, row, column)) continue;
                const uint32_t depth = AtMost(block.Columns(tile) - column, SMALL);
                LoadLeft(weight, row, rows, column, depth);
                LoadValues(value, column, depth);
                Multiply(sum, rows, D, depth, column == 0);
            }
            Store(exchange.products[exchange.Row(turn, row)], sum, rows, D, D);
        }
        weightsL1.FreeTensor(weight);
        valuesL1.FreeTensor(value);
        CrossCoreSetFlag<CORES_OF_ONE, PIPE_FIX>(VALUES);
    }

    // L0A wants fractals row by row, L1 has them column by column.
    __aicore__ inline void LoadLeft(const LocalTensor<half>& from, uint32_t row, uint32_t rows, uint32_t column, uint32_t depth) {
        LocalTensor<half> to = left.AllocTensor<half>();
        LoadData2DParams params;
        params.repeatTimes = UpTo(depth, FRACTAL) / FRACTAL;
        params.srcStride = LARGE / FRACTAL;
        for (uint32_t down = 0; down * FRACTAL < rows; ++down) {
            params.startIndex = column / FRACTAL * (LARGE / FRACTAL) + row / FRACTAL + down;
            LoadData(to[down * params.repeatTimes * FRACTAL_SIZE], from, params);
        }
        left.EnQue(to);
    }

    // K^T to L0B, where a fractal is column by column: it is one of K as it lies.
    __aicore__ inline void LoadKeys(const LocalTensor<half>& from, uint32_t row, uint32_t rows) {
        LocalTensor<half> to = right.AllocTensor<half>();
        LoadData2DParams params;
        params.repeatTimes = rows / FRACTAL;
        params.srcStride = 1;
        for (uint32_t down = 0; down < D / FRACTAL; ++down) {
            params.startIndex = down * (LARGE / FRACTAL) + row / FRACTAL;
            LoadData(to[down * params.repeatTimes * FRACTAL_SIZE], from, params);
        }
        right.EnQue(to);
    }

    // V to L0B: each fractal is transposed.
    __aicore__ inline void LoadValues(const LocalTensor<half>& from, uint32_t row, uint32_t rows) {
        LocalTensor<half> to = right.AllocTensor<half>();
        LoadData2DParams params;
        params.repeatTimes = D / FRACTAL;
        params.srcStride = LARGE / FRACTAL;
        params.ifTranspose = true;
        for (uint32_t down = 0; down * FRACTAL < rows; ++down) {
            params.startIndex = row / FRACTAL + down;
            LoadData(to[down * (D / FRACTAL) * FRACTAL_SIZE], from, params);
        }
        right.EnQue(to);
    }

    __aicore__ inline void Multiply(const LocalTensor<float>& sum, uint32_t rows, uint32_t columns, uint32_t depth, bool first) {
        LocalTensor<half> a = left.DeQue<half>(), b = right.DeQue<half>();
        MmadParams params;
        params.m = UpTo(rows, FRACTAL);  // a single row would be taken for a vector
        params.n = columns, params.k = depth, params.cmatrixInitVal = first;
        Mmad(sum, a, b, params);
        PipeBarrier<PIPE_M>();
        left.FreeTensor(a);
        right.FreeTensor(b);
    }

    __aicore__ inline void Store(const GlobalTensor<float>& to, LocalTensor<float>& sum, uint32_t rows, uint32_t columns, uint32_t pitch) {
        sums.EnQue(sum);
        LocalTensor<float> done = sums.DeQue<float>();
        FixpipeParamsV220 params;
        params.nSize = columns, params.mSize = rows, params.srcStride = UpTo(rows, FRACTAL), params.dstStride = pitch;
        params.ndNum = 1, params.srcNdStride = 0, params.dstNdStride = 0;
        Fixpipe<float, float, CFG_ROW_MAJOR>(to, done, params);
        sums.FreeTensor(done);
    }

    Shape shape;
    Exchange<D> exchange;
    GlobalTensor<half> queries, keys, values;
    TPipe pipe;
    QueueA1 queriesL1, weightsL1;
    QueueB1 keysL1, valuesL1;
    TQue<TPosition::A2, 1> left;
    TQue<TPosition::B2, 1> right;
    TQue<TPosition::CO1, 1> sums;
};

}  // namespace fast_attention
