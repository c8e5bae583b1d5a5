// AI cores on a CPU, as far as attention.cpp needs them: one Cube and two Vector cores each, as fibers that run until they wait for a flag.
//
// Every instruction belongs to a pipe and has a time. A pipe may touch what another has touched only after a queue, a barrier or a flag
// between the two; the memory of a core is watched in cells of 32 bytes, and so is the workspace through which the cores meet.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <vector>
#include <ucontext.h>

enum pipe_t { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };

namespace shim {

constexpr int PIPES = PIPE_ALL, FLAGS = 11, MOST_SETS = 15, CELL = 32, STACK = 256 << 10;
const char* const PIPE_NAMES[] = {"scalar", "vector", "cube", "MTE1", "MTE2", "MTE3", "FIX"};

enum Place { UB, L1, L0A, L0B, L0C, PLACES };
const char* const PLACE_NAMES[] = {"UB", "L1", "L0A", "L0B", "L0C"};
constexpr size_t CAPACITY[] = {192 << 10, 512 << 10, 64 << 10, 64 << 10, 128 << 10};

enum Way { MEMORY_L1, L1_L0, L0_MEMORY, MEMORY_UB, MASK_UB, UB_MEMORY, WAYS };

// What a launch did; `error` is empty if all went well.
struct Report {
    int64_t flags[FLAGS], products, moved[WAYS], peak[PLACES];
    char error[256];
};

struct Failure {
    char text[256];
};

[[noreturn]] inline void fail(const char* format, ...) {
    Failure failure;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(failure.text, sizeof(failure.text), format, arguments);
    va_end(arguments);
    throw failure;
}

struct Cell {
    uint64_t written = 0, read[PIPES] = {};
    pipe_t writer = PIPE_S;
};

enum State { FREE, GIVEN, QUEUED, TAKEN, PLAIN };
struct Buffer {
    Place place;
    size_t offset, size;
    State state;
    uint64_t queued = 0, freed = 0;
};

// What a core knows of others in the workspace: until when a pipe of theirs has written, and they have read. A flag tells it to who waits.
struct Knowledge {
    std::vector<uint64_t> written, read;  // [core * PIPES + pipe], [core]

    void learn(const Knowledge& other) {
        for (size_t i = 0; i < written.size(); ++i) written[i] = written[i] > other.written[i] ? written[i] : other.written[i];
        for (size_t i = 0; i < read.size(); ++i) read[i] = read[i] > other.read[i] ? read[i] : other.read[i];
    }
};

struct Core {
    int id, group, sub;  // sub: 0 or 1 of the Vector cores, -1 for Cube
    std::vector<uint8_t> bytes[PLACES];
    std::vector<Cell> cells[PLACES];
    size_t used[PLACES] = {};
    std::deque<Buffer> buffers;
    uint64_t now = 0, known[PIPES][PIPES] = {};  // known[a][b]: until when a knows b to be done
    Knowledge others;
    std::deque<Knowledge> flags[FLAGS];
    int waits = -1;
    bool done = false;
    ucontext_t context;
    std::vector<uint8_t> stack;

