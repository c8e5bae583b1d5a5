// Flash attention for Volta: forward, and the gradients of Q, K and V in a kernel each. README.md has the budget and the fragment maps.
//
// All of them are one walk: a block owns 128 rows, a warp 32 of them; it goes over tiles of columns, forms scores = rows * columns^T,
// turns them into weights in registers and adds weights * columns to its result.
//
//   kernel          rows     columns  scores   weights                       result
//   volta_forward   Q        K, V     Q K^T    P, by online softmax          O  = P V
//   volta_grad_q    Q, dO    K, V     Q K^T    dS = P * (dO V^T - delta)     dQ = dS K
//   volta_grad_k    K, V     Q, dO    K Q^T    dS^T = P^T * (V dO^T - delta) dK = dS^T Q
//   volta_grad_v    K        Q, dO    K Q^T    P^T                           dV = P^T dO
//
// No result is shared by two blocks, so nothing is atomic and every run gives the same bits.
#ifdef __CUDACC__
#include "device.cuh"
#else
#include "device.h"
#endif
#include "tile.cuh"

enum Kind { FORWARD, GRAD_Q, GRAD_K, GRAD_V };

DEVICE int2 seen_by(const Args& args, int row) {
    const int2 none = make_int2(0x7fffffff, 0);
    if (row >= args.rows) return none;
    int2 seen = load_pair(args.seen + 2 * (blockIdx.z * args.seen_batch + row));
    return seen.x < seen.y ? seen : none;
}

// The block's rows, into the tile at byte `to`; times `by` if it is not 0.
DEVICE void load_rows(const View& view, int row0, int rows, u32 to, float by) {
    const int chunk = thread_now() % CHUNKS, row = thread_now() / CHUNKS;
    const long long from = blockIdx.z * view.batch + blockIdx.y * view.head;
    UNROLL for (int at = 0; at < ROWS; at += THREADS / CHUNKS) {
        uint4 value = load_global(view, from + (row0 + at + row) * view.row + chunk * 8, row0 + at + row < rows);
        if (by != 0) value = make_uint4(times(value.x, by), times(value.y, by), times(value.z, by), times(value.w, by));
        store_shared(to + chunk_at(row_start(row), chunk) + at * ROW_BYTES, value, true);
    }
}

// The running maximum (in powers of two) and sum of exponentials of a row.
struct Softmax {
    float top, sum;

    DEVICE Softmax() : top(-infinity()), sum(0) {}

    // Takes in a new maximum; returns by what sums up to now are to be multiplied, and in `shift` what to subtract from exponents.
    DEVICE float raise(float to, float& shift) {
        float before = top;
        top = fmaxf(top, to);
        shift = top == -infinity() ? 0 : top;
        float factor = power_of_two(before - shift);
        sum *= factor;
        return factor;
    }
};

// Online softmax of a tile summed in fp32. Each row's numbers lie in two lanes.
template <int BLOCKS>
DEVICE void soften(float (&scores)[BLOCKS][8], u32 (&weights)[BLOCKS][4], Softmax (&rows)[2], float (&factor)[2], float scale2,
                   const Lane& lane) {
    float top[2] = {-infinity(), -infinity()}, shift[2];
    UNROLL for (int j = 0; j < BLOCKS; ++j)
        UNROLL for (int v = 0; v < 8; ++v) top[v >> 1 & 1] = fmaxf(top[v >> 1 & 1], scores[j][v]);
    UNROLL for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(top[r], exchange(top[r], 2));
        factor[r] = rows[r].raise(top[r] * scale2, shift[r]);
    }
    UNROLL for (int j = 0; j < BLOCKS; ++j) {
        UNROLL for (int v = 0; v < 8; ++v) {
            scores[j][v] = power_of_two(fmaf(scores[j][v], scale2, -shift[v >> 1 & 1]));
            rows[v >> 1 & 1].sum += scores[j][v];
        }
        to_operand(scores[j], weights[j], lane);
    }
}

