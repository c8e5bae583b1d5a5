// Copies between memory and the buffers of a core, and the products of Cube. Part of kernel_operator.h.
#pragma once

namespace AscendC {

template <class T>
void whole_blocks(uint64_t count) {
    if (count * sizeof(T) % 32) fail("%s: DataCopy of %lu bytes, not a multiple of 32", name_of(here()), count * sizeof(T));
}

template <class T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, const DataCopyParams& params) {
    begin(false);
    to.aligned(32);
    for (size_t row = 0; row < params.blockCount; ++row) {
        const size_t bytes = params.blockLen * 32, size = bytes / sizeof(T);
        const size_t at = row * (params.blockLen + params.dstStride) * 32 / sizeof(T);
        const T* source = from.data + row * (params.blockLen + params.srcStride) * 32 / sizeof(T);
        move(shim::touch_memory(source, bytes, PIPE_MTE2, false) ? shim::MASK_UB : shim::MEMORY_UB, bytes);
        to.touch(at, size, PIPE_MTE2, true);
        memcpy(to.at(at), source, bytes);
    }
}
template <class T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t count) {
    whole_blocks<T>(count);
    DataCopy(to, from, {1, (uint16_t)(count * sizeof(T) / 32), 0, 0});
}

template <class T>
void copy_out(const GlobalTensor<T>& to, const LocalTensor<T>& from, size_t rows, size_t bytes, size_t from_step, size_t to_step) {
    begin(false);
    from.aligned(32);
    for (size_t row = 0; row < rows; ++row) {
        T* target = (T*)((uint8_t*)to.data + row * to_step);
        const size_t at = row * from_step / sizeof(T);
        from.touch(at, bytes / sizeof(T), PIPE_MTE3, false);
        shim::touch_memory(target, bytes, PIPE_MTE3, true);
        memcpy(target, from.at(at), bytes);
        move(shim::UB_MEMORY, bytes);
    }
}
template <class T>
void DataCopy(const GlobalTensor<T>& to, const LocalTensor<T>& from, const DataCopyParams& params) {
    const size_t bytes = params.blockLen * 32;
    copy_out(to, from, params.blockCount, bytes, bytes + params.srcStride * 32, bytes + params.dstStride * 32);
}
template <class T>
void DataCopy(const GlobalTensor<T>& to, const LocalTensor<T>& from, uint32_t count) {
    whole_blocks<T>(count);
    copy_out(to, from, 1, count * sizeof(T), 0, 0);
}
template <class T>
void DataCopyPad(const GlobalTensor<T>& to, const LocalTensor<T>& from, const DataCopyExtParams& params) {
    copy_out(to, from, params.blockCount, params.blockLen, (params.blockLen + 31) / 32 * 32 + params.srcStride * 32,
             params.blockLen + params.dstStride);
}

// Rows to fractals of 16 x 16.
inline void DataCopy(const LocalTensor<half>& to, const GlobalTensor<half>& from, const Nd2NzParams& params) {
    begin(true);
    to.lies_in(shim::L1);
    if (params.ndNum != 1 || params.dValue % 16)
        fail("the shim copies one matrix of whole fractals, not %d of width %d", params.ndNum, params.dValue);
    for (size_t row = 0; row < params.nValue; ++row) {
        shim::touch_memory(from.data + row * params.srcDValue, params.dValue * 2, PIPE_MTE2, false);
        for (size_t column = 0; column < params.dValue; column += 16) {
            const size_t at = column * params.dstNzC0Stride + row * params.dstNzNStride * 16;
            to.touch(at, 16, PIPE_MTE2, true);
            memcpy(to.at(at), from.data + row * params.srcDValue + column, 32);
        }
        move(shim::MEMORY_L1, params.dValue * 2);
    }
}

inline void LoadData(const LocalTensor<half>& to, const LocalTensor<half>& from, const LoadData2DParams& params) {
    begin(true);
    from.lies_in(shim::L1), from.aligned(32), to.aligned(512);
    if (to.buffer->place != shim::L0A) to.lies_in(shim::L0B);
    for (size_t i = 0; i < params.repeatTimes; ++i) {
        const size_t source = (params.startIndex + i * params.srcStride) * 256, target = i * (1 + params.dstGap) * 256;
        from.touch(source, 256, PIPE_MTE1, false), to.touch(target, 256, PIPE_MTE1, true);
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 16; ++column)
                *to.at(target + row * 16 + column) = *from.at(source + (params.ifTranspose ? column * 16 + row : row * 16 + column));
        move(shim::L1_L0, 512);
    }
}

// A: fractals row by row; B: fractals row by row, each column by column; sums: fractals column by column.
inline void Mmad(const LocalTensor<float>& sums, const LocalTensor<half>& a, const LocalTensor<half>& b, const MmadParams& params) {
    begin(true);
    sums.lies_in(shim::L0C), a.lies_in(shim::L0A), b.lies_in(shim::L0B);
    sums.aligned(1024), a.aligned(512), b.aligned(512);
    const size_t m = (params.m + 15) / 16 * 16, n = (params.n + 15) / 16 * 16, k = (params.k + 15) / 16 * 16;
    a.touch(0, m * k, PIPE_M, false), b.touch(0, k * n, PIPE_M, false);
    if (!params.cmatrixInitVal) sums.touch(0, m * n, PIPE_M, false);
    sums.touch(0, m * n, PIPE_M, true);
    static std::vector<float> left, right, row;
    left.resize(m * k), right.resize(k * n), row.resize(n);
    for (size_t i = 0; i < m; ++i)
        for (size_t j = 0; j < k; ++j) left[i * k + j] = *a.at((i / 16 * (k / 16) + j / 16) * 256 + i % 16 * 16 + j % 16);
    for (size_t i = 0; i < k; ++i)
        for (size_t j = 0; j < n; ++j) right[i * n + j] = *b.at((i / 16 * (n / 16) + j / 16) * 256 + j % 16 * 16 + i % 16);
    for (size_t i = 0; i < params.m; ++i) {
        auto sum = [&](size_t j) { return sums.at((j / 16 * (m / 16) + i / 16) * 256 + i % 16 * 16 + j % 16); };
        for (size_t j = 0; j < n; ++j) row[j] = params.cmatrixInitVal ? 0.0f : *sum(j);
        for (size_t depth = 0; depth < params.k; ++depth) {
            const float factor = left[i * k + depth];
            for (size_t j = 0; j < n; ++j) row[j] += factor * right[depth * n + j];
        }
        for (size_t j = 0; j < params.n; ++j) *sum(j) = row[j];
    }
    ++shim::machine->report->products;
}

template <class T, class U, const FixpipeConfig& config>
void Fixpipe(const GlobalTensor<T>& to, const LocalTensor<U>& sums, const FixpipeParamsV220& params) {
    static_assert(config.format == CO2Layout::ROW_MAJOR && std::is_same<T, float>::value && std::is_same<U, float>::value, "not modelled");
    begin(true);
    sums.lies_in(shim::L0C), sums.aligned(64);
    for (size_t row = 0; row < params.mSize; ++row) {
        T* target = to.data + row * params.dstStride;
        shim::touch_memory(target, params.nSize * 4, PIPE_FIX, true);
        for (size_t column = 0; column < params.nSize; ++column) {
            const size_t at = (column / 16 * params.srcStride + row) * 16 + column % 16;
            if (column % 16 == 0) sums.touch(at, 16, PIPE_FIX, false);
            target[column] = *sums.at(at);
        }
        move(shim::L0_MEMORY, params.nSize * 4);
    }
}

}  // namespace AscendC
