// Tiles in shared memory: where a number lies, how it gets there from global memory, how the lanes of a warp read it as operands.
#pragma once

#ifndef HEAD_DIM
#error "define HEAD_DIM as 64 or 128"
#endif

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROWS = 32 * WARPS;               // rows of a block, 32 to a warp
constexpr int CHUNKS = HEAD_DIM / 8;           // a chunk is 8 numbers, 16 bytes
constexpr int ROW_BYTES = 16 * CHUNKS;

// Chunk c of row r lies at slot c ^ (r % 8): equal chunks of eight rows then lie in different banks, as do eight chunks of a row.
// A chunk is added by exclusive or, at no cost beside it, and 8 rows by a constant.
DEVICE u32 row_start(int row) { return row * ROW_BYTES + (row & 7) * 16; }
DEVICE u32 chunk_at(u32 start, int chunk) { return start ^ (chunk * 16); }

// The thread's number, computed anew from here on (afresh).
DEVICE int thread_now() { return afresh(threadIdx.x); }

// A lane within its warp. Eight lanes that multiply together are a quad-pair: t counts them.
struct Lane {
    int id, warp, t, odd;
    DEVICE explicit Lane(int thread) : id(thread & 31), warp(thread >> 5), t((id & 3) | (id >> 4 << 2)), odd(id >> 1 & 1) {}
    // Rows of its warp of which the lane holds sums: two, one of which is `id`, the row that it holds as left operand.
    DEVICE int row(int r) const { return (id & ~2) + 2 * r; }
    // Column, within a block of 8, of the lane's sum v; the sums with v & 2 belong to the second row.
    DEVICE int column(int v) const { return (v & 1) + 2 * odd + (v & 4); }
};

// Sums of an 8 x 8 block -> left operand of the next two products: lanes two apart swap the row that each does not need.
DEVICE void to_operand(const float (&sum)[8], u32 (&operand)[4], const Lane& lane) {
    u32 first[2] = {pack(sum[0], sum[1]), pack(sum[4], sum[5])}, second[2] = {pack(sum[2], sum[3]), pack(sum[6], sum[7])};
    UNROLL for (int i = 0; i < 2; ++i) {
        u32 other = exchange(lane.odd ? first[i] : second[i], 2);
        operand[2 * i] = lane.odd ? other : first[i];
        operand[2 * i + 1] = lane.odd ? second[i] : other;
    }
}

// Copies `COUNT` rows of two tensors into two tiles, in pieces of `HELD` chunks per thread that interleave with products.
template <int COUNT, int HELD>
struct Mover {
    static constexpr int EACH = COUNT * CHUNKS / THREADS;  // chunks of a thread in one tile
    static constexpr int PIECES = 2 * EACH / HELD;
    static constexpr int STRIDE = THREADS / CHUNKS;  // rows between a thread's chunks: a multiple of 8
    const View &c, &d;
    const int chunk, row, end;
    const long long c_from, d_from;
    const u32 to;
    const bool on;
    uint4 held[HELD];

    // Rows `first`.. of a head of each tensor, zeros from row `end` on, into the tiles at byte `shared`; nothing at all if not `on`.
    DEVICE Mover(const View& c, const View& d, int head, int first, int end, u32 shared, bool on)
        : c(c), d(d), chunk(thread_now() % CHUNKS), row(first + thread_now() / CHUNKS), end(on ? end : 0),
          c_from(blockIdx.z * c.batch + head * c.head + row * c.row + chunk * 8),
          d_from(blockIdx.z * d.batch + head * d.head + row * d.row + chunk * 8),
          to(shared + chunk_at(row_start(thread_now() / CHUNKS), chunk)), on(on) {}

    DEVICE void fetch(int piece) {
        UNROLL for (int i = 0; i < HELD; ++i) {
            const int n = piece * HELD + i, down = n % EACH * STRIDE;
            const View& view = n < EACH ? c : d;
            held[i] = load_global(view, (n < EACH ? c_from : d_from) + down * view.row, row + down < end);
        }
    }

    DEVICE void put(int piece) {
        UNROLL for (int i = 0; i < HELD; ++i) {
            const int n = piece * HELD + i;
            store_shared(to + (n / EACH * COUNT + n % EACH * STRIDE) * ROW_BYTES, held[i], on);
        }
    }

    DEVICE void move(int from, int count) {
        UNROLL for (int piece = from; piece < from + count; ++piece) {
            fetch(piece);
            put(piece);
        }
    }
};

// sums += rows * columns^T over HEAD_DIM, for 32 rows and 8 * BLOCKS columns; PIECES of the mover's, from `piece` on, are moved meanwhile.
template <int PIECES, int BLOCKS, class Sum, class Multiply, class Copy>
DEVICE void product(Sum (&sums)[BLOCKS], u32 rows, u32 columns, Multiply multiply, Copy& copy, int piece) {
    constexpr int EVERY = PIECES ? CHUNKS / PIECES : CHUNKS + 1;
    UNROLL for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (PIECES && chunk % EVERY == 0) copy.fetch(piece + chunk / EVERY);
        uint4 a = load_shared(chunk_at(rows, chunk));
        UNROLL for (int from = 0; from < BLOCKS; from += 2) {
            uint4 b[2];
            UNROLL for (int j = 0; j < 2; ++j) b[j] = load_shared(chunk_at(columns, chunk) + (from + j) * 8 * ROW_BYTES);
            UNROLL for (int j = 0; j < 2; ++j) multiply(sums[from + j], a.x, a.y, b[j].x, b[j].y);
            UNROLL for (int j = 0; j < 2; ++j) multiply(sums[from + j], a.z, a.w, b[j].z, b[j].w);
        }
        if (chunk % EVERY == EVERY - 1) copy.put(piece + chunk / EVERY);
    }
}

// result += left * tile, for 32 rows, 8 * BLOCKS rows of the tile and HEAD_DIM columns. A lane reads 8 columns of one row, which serve two
// products: of each 16 columns the first product gives 0-3 and 8-11, the second the others.
template <int PIECES, int BLOCKS, class Copy>
DEVICE void accumulate(float (&result)[CHUNKS / 2][2][8], const u32 (&left)[BLOCKS][4], u32 tile, Copy& copy, int piece) {
    constexpr int EVERY = PIECES ? 2 * BLOCKS / PIECES : 2 * BLOCKS + 1;
    UNROLL for (int k = 0; k < 2 * BLOCKS; ++k) {
        if (PIECES && k % EVERY == 0) copy.fetch(piece + k / EVERY);
        UNROLL for (int pair = 0; pair < CHUNKS / 2; ++pair) {
            uint4 b = load_shared(chunk_at(tile, 2 * pair ^ (k & 1) * 4) + 4 * k * ROW_BYTES);
            mma_row_row(result[pair][0], left[k / 2][k % 2 * 2], left[k / 2][k % 2 * 2 + 1], b.x, b.y);
            mma_row_row(result[pair][1], left[k / 2][k % 2 * 2], left[k / 2][k % 2 * 2 + 1], b.z, b.w);
        }
        if (k % EVERY == EVERY - 1) copy.put(piece + k / EVERY);
    }
}