// The same for a tile summed in fp16. A lane holds a row of its own, in the order of a left operand: no exchange at all.
template <int BLOCKS>
DEVICE void soften(u32 (&scores)[BLOCKS][4], u32 (&weights)[BLOCKS][4], Softmax (&rows)[2], float (&factor)[2], float scale2,
                   const Lane& lane) {
    float top = -infinity(), shift;
    UNROLL for (int j = 0; j < BLOCKS; ++j)
        UNROLL for (int i = 0; i < 4; ++i) top = fmaxf(top, fmaxf(unpack(scores[j][i]).x, unpack(scores[j][i]).y));
    float own = rows[0].raise(top * scale2, shift);
    UNROLL for (int r = 0; r < 2; ++r) factor[r] = from_lane(own, lane.row(r));
    UNROLL for (int j = 0; j < BLOCKS; ++j)
        UNROLL for (int i = 0; i < 4; ++i) {
            float2 pair = unpack(scores[j][i]);
            pair.x = power_of_two(fmaf(pair.x, scale2, -shift)), pair.y = power_of_two(fmaf(pair.y, scale2, -shift));
            rows[0].sum += pair.x + pair.y;
            weights[j][i] = pack(pair.x, pair.y);
        }
}

DEVICE void hide(float (&sums)[8], int column, const int2 (&seen)[2], float hidden, const Lane& lane) {
    UNROLL for (int v = 0; v < 8; ++v) {
        int at = column + lane.column(v), r = v >> 1 & 1;
        if (at < seen[r].x || at >= seen[r].y) sums[v] = hidden;
    }
}

DEVICE void hide(u32 (&sums)[4], int column, const int2 (&seen)[2], float hidden, const Lane& lane) {
    const int2 own = lane.odd ? seen[1] : seen[0];
    UNROLL for (int i = 0; i < 4; ++i) {
        int at = column + 2 * i;
        float2 pair = unpack(sums[i]);
        sums[i] = pack(at < own.x || at >= own.y ? hidden : pair.x, at + 1 < own.x || at + 1 >= own.y ? hidden : pair.y);
    }
}

struct WideScores {
    typedef float Sum[8];
    DEVICE static void multiply(Sum& c, u32 a0, u32 a1, u32 b0, u32 b1) { mma_row_col(c, a0, a1, b0, b1); }
};

struct HalfScores {
    typedef u32 Sum[4];
    DEVICE static void multiply(Sum& c, u32 a0, u32 a1, u32 b0, u32 b1) { mma_row_col_half(c, a0, a1, b0, b1); }
};

// Statistics of the queries of a head: of every 32 those for scores, then those for slopes (args.cuh).
DEVICE const float* statistics_of(const Args& args, int query_head) {
    return args.statistics + 2 * (long long)(blockIdx.z * args.query_heads + query_head) * args.padded;
}

// Starts a block of sums from a statistic of their columns, in memory, or of their rows.
DEVICE void start(float (&sums)[8], const float* columns, const float (&rows)[2], bool by_column) {
    UNROLL for (int v = 0; v < 8; v += 4) {
        const float2 pair = by_column ? load_pair(columns + v) : make_float2(0, 0);
        UNROLL for (int r = 0; r < 2; ++r) {
            sums[v + 2 * r] = by_column ? pair.x : rows[r];
            sums[v + 2 * r + 1] = by_column ? pair.y : rows[r];
        }
    }
}

// The result, times a factor for each of the lane's rows, to global memory: a lane writes the row that is its own.
DEVICE void write(const Args& args, float (&result)[CHUNKS / 2][2][8], const float (&factor)[2], int row, const Lane& lane) {
    const long long to = blockIdx.z * args.out.batch + blockIdx.y * args.out.head + row * args.out.row;
    UNROLL for (int pair = 0; pair < CHUNKS / 2; ++pair) {
        u32 halves[2][4];
        UNROLL for (int u = 0; u < 2; ++u) {
            UNROLL for (int v = 0; v < 8; ++v) result[pair][u][v] *= factor[v >> 1 & 1];
            to_operand(result[pair][u], halves[u], lane);
        }
        if (row < args.rows) {
            store_global(args.out, to + 16 * pair, make_uint4(halves[0][0], halves[0][1], halves[1][0], halves[1][1]));
            store_global(args.out, to + 16 * pair + 8, make_uint4(halves[0][2], halves[0][3], halves[1][2], halves[1][3]));
        }
    }
}

// Which of the row tiles is this block's. Later queries see more keys: they start first, so that no long block is left for the end.
template <bool BY_KEY>
DEVICE int row_tile() {
    const int tile = afresh(blockIdx.x);
    return BY_KEY ? tile : (int)gridDim.x - 1 - tile;
}