    bool cube() const { return sub < 0; }
};

struct Region {
    uintptr_t from, to;
    bool writable, mask;
};

struct Shared {
    int writer = -1;
    pipe_t pipe = PIPE_S;
    uint64_t time = 0;
    std::vector<uint64_t> read;
};

struct Machine {
    std::vector<Core> cores;
    std::vector<Region> regions;
    Region workspace;
    std::vector<Shared> cells;
    std::vector<std::deque<Knowledge>> halves;  // [core * FLAGS + flag]: of Vector cores whose sibling has not set it yet
    int groups;
    Core* core = nullptr;
    ucontext_t outside;
    void (*kernel)(void*);
    void* arguments;
    Report* report;
};
inline Machine* machine = nullptr;
inline Core& here() { return *machine->core; }

inline const char* name_of(const Core& core) {
    static thread_local char name[2][32];
    static thread_local int turn;
    turn ^= 1;
    snprintf(name[turn], sizeof(name[turn]), core.cube() ? "Cube %d" : "Vector %d.%d", core.group, core.sub);
    return name[turn];
}

inline bool in_order(const Core& core, pipe_t pipe, pipe_t before, uint64_t time) {
    if (time == core.now || time <= core.known[pipe][before]) return true;
    return pipe == before && pipe != PIPE_V && pipe != PIPE_M;  // these two overlap their own instructions
}

// An instruction of `pipe` reads or writes these bytes of a core's memory.
inline void touch(const Buffer& buffer, size_t offset, size_t bytes, pipe_t pipe, bool write) {
    Core& core = here();
    const char* place = PLACE_NAMES[buffer.place];
    if (buffer.state == FREE || buffer.state == QUEUED)
        fail("%s: %s %s a tensor of %s that %s", name_of(core), PIPE_NAMES[pipe], write ? "writes" : "reads", place,
             buffer.state == FREE ? "was freed" : "waits in its queue");
    if (offset + bytes > buffer.offset + buffer.size)
        fail("%s: %s past the end of a tensor of %s, by %zu bytes", name_of(core), PIPE_NAMES[pipe], place,
             offset + bytes - buffer.offset - buffer.size);
    for (size_t at = offset / CELL; at * CELL < offset + bytes; ++at) {
        Cell& cell = core.cells[buffer.place][at];
        if (cell.written && !in_order(core, pipe, cell.writer, cell.written))
            fail("%s: %s does not wait for %s, which wrote byte %zu of %s", name_of(core), PIPE_NAMES[pipe], PIPE_NAMES[cell.writer],
                 at * CELL, place);
        for (int other = 0; write && other < PIPES; ++other)
            if (other != pipe && cell.read[other] > core.known[pipe][other])
                fail("%s: %s does not wait for %s, which reads byte %zu of %s", name_of(core), PIPE_NAMES[pipe], PIPE_NAMES[other],
                     at * CELL, place);
        if (write)
            cell.written = core.now, cell.writer = pipe;
        else
            cell.read[pipe] = core.now;
    }
}

// The same of memory: the tensors of the launch, and the workspace, where other cores' flags count.
inline bool touch_memory(const void* at, size_t bytes, pipe_t pipe, bool write) {
    Core& core = here();
    const uintptr_t from = (uintptr_t)at, to = from + bytes;
    for (const Region& region : machine->regions)
        if (from >= region.from && to <= region.to && (!write || region.writable)) return region.mask;
    const Region& all = machine->workspace;
    if (from < all.from || to > all.to)
        fail("%s: %s of %zu bytes of memory outside of the tensors", name_of(core), write ? "write" : "read", bytes);
    for (size_t index = (from - all.from) / CELL; index * CELL < to - all.from; ++index) {
        Shared& cell = machine->cells[index];
        if (cell.writer < 0 && !write) fail("%s: reads byte %zu of the workspace, which nobody wrote", name_of(core), index * CELL);
        if (cell.writer >= 0 && cell.writer != core.id && core.others.written[cell.writer * PIPES + cell.pipe] < cell.time)
            fail("%s: %s byte %zu of the workspace before the flag of %s", name_of(core), write ? "writes" : "reads", index * CELL,
                 name_of(machine->cores[cell.writer]));
        cell.read.resize(machine->cores.size());
        for (size_t other = 0; write && other < cell.read.size(); ++other)
            if ((int)other != core.id && cell.read[other] > core.others.read[other])
                fail("%s: writes byte %zu of the workspace, which %s may still read", name_of(core), index * CELL,
                     name_of(machine->cores[other]));
        if (write)
            cell.writer = core.id, cell.pipe = pipe, cell.time = core.now;
        else
            cell.read[core.id] = core.now;
    }
    return false;
}

inline void give(Core& to, int flag, const Knowledge& token) {
    to.flags[flag].push_back(token);
    if (to.flags[flag].size() > MOST_SETS) fail("flag %d of %s is set more than %d times", flag, name_of(to), MOST_SETS);
}

inline void set_flag(int flag, pipe_t pipe) {
    Core& core = here();
    if (flag < 0 || flag >= FLAGS) fail("flag %d: they are 0 to %d", flag, FLAGS - 1);
    Core* group = &machine->cores[core.group * 3];
    auto& halves = machine->halves;
    Knowledge token = core.others;
    token.written[core.id * PIPES + pipe] = token.read[core.id] = core.now;
    if (core.cube()) {
        for (int sub = 0; sub < 2; ++sub) give(group[1 + sub], flag, token);
        ++machine->report->flags[flag];
        return;
    }
    auto &own = halves[core.id * FLAGS + flag], &other = halves[group[2 - core.sub].id * FLAGS + flag];
    if (other.empty()) return own.push_back(token);
    token.learn(other.front());
    give(group[0], flag, token);
    other.pop_front();
    ++machine->report->flags[flag];
}

inline void wait_flag(int flag) {
    Core& core = here();
    if (flag < 0 || flag >= FLAGS) fail("flag %d: they are 0 to %d", flag, FLAGS - 1);
    while (core.flags[flag].empty()) {
        core.waits = flag;
        swapcontext(&core.context, &machine->outside);
    }
    core.waits = -1;
    core.others.learn(core.flags[flag].front());
    core.flags[flag].pop_front();
}

inline void core_main() {
    Core& core = here();
    try {
        machine->kernel(machine->arguments);
        for (const Buffer& buffer : core.buffers)
            if (buffer.state != FREE && buffer.state != PLAIN)
                fail("%s ends with a tensor of %s that was not freed", name_of(core), PLACE_NAMES[buffer.place]);
    } catch (const Failure& failure) {
        memcpy(machine->report->error, failure.text, sizeof(failure.text));
    }
    core.done = true;
    swapcontext(&core.context, &machine->outside);
}

inline void make_core(Core& core, int id) {
    core.id = id, core.group = id / 3, core.sub = id % 3 - 1;
    core.others.written.resize(machine->cores.size() * PIPES), core.others.read.resize(machine->cores.size());
    for (int place = 0; place < PLACES; ++place)
        if ((place == UB) != core.cube()) core.bytes[place].assign(CAPACITY[place], 0xFF), core.cells[place].resize(CAPACITY[place] / CELL);
    core.stack.resize(STACK);
    getcontext(&core.context);
    core.context.uc_stack.ss_sp = core.stack.data(), core.context.uc_stack.ss_size = STACK;
    makecontext(&core.context, core_main, 0);
}

[[noreturn]] inline void fail_waiting() {
    std::string text = "nobody will set what is waited for:";
    for (const Core& core : machine->cores)
        if (!core.done) text += std::string(" ") + name_of(core) + " flag " + std::to_string(core.waits) + ";";
    fail("%s", text.c_str());
}

// Cores take turns until all are done. Throws Failure if all wait, or if a flag is left over.
inline void run() {
    for (bool moved = true, all = false; !all;) {
        if (!moved) fail_waiting();
        moved = false, all = true;
        for (Core& core : machine->cores) {
            if (core.done || (core.waits >= 0 && core.flags[core.waits].empty())) continue;
            machine->core = &core;
            swapcontext(&machine->outside, &core.context);
            if (machine->report->error[0]) return;
            moved = true;
        }
        for (const Core& core : machine->cores) all = all && core.done;
    }
    for (const Core& core : machine->cores) {
        for (int flag = 0; flag < FLAGS; ++flag)
            if (!core.flags[flag].empty()) fail("flag %d of %s was set more often than waited for", flag, name_of(core));
        for (int place = 0; place < PLACES; ++place)
            if ((int64_t)core.used[place] > machine->report->peak[place]) machine->report->peak[place] = core.used[place];
    }
}

}  // namespace shim
