// The machine: every access to memory, every matrix product and every conversion of the kernels, for sm_70 and later.
// host_shim/device.h has the same names for a CPU. No CUDA header is needed, so NVRTC alone compiles it.
#pragma once
#include "args.cuh"

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

typedef unsigned int u32;

extern __shared__ uint4 shared_memory[];

// D = A * B + D for the four quad-pairs of a warp at once, each 8 x 8 x 4. Which element a lane holds: README.md.
DEVICE void mma_row_col(float (&c)[8], u32 a0, u32 a1, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
}

DEVICE void mma_row_row(float (&c)[8], u32 a0, u32 a1, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
}

// The same, summed in fp16: two columns of the lane's row to a register.
DEVICE void mma_row_col_half(u32 (&c)[4], u32 a0, u32 a1, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f16.f16.f16.f16 {%0,%1,%2,%3}, {%4,%5}, {%6,%7}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
}

// Shared memory by byte address, 16 bytes to a lane. All lanes of a warp call together; those not `active` move nothing.
DEVICE uint4 load_shared(u32 address) { return *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(shared_memory) + address); }

DEVICE void store_shared(u32 address, uint4 value, bool active) {
    if (active) *reinterpret_cast<uint4*>(reinterpret_cast<char*>(shared_memory) + address) = value;
}

// Global memory: 16 bytes, zeros where not `active`.
DEVICE uint4 load_global(const View& view, long long offset, bool active) {
    uint4 value = make_uint4(0, 0, 0, 0);
    if (active) value = __ldg(reinterpret_cast<const uint4*>(view.data + 2 * offset));
    return value;
}

DEVICE void store_global(const View& view, long long offset, uint4 value) { *reinterpret_cast<uint4*>(view.data + 2 * offset) = value; }

DEVICE int2 load_pair(const int* at) { return __ldg(reinterpret_cast<const int2*>(at)); }
DEVICE float2 load_pair(const float* at) { return __ldg(reinterpret_cast<const float2*>(at)); }
DEVICE float load_one(const float* at) { return __ldg(at); }
DEVICE void store_one(float* at, float value) { *at = value; }

// Two numbers to a register as fp16, the first in the lower half, and back.
DEVICE u32 pack(float low, float high) {
    u32 both;
    asm("{ .reg .f16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b}; }" : "=r"(both) : "f"(low), "f"(high));
    return both;
}

DEVICE float2 unpack(u32 both) {
    float2 pair;
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(pair.x), "=f"(pair.y) : "r"(both));
    return pair;
}

DEVICE u32 times(u32 both, float by) {
    float2 pair = unpack(both);
    return pack(pair.x * by, pair.y * by);
}

DEVICE float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

DEVICE float log_two(float x) { return __log2f(x); }
DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE u32 exchange(u32 value, int across) { return __shfl_xor_sync(0xffffffffu, value, across); }
DEVICE int exchange(int value, int across) { return __shfl_xor_sync(0xffffffffu, value, across); }
DEVICE float exchange(float value, int across) { return __shfl_xor_sync(0xffffffffu, value, across); }
DEVICE float from_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE bool any_lane(bool value) { return __any_sync(0xffffffffu, value); }
// The compiler may not reckon with the value from here on: what follows from it is computed anew and takes no register across a loop.
DEVICE u32 afresh(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

// No load from below is made above: early loads would take registers that the sums need.
DEVICE void hold_loads() { __syncwarp(); }

DEVICE void block_barrier() { __syncthreads(); }
