// Runs a kernel on the CPU, block after block. Each lane is a fiber; the lanes of a warp move together from one `meet` to the next.
// It checks what a GPU would not: accesses out of bounds, shared memory read before it is written or raced for between two barriers, lanes
// of a warp that part. It counts bank conflicts.
#include "device.h"

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <ucontext.h>
#include <vector>

namespace shim {

constexpr int LANES = 32, STACK = 1 << 16, BANKS = 32, NOBODY = -1, SEVERAL = -2;

struct Range {
    unsigned long long from, to;
    int writable;
};

struct Report {
    long long loads, stores, conflicts, products, barriers;
    char error[256];
};

// 16 bytes of shared memory: who wrote and read them last, and between which barriers.
struct Chunk {
    uint4 value;
    int writer, written, reader, read;
};

struct Fiber {
    jmp_buf at;
    ucontext_t start;
    std::vector<char> stack;
    Kind kind;
    void* what;
};

Dim block, grid;
static std::vector<Fiber> fibers;
static std::vector<Chunk> chunks;
static jmp_buf outside, launch_over;
static ucontext_t origin;
static int current, epoch;
static const Range* ranges;
static int range_count;
static Report* report;
static void (*kernel)(const Args);
static const Args* arguments;

Dim thread() { return {(unsigned)current, 0, 0}; }

[[noreturn]] static void fail(const char* format, ...) {
    va_list rest;
    va_start(rest, format);
    int used = snprintf(report->error, sizeof(report->error), "block %u,%u,%u thread %d: ", block.x, block.y, block.z, current);
    vsnprintf(report->error + used, sizeof(report->error) - used, format, rest);
    va_end(rest);
    _longjmp(launch_over, 1);
}

// Wavefronts of one warp-wide access beyond the least number. 32 banks of 4 bytes; a warp's access of 4, 8 or 16 bytes to a lane goes by
// 32, 16 or 8 lanes at a time, and each such group takes as many wavefronts as the most different words that it wants of one bank.
// ../README.md says how far this rule can be trusted.
extern "C" int volta_shim_conflicts(const u32* addresses, const unsigned char* active, int bytes) {
    int extra = 0;
    const int group = 128 / bytes;
    for (int first = 0; first < LANES; first += group) {
        u32 words[BANKS][LANES];
        int count[BANKS] = {}, most = 1;
        for (int lane = first; lane < first + group; ++lane)
            for (int byte = 0; active[lane] && byte < bytes; byte += 4) {
                const u32 word = (addresses[lane] + byte) / 4, bank = word % BANKS;
                if (std::find(words[bank], words[bank] + count[bank], word) == words[bank] + count[bank]) words[bank][count[bank]++] = word;
                most = max(most, count[bank]);
            }
        extra += most - 1;
    }
    return extra;
}

static void access(Kind kind, int warp) {
    u32 addresses[LANES];
    unsigned char active[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        current = warp * LANES + lane;
        Access& one = *(Access*)fibers[current].what;
        addresses[lane] = one.address, active[lane] = one.active;
        if (!one.active) continue;
        if (one.address % 16 || one.address / 16 >= chunks.size()) fail("shared memory at byte %u of %zu", one.address, 16 * chunks.size());
        Chunk& chunk = chunks[one.address / 16];
        if (chunk.written == epoch && chunk.writer != current)
            fail("byte %u of shared memory raced for: thread %d wrote it", one.address, chunk.writer);
        if (kind == LOAD) {
            if (chunk.writer == NOBODY) fail("byte %u of shared memory is read and nobody wrote it", one.address);
            one.value = chunk.value;
            chunk.reader = chunk.read == epoch && chunk.reader != current ? SEVERAL : current;
            chunk.read = epoch;
        } else {
            if (chunk.read == epoch && chunk.reader != current) fail("byte %u of shared memory raced for: it is still read", one.address);
            chunk.value = one.value, chunk.writer = current, chunk.written = epoch;
        }
    }
    ++(kind == LOAD ? report->loads : report->stores);
    report->conflicts += volta_shim_conflicts(addresses, active, 16);
}

static int lane_of(int quad_pair, int t) { return t % 4 + 16 * (t / 4) + 4 * quad_pair; }

static float half_of(const u32* registers, int index) {
    const float2 pair = unpack(registers[index / 2]);
    return index % 2 ? pair.y : pair.x;
}

// m8n8k4 by the maps of CuTe's mma_traits_sm70.hpp (../README.md).
static void multiply(Kind kind, int warp) {
    for (int quad_pair = 0; quad_pair < 4; ++quad_pair) {
        Product* of[8];
        float a[8][4], b[4][8];
        for (int t = 0; t < 8; ++t) {
            of[t] = (Product*)fibers[warp * LANES + lane_of(quad_pair, t)].what;
            for (int i = 0; i < 4; ++i) {
                a[t][i] = half_of(of[t]->a, i);
                (kind == ROW_ROW ? b[t % 4][4 * (t / 4) + i] : b[i][t]) = half_of(of[t]->b, i);
            }
        }
        for (int t = 0; t < 8; ++t) {
            float sums[8];
            for (int v = 0; v < 8; ++v) {
                const bool half = kind == ROW_COL_HALF;
                const int m = half ? t : (t & 1) + 2 * (v >> 1 & 1) + 4 * (t >> 2);
                const int n = half ? v : (v & 1) + 2 * (t >> 1 & 1) + 4 * (v >> 2);
                sums[v] = half ? half_of(of[t]->half, v) : of[t]->wide[v];
                for (int k = 0; k < 4; ++k) sums[v] += a[m][k] * b[k][n];
            }
            if (kind == ROW_COL_HALF)
                for (int i = 0; i < 4; ++i) of[t]->half[i] = pack(sums[2 * i], sums[2 * i + 1]);
            else
                memcpy(of[t]->wide, sums, sizeof(sums));
        }
    }
    ++report->products;
}

static void swap_values(Kind kind, int warp) {
    u32 any = 0;
    for (int lane = 0; lane < LANES; ++lane) any |= ((Exchange*)fibers[warp * LANES + lane].what)->value;
    for (int lane = 0; lane < LANES; ++lane) {
        Exchange& one = *(Exchange*)fibers[warp * LANES + lane].what;
        const int from = kind == EXCHANGE ? lane ^ one.lane : one.lane;
        if (from < 0 || from >= LANES) fail("exchange with lane %d", from);
        one.result = kind == ANY ? any : ((Exchange*)fibers[warp * LANES + from].what)->value;
    }
}

static void serve(Kind kind, int warp) {
    for (int lane = 0; lane < LANES; ++lane)
        if (fibers[warp * LANES + lane].kind != kind)
            fail("lane %d is at %s, lane 31 at %s", lane, NAMES[fibers[warp * LANES + lane].kind], NAMES[kind]);
    if (kind == LOAD || kind == STORE) access(kind, warp);
    if (kind == ROW_COL || kind == ROW_ROW || kind == ROW_COL_HALF) multiply(kind, warp);
    if (kind == EXCHANGE || kind == FROM_LANE || kind == ANY) swap_values(kind, warp);
}

static __attribute__((noinline)) void jump(jmp_buf& from, jmp_buf& to) {
    if (!_setjmp(from)) _longjmp(to, 1);
}

void meet(Kind kind, void* what) {
    const int own = current, warp = own / LANES;
    fibers[own].kind = kind, fibers[own].what = what;
    if (own % LANES < LANES - 1) {
        current = own + 1;
        jump(fibers[own].at, fibers[current].at);
    } else {
        serve(kind, warp);
        current = warp * LANES;
        jump(fibers[own].at, kind == BARRIER || kind == END ? outside : fibers[current].at);
    }
    current = own;
}

void check_global(const void* at, size_t bytes, bool write) {
    const unsigned long long from = (unsigned long long)at;
    if (from % bytes) fail("global access of %zu bytes at an address that is not a multiple", bytes);
    for (int i = 0; i < range_count; ++i)
        if (from >= ranges[i].from && from + bytes <= ranges[i].to && (!write || ranges[i].writable)) return;
    fail("global %s of %zu bytes outside of the tensors", write ? "write" : "read", bytes);
}

static void lane_main() {
    const int own = current;
    jump(fibers[own].at, outside);
    for (;;) {
        current = own;
        kernel(*arguments);
        meet(END, nullptr);
    }
}

static void make_fibers(int threads) {
    fibers.resize(threads);
    for (current = 0; current < threads; ++current) {
        Fiber& fiber = fibers[current];
        fiber.stack.resize(STACK);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data(), fiber.start.uc_stack.ss_size = STACK;
        makecontext(&fiber.start, lane_main, 0);
        if (!_setjmp(outside)) swapcontext(&origin, &fiber.start);
    }
}

// Warps take turns from barrier to barrier, first to last and then last to first.
static void run_block(int warps) {
    for (Chunk& chunk : chunks) chunk = {{}, NOBODY, NOBODY, NOBODY, NOBODY};
    for (epoch = 0;; ++epoch) {
        for (int i = 0; i < warps; ++i) {
            current = (epoch % 2 ? warps - 1 - i : i) * LANES;
            jump(outside, fibers[current].at);
        }
        for (int warp = 1; warp < warps; ++warp)
            if (fibers[warp * LANES].kind != fibers[0].kind)
                fail("warp %d is at %s, warp 0 is not", warp, NAMES[fibers[warp * LANES].kind]);
        if (fibers[0].kind == END) return;
        ++report->barriers;
    }
}

// Launches `function` and fills `result`; result->error is empty if all went well.
extern "C" void volta_shim_launch(void (*function)(const Args), const Args* args, const unsigned* blocks, int threads, int shared,
                                  const Range* tensors, int tensor_count, Report* result) {
    kernel = function, arguments = args, ranges = tensors, range_count = tensor_count, report = result;
    grid = {blocks[0], blocks[1], blocks[2]};
    chunks.resize(shared / 16);
    *result = {};
    if (_setjmp(launch_over)) return;
    make_fibers(threads);
    for (block.z = 0; block.z < grid.z; ++block.z)
        for (block.y = 0; block.y < grid.y; ++block.y)
            for (block.x = 0; block.x < grid.x; ++block.x) run_block(threads / LANES);
}

}  // namespace shim