template <bool BY_KEY>
DEVICE int first_row() {
    return row_tile<BY_KEY>() * ROWS;
}

// The first step of `columns` columns of which some row of the block sees one, and the end of them. Read when needed: registers are short.
template <bool BY_KEY>
DEVICE int2 steps_of(const Args& args, int columns) {
    const int2 reach = load_pair(args.reach + 2 * (blockIdx.z * args.reach_batch + row_tile<BY_KEY>()));
    return make_int2(reach.x / columns, (reach.y + columns - 1) / columns);
}

// The first head of the columns that belongs to a head of the rows: a key head serves `group` query heads.
template <bool BY_KEY>
DEVICE int first_head(const Args& args, int row_head) {
    return BY_KEY ? (int)afresh(row_head) * args.group : row_head / args.group;
}

template <Kind KIND, class Scores>
DEVICE void walk(const Args& args) {
    constexpr bool BY_KEY = KIND == GRAD_K || KIND == GRAD_V, TWO = KIND == GRAD_Q || KIND == GRAD_K;
    constexpr bool HALF = sizeof(typename Scores::Sum) == 16;
    constexpr int STRIPS = TWO ? 1 : 2, STRIP = 32, BLOCKS = STRIP / 8, COLUMNS = STRIPS * STRIP;
    constexpr u32 TILE = COLUMNS * ROW_BYTES, STAGES = (TWO ? 2 : 1) * ROWS * ROW_BYTES;
    // The next tiles are copied during the first and the last product of each strip.
    typedef Mover<COLUMNS, 2> Copy;
    constexpr int PIECES = Copy::PIECES / STRIPS, EARLY = PIECES / 2, LATE = PIECES - EARLY;

    load_rows(args.x, first_row<BY_KEY>(), args.rows, 0, HALF ? args.before : 0);
    hold_loads();
    if (TWO) load_rows(args.y, first_row<BY_KEY>(), args.rows, ROWS * ROW_BYTES, 0);

    hold_loads();
    float lse[2] = {}, delta[2] = {};
    if (KIND == GRAD_Q) {
        const Lane lane(thread_now());
        const int row0 = first_row<BY_KEY>() + 32 * lane.warp;
        const float* statistics = statistics_of(args, blockIdx.y) + 2 * row0;
        UNROLL for (int r = 0; r < 2; ++r) {
            const bool there = row0 + lane.row(r) < args.rows;
            lse[r] = there ? load_one(statistics + lane.row(r)) : -infinity();
            delta[r] = there ? load_one(statistics + 32 + lane.row(r)) : 0;
        }
    }

    float result[CHUNKS / 2][2][8] = {};
    Softmax softmax[2];
    const int2 steps = steps_of<BY_KEY>(args, COLUMNS);
    int step = steps.x, head = first_head<BY_KEY>(args, blockIdx.y);
    bool more = steps.x < steps.y;
    u32 stage = STAGES;
    Copy(args.c, args.d, head, step * COLUMNS, args.cols, stage, more).move(0, Copy::PIECES);

    while (more) {
        // Behind this, this stage is filled, and nobody reads the other one any more.
        block_barrier();
        const int column0 = step * COLUMNS, query_head = BY_KEY ? head : blockIdx.y;
        const int2 all = steps_of<BY_KEY>(args, COLUMNS);
        if (++step == all.y) step = all.x, ++head;
        more = step != all.x || (BY_KEY && head < first_head<BY_KEY>(args, blockIdx.y + 1));
        Copy copy(args.c, args.d, head, step * COLUMNS, args.cols, 2 * STAGES + 2 * TILE - stage, more);
        UNROLL for (int part = 0; part < STRIPS; ++part) {
            const int column = column0 + part * STRIP;
            const Lane lane(thread_now());
            int2 seen[2];
            bool some = false, all = true;
            UNROLL for (int r = 0; r < 2; ++r) {
                seen[r] = seen_by(args, first_row<BY_KEY>() + 32 * lane.warp + lane.row(r));
                some |= seen[r].x < column + STRIP && seen[r].y > column;
                all &= seen[r].x <= column && seen[r].y >= column + STRIP;
            }
            if (!any_lane(some)) {  // no row of this warp sees any of these columns
                copy.move(PIECES * part, PIECES);
                continue;
            }
            const bool partly = any_lane(!all);
            const u32 tile = stage + part * STRIP * ROW_BYTES, across = tile + row_start(lane.t);
            const u32 along = (tile + row_start(lane.t & 3)) ^ (lane.t >> 2) * 16;
            typename Scores::Sum scores[BLOCKS] = {};
            u32 weights[BLOCKS][4];
            // Sums start from the queries' statistics, which so need no registers of their own.
            const float* columns = KIND == FORWARD ? nullptr : statistics_of(args, query_head) + 2 * column + lane.column(0);
            if constexpr (KIND != FORWARD)
                UNROLL for (int j = 0; j < BLOCKS; ++j) start(scores[j], columns + 8 * j, lse, BY_KEY);
            product<EARLY>(scores, row_start(thread_now()), across, Scores::multiply, copy, PIECES * part);
            if constexpr (KIND == FORWARD) {
                if (partly)
                    UNROLL for (int j = 0; j < BLOCKS; ++j) hide(scores[j], column + 8 * j, seen, -infinity(), lane);
                float factor[2];
                soften(scores, weights, softmax, factor, args.scale2, lane);
                if (any_lane(factor[0] != 1 || factor[1] != 1))
                    UNROLL for (int pair = 0; pair < CHUNKS / 2; ++pair)
                        UNROLL for (int i = 0; i < 16; ++i) result[pair][i / 8][i % 8] *= factor[i >> 1 & 1];
            } else {
                UNROLL for (int j = 0; j < BLOCKS; ++j) {
                    UNROLL for (int v = 0; v < 8; ++v) scores[j][v] = power_of_two(scores[j][v] * args.scale2);
                    if (partly) hide(scores[j], column + 8 * j, seen, 0, lane);
                }
                if constexpr (TWO) {
                    hold_loads();
                    float slopes[BLOCKS][8];
                    UNROLL for (int j = 0; j < BLOCKS; ++j) start(slopes[j], columns + 32 + 8 * j, delta, BY_KEY);
                    product<0>(slopes, ROWS * ROW_BYTES + row_start(thread_now()), across + TILE, WideScores::multiply, copy, 0);
                    UNROLL for (int j = 0; j < BLOCKS; ++j)
                        UNROLL for (int v = 0; v < 8; ++v) scores[j][v] *= slopes[j][v];
                }
                UNROLL for (int j = 0; j < BLOCKS; ++j) to_operand(scores[j], weights[j], lane);
            }
            accumulate<LATE>(result, weights, along + (TWO ? 0 : TILE), copy, PIECES * part + EARLY);
        }
        stage = 2 * STAGES + 2 * TILE - stage;
    }

    const Lane lane(thread_now());
    const int row1 = first_row<BY_KEY>() + 32 * lane.warp, head_row = blockIdx.z * args.query_heads + blockIdx.y;
    float factor[2] = {args.after, args.after};
    if constexpr (KIND == FORWARD) {
        UNROLL for (int r = 0; r < 2; ++r) {
            float top = HALF ? from_lane(softmax[0].top, lane.row(r)) : softmax[r].top;
            float sum = HALF ? from_lane(softmax[0].sum, lane.row(r)) : softmax[r].sum + exchange(softmax[r].sum, 2);
            factor[r] = sum > 0 ? 1 / sum : 0;
            const int row = row1 + lane.row(r);
            if (r == lane.odd && row < args.rows)
                store_one(args.lse + ((long long)head_row * args.rows + row), (top + log_two(sum)) * 0.69314718056f);
        }
    }
    write(args, result, factor, row1 + lane.id, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS) volta_forward(const Args args) { walk<FORWARD, WideScores>(args); }
extern "C" __global__ void __launch_bounds__(THREADS) volta_forward_half(const Args args) { walk<FORWARD, HalfScores>(args); }
extern "C" __global__ void __launch_bounds__(THREADS) volta_grad_q(const Args args) { walk<GRAD_Q, WideScores>(args); }
extern "C" __global__ void __launch_bounds__(THREADS) volta_grad_k(const Args args) { walk<GRAD_K, WideScores>(args); }
extern "C" __global__ void __launch_bounds__(THREADS) volta_grad_v(const Args args) { walk<GRAD_V, WideScores>(args); }
