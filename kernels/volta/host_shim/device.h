// The names of ../device.cuh on a CPU. What lanes do together is done by `meet` once all 32 lanes of a warp have arrived (shim.cpp).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include "../args.cuh"

#define __global__
#define __launch_bounds__(threads)
#define DEVICE inline
#define UNROLL
#define threadIdx (shim::thread())
#define blockIdx (shim::block)
#define gridDim (shim::grid)

using std::max;
using std::min;
typedef unsigned int u32;

struct uint4 {
    u32 x, y, z, w;
};
struct int2 {
    int x, y;
};
struct float2 {
    float x, y;
};
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace shim {

struct Dim {
    unsigned x, y, z;
};
extern Dim block, grid;
Dim thread();

enum Kind { LOAD, STORE, ROW_COL, ROW_ROW, ROW_COL_HALF, EXCHANGE, FROM_LANE, ANY, BARRIER, END };
const char* const NAMES[] = {"a load",      "a store",     "a product", "a product", "a product",
                             "an exchange", "an exchange", "a vote",    "a barrier", "the end"};

struct Access {
    u32 address;
    uint4 value;
    bool active;
};
struct Product {
    u32 a[2], b[2];
    float* wide;
    u32* half;
};
struct Exchange {
    u32 value, result;
    int lane;
};

// Wait for the other lanes of the warp, have it done, go on. Ends the launch if they arrive at something else.
void meet(Kind kind, void* what);

// Ends the launch unless these bytes lie in one of its tensors, and in one that may be written if `write`.
void check_global(const void* at, size_t bytes, bool write);

template <class T>
T exchange(Kind kind, T value, int lane) {
    Exchange both = {};
    both.lane = lane;
    memcpy(&both.value, &value, 4);
    meet(kind, &both);
    memcpy(&value, &both.result, 4);
    return value;
}

template <class T>
T load(const void* at) {
    T value;
    check_global(at, sizeof(T), false);
    memcpy(&value, at, sizeof(T));
    return value;
}

template <class T>
void store(void* at, T value) {
    check_global(at, sizeof(T), true);
    memcpy(at, &value, sizeof(T));
}

}  // namespace shim

inline void mma_row_col(float (&c)[8], u32 a0, u32 a1, u32 b0, u32 b1) {
    shim::Product what = {{a0, a1}, {b0, b1}, c, nullptr};
    shim::meet(shim::ROW_COL, &what);
}

inline void mma_row_row(float (&c)[8], u32 a0, u32 a1, u32 b0, u32 b1) {
    shim::Product what = {{a0, a1}, {b0, b1}, c, nullptr};
    shim::meet(shim::ROW_ROW, &what);
}

inline void mma_row_col_half(u32 (&c)[4], u32 a0, u32 a1, u32 b0, u32 b1) {
    shim::Product what = {{a0, a1}, {b0, b1}, nullptr, c};
    shim::meet(shim::ROW_COL_HALF, &what);
}

inline uint4 load_shared(u32 address) {
    shim::Access access = {address, {}, true};
    shim::meet(shim::LOAD, &access);
    return access.value;
}

inline void store_shared(u32 address, uint4 value, bool active) {
    shim::Access access = {address, value, active};
    shim::meet(shim::STORE, &access);
}

inline uint4 load_global(const View& view, long long offset, bool active) {
    return active ? shim::load<uint4>((const void*)(view.data + 2 * offset)) : uint4{};
}
inline void store_global(const View& view, long long offset, uint4 value) { shim::store((void*)(view.data + 2 * offset), value); }
inline int2 load_pair(const int* at) { return shim::load<int2>(at); }
inline float2 load_pair(const float* at) { return shim::load<float2>(at); }
inline float load_one(const float* at) { return shim::load<float>(at); }
inline void store_one(float* at, float value) { shim::store(at, value); }

inline u32 pack(float low, float high) {
    const _Float16 pair[2] = {(_Float16)low, (_Float16)high};
    u32 both;
    memcpy(&both, pair, 4);
    return both;
}

inline float2 unpack(u32 both) {
    _Float16 pair[2];
    memcpy(pair, &both, 4);
    return {(float)pair[0], (float)pair[1]};
}

inline u32 times(u32 both, float by) { return pack(unpack(both).x * by, unpack(both).y * by); }
inline float power_of_two(float x) { return exp2f(x); }
inline float log_two(float x) { return log2f(x); }
inline float infinity() { return INFINITY; }
inline u32 exchange(u32 value, int across) { return shim::exchange(shim::EXCHANGE, value, across); }
inline int exchange(int value, int across) { return shim::exchange(shim::EXCHANGE, value, across); }
inline float exchange(float value, int across) { return shim::exchange(shim::EXCHANGE, value, across); }
inline float from_lane(float value, int lane) { return shim::exchange(shim::FROM_LANE, value, lane); }
inline bool any_lane(bool value) { return shim::exchange(shim::ANY, (u32)value, 0); }
inline u32 afresh(u32 value) { return value; }
inline void hold_loads() {}
inline void block_barrier() { shim::meet(shim::BARRIER, nullptr); }
