// The names of Ascend C that attention.cpp uses, for g++, written from their documentation. machine.h is what they run on.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include "machine.h"

#define __global__
#define __aicore__
#define __gm__
#define GM_ADDR uint8_t*
#define KERNEL_TASK_TYPE_DEFAULT(type)
#define ASCEND_IS_AIC (shim::here().cube())
#define ASCEND_IS_AIV (!shim::here().cube())
typedef _Float16 half;

namespace AscendC {

using shim::fail;
using shim::here;
using shim::Place;

enum class TPosition { A1, B1, A2, B2, CO1, VECIN, VECOUT, VECCALC };
enum class RoundMode { CAST_NONE, CAST_RINT };
enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_ONLY_VALUE };
enum class CO2Layout { NZ, ROW_MAJOR };
struct FixpipeConfig {
    CO2Layout format;
};
constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct DataCopyParams {
    uint16_t blockCount = 0, blockLen = 0, srcStride = 0, dstStride = 0;
};
struct DataCopyExtParams {
    uint16_t blockCount;
    uint32_t blockLen, srcStride, dstStride, rsv;
};
struct Nd2NzParams {
    uint16_t ndNum = 0, nValue = 0, dValue = 0, srcNdMatrixStride = 0, srcDValue = 0, dstNzC0Stride = 0, dstNzNStride = 0,
             dstNzMatrixStride = 0;
};
struct LoadData2DParams {
    uint16_t startIndex = 0;
    uint8_t repeatTimes = 0;
    uint16_t srcStride = 0;
    uint8_t sid = 0;
    uint16_t dstGap = 0;
    bool ifTranspose = false;
    uint8_t addrMode = 0;
};
struct MmadParams {
    uint16_t m = 0, n = 0, k = 0;
    bool cmatrixInitVal = true;
};
struct FixpipeParamsV220 {
    uint16_t nSize = 0, mSize = 0, srcStride = 0;
    uint32_t dstStride = 0;
    uint16_t ndNum = 1, srcNdStride = 0, dstNdStride = 0;
};
struct UnaryRepeatParams {
    uint16_t dstBlkStride, srcBlkStride;
    uint8_t dstRepStride, srcRepStride;
};
struct BinaryRepeatParams {
    uint8_t dstBlkStride, src0BlkStride, src1BlkStride, dstRepStride, src0RepStride, src1RepStride;
};
struct BrcbRepeatParams {
    uint16_t dstBlkStride, dstRepStride;
};

template <class T>
struct GlobalTensor {
    T* data = nullptr;
    uint64_t count = 0;

    void SetGlobalBuffer(T* from, uint64_t size) { data = from, count = size; }
    GlobalTensor operator[](uint64_t offset) const {
        if (offset > count) fail("%s: offset %lu of a memory tensor of %lu", name_of(here()), offset, count);
        GlobalTensor part;
        part.data = data + offset, part.count = count - offset;
        return part;
    }
};

template <class T>
struct LocalTensor {
    shim::Buffer* buffer = nullptr;
    size_t offset = 0;  // bytes, from the beginning of the memory that it lies in

    LocalTensor operator[](uint32_t index) const { return {buffer, offset + index * sizeof(T)}; }
    T* at(size_t index) const { return (T*)(here().bytes[buffer->place].data() + offset) + index; }
    void touch(size_t index, size_t size, pipe_t pipe, bool write) const {
        shim::touch(*buffer, offset + index * sizeof(T), size * sizeof(T), pipe, write);
    }
    void aligned(size_t bytes) const {
        if (offset % bytes)
            fail("%s: a tensor of %s at byte %zu, not a multiple of %zu", name_of(here()), shim::PLACE_NAMES[buffer->place], offset, bytes);
    }
    void lies_in(Place place) const {
        if (buffer->place != place)
            fail("%s: a tensor lies in %s, %s is needed", name_of(here()), shim::PLACE_NAMES[buffer->place], shim::PLACE_NAMES[place]);
    }
};

constexpr Place place_of(TPosition position) {
    return position <= TPosition::B1    ? shim::L1
           : position == TPosition::A2  ? shim::L0A
           : position == TPosition::B2  ? shim::L0B
           : position == TPosition::CO1 ? shim::L0C
                                        : shim::UB;
}
constexpr pipe_t filled_by(TPosition position) {
    return position <= TPosition::B1 || position == TPosition::VECIN ? PIPE_MTE2
           : position <= TPosition::B2                               ? PIPE_MTE1
           : position == TPosition::CO1                              ? PIPE_M
                                                                     : PIPE_V;
}
constexpr pipe_t emptied_by(TPosition position) {
    return position <= TPosition::B1      ? PIPE_MTE1
           : position <= TPosition::B2    ? PIPE_M
           : position == TPosition::CO1   ? PIPE_FIX
           : position == TPosition::VECIN ? PIPE_V
                                          : PIPE_MTE3;
}

