// What a kernel is given. `attention.py` builds the same struct with ctypes: keep the order of the fields.
#pragma once

// A tensor [batch, head, row, HEAD_DIM] of fp16; strides in elements, rows contiguous and aligned to 16 bytes.
struct View {
    unsigned long long data;
    long long batch, head, row;
};

struct Args {
    View x, y;        // the rows that a block owns: Q (and dO), or K (and V)
    View c, d;        // the columns that it walks over: K and V, or Q and dO
    View out;         // the rows' result: O, dQ, dK or dV
    const int* seen;  // [batch or 1, rows, 2]: row r sees the columns from seen[r][0] up to, not including, seen[r][1]
    const int* reach;  // [batch or 1, tiles of 128 rows, 2]: the columns that any of these rows sees lie between the two
    float* lse;       // forward: [batch, heads, rows], written
    // Backward: [batch, query heads, padded / 32, 2, 32]: what sums of a query start from. First for scores, minus the log-sum-exp over the
    // scale, -infinity where a query sees nothing; then for slopes, minus the sum of dO * O, plus the gradient of the log-sum-exp.
    const float* statistics;
    long long seen_batch, reach_batch;  // rows and tiles from one batch row to the next, 0 if all share them
    int rows, cols, padded;
    int query_heads, group;  // query heads, and how many of them share a key head
    float scale2;    // log2(e) times the scale of the scores, over `before`
    float before;    // fp16 scores: the power of two by which Q is multiplied when it is loaded
    float after;     // by which the result is multiplied
};