template <TPosition P, int DEPTH>
struct TQue {
    std::deque<shim::Buffer*> buffers, queued;

    template <class T>
    LocalTensor<T> AllocTensor() {
        for (shim::Buffer* buffer : buffers)
            if (buffer->state == shim::FREE) {
                buffer->state = shim::GIVEN;
                learn(filled_by(P), emptied_by(P), buffer->freed);
                memset(here().bytes[buffer->place].data() + buffer->offset, 0xFF, buffer->size);  // NaN
                return {buffer, buffer->offset};
            }
        fail("%s: no free tensor of %s; the NPU would hang", name_of(here()), shim::PLACE_NAMES[place_of(P)]);
    }
    template <class T>
    void EnQue(const LocalTensor<T>& tensor) {
        expect(tensor, shim::GIVEN, "put into a queue");
        if ((int)queued.size() == DEPTH) fail("%s: a queue of depth %d takes no more", name_of(here()), DEPTH);
        tensor.buffer->state = shim::QUEUED, tensor.buffer->queued = here().now;
        queued.push_back(tensor.buffer);
    }
    template <class T>
    LocalTensor<T> DeQue() {
        if (queued.empty()) fail("%s: nothing in a queue of %s; the NPU would hang", name_of(here()), shim::PLACE_NAMES[place_of(P)]);
        shim::Buffer* buffer = queued.front();
        queued.pop_front();
        buffer->state = shim::TAKEN;
        learn(emptied_by(P), filled_by(P), buffer->queued);
        return {buffer, buffer->offset};
    }
    template <class T>
    void FreeTensor(const LocalTensor<T>& tensor) {
        expect(tensor, shim::TAKEN, "freed");
        tensor.buffer->state = shim::FREE, tensor.buffer->freed = here().now;
    }

private:
    void learn(pipe_t pipe, pipe_t of, uint64_t time) { here().known[pipe][of] = std::max(here().known[pipe][of], time); }
    template <class T>
    void expect(const LocalTensor<T>& tensor, shim::State state, const char* what) {
        if (std::find(buffers.begin(), buffers.end(), tensor.buffer) == buffers.end() || tensor.buffer->state != state)
            fail("%s: a tensor of %s is %s out of turn", name_of(here()), shim::PLACE_NAMES[place_of(P)], what);
    }
};

template <TPosition P>
struct TBuf {
    shim::Buffer* buffer = nullptr;
    template <class T>
    LocalTensor<T> Get() {
        return {buffer, buffer->offset};
    }
};

struct TPipe {
    template <TPosition P, int DEPTH>
    void InitBuffer(TQue<P, DEPTH>& queue, int number, uint32_t bytes) {
        for (int i = 0; i < number; ++i) queue.buffers.push_back(take(place_of(P), bytes, shim::FREE));
    }
    template <TPosition P>
    void InitBuffer(TBuf<P>& buffer, uint32_t bytes) {
        buffer.buffer = take(place_of(P), bytes, shim::PLAIN);
    }

private:
    shim::Buffer* take(Place place, size_t bytes, shim::State state) {
        shim::Core& core = here();
        const size_t from = core.used[place], size = (bytes + 31) / 32 * 32;
        core.used[place] += size;
        if (core.used[place] > core.bytes[place].size())
            fail("%s: %zu bytes of %s, it has %zu", name_of(core), core.used[place], shim::PLACE_NAMES[place], core.bytes[place].size());
        core.buffers.push_back({place, from, size, state});
        return &core.buffers.back();
    }
};

inline int64_t GetBlockNum() { return shim::machine->groups; }
inline int64_t GetBlockIdx() { return here().cube() ? here().group : 2 * here().group + here().sub; }
inline int64_t GetSubBlockIdx() { return std::max(here().sub, 0); }

template <pipe_t pipe>
void PipeBarrier() {
    here().known[pipe][pipe] = here().now;
}
template <uint8_t mode, pipe_t pipe>
void CrossCoreSetFlag(uint16_t flag) {
    static_assert(mode == 2, "the shim has flags between the cores of one AI core only");
    shim::set_flag(flag, pipe);
}
inline void CrossCoreWaitFlag(uint16_t flag) { shim::wait_flag(flag); }

inline void begin(bool cube) {
    ++here().now;
    if (here().cube() != cube) fail("%s has no such instruction", name_of(here()));
}
inline void move(shim::Way way, size_t bytes) { shim::machine->report->moved[way] += bytes; }

}  // namespace AscendC

#include "copies.h"
#include "vectors.h"
