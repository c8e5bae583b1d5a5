// Instructions of a Vector core. Part of kernel_operator.h. Each takes the first numbers of its tensors, or repeats of up to 256 bytes.
#pragma once

namespace AscendC {

// The numbers of a repeat that take part.
inline uint64_t lanes(uint64_t count) {
    if (count < 1 || count > 64) fail("%s: a repeat takes 1 to 64 numbers, not %lu", name_of(here()), count);
    return count == 64 ? ~0ULL : (1ULL << count) - 1;
}

template <class F>
void each(uint32_t repeats, uint64_t mask, F f) {
    if (repeats > 255) fail("%s: %u repeats, at most 255", name_of(here()), repeats);
    for (uint32_t repeat = 0; repeat < repeats; ++repeat)
        for (uint32_t lane = 0; lane < 64; ++lane)
            if (mask >> lane & 1) f(repeat, lane);
}

// Where a number is: blocks of 32 bytes lie `step` apart, repeats `jump`, in blocks.
inline size_t spot(uint32_t repeat, uint32_t lane, uint32_t step, uint32_t jump) {
    return (repeat * jump + lane / 8 * step) * 8 + lane % 8;
}

template <class T>
void ready(const LocalTensor<T>& tensor) {
    tensor.lies_in(shim::UB), tensor.aligned(32);
}

template <class D, class S, class F>
void unary(const LocalTensor<D>& to, const LocalTensor<S>& from, int32_t count, F f) {
    begin(false), ready(to), ready(from);
    from.touch(0, count, PIPE_V, false), to.touch(0, count, PIPE_V, true);
    for (int32_t i = 0; i < count; ++i) *to.at(i) = f(*from.at(i));
}
template <class F>
void unary(const LocalTensor<float>& to, const LocalTensor<float>& from, uint64_t mask, uint8_t repeats, const UnaryRepeatParams& p, F f) {
    begin(false), ready(to), ready(from);
    each(repeats, lanes(mask), [&](uint32_t repeat, uint32_t lane) {
        const size_t target = spot(repeat, lane, p.dstBlkStride, p.dstRepStride),
                     source = spot(repeat, lane, p.srcBlkStride, p.srcRepStride);
        from.touch(source, 1, PIPE_V, false), to.touch(target, 1, PIPE_V, true);
        *to.at(target) = f(*from.at(source));
    });
}
template <class F>
void binary(const LocalTensor<float>& to, const LocalTensor<float>& a, const LocalTensor<float>& b, int32_t count, F f) {
    begin(false), ready(to), ready(a), ready(b);
    a.touch(0, count, PIPE_V, false), b.touch(0, count, PIPE_V, false), to.touch(0, count, PIPE_V, true);
    for (int32_t i = 0; i < count; ++i) *to.at(i) = f(*a.at(i), *b.at(i));
}
template <class F>
void binary(const LocalTensor<float>& to, const LocalTensor<float>& a, const LocalTensor<float>& b, uint64_t mask, uint8_t repeats,
            const BinaryRepeatParams& p, F f) {
    begin(false), ready(to), ready(a), ready(b);
    each(repeats, lanes(mask), [&](uint32_t repeat, uint32_t lane) {
        const size_t target = spot(repeat, lane, p.dstBlkStride, p.dstRepStride),
                     left = spot(repeat, lane, p.src0BlkStride, p.src0RepStride);
        const size_t right = spot(repeat, lane, p.src1BlkStride, p.src1RepStride);
        a.touch(left, 1, PIPE_V, false), b.touch(right, 1, PIPE_V, false), to.touch(target, 1, PIPE_V, true);
        *to.at(target) = f(*a.at(left), *b.at(right));
    });
}

#define SHIM_UNARY(NAME, RESULT)                                                                    \
    inline void NAME(const LocalTensor<float>& to, const LocalTensor<float>& from, int32_t count) { \
        unary(to, from, count, [](float x) { return RESULT; });                                     \
    }
SHIM_UNARY(Exp, std::exp(x))
SHIM_UNARY(Ln, std::log(x))

#define SHIM_SCALAR(NAME, RESULT)                                                                                           \
    inline void NAME(const LocalTensor<float>& to, const LocalTensor<float>& from, float y, int32_t count) {                \
        unary(to, from, count, [y](float x) { return RESULT; });                                                            \
    }                                                                                                                       \
    inline void NAME(const LocalTensor<float>& to, const LocalTensor<float>& from, float y, uint64_t mask, uint8_t repeats, \
                     const UnaryRepeatParams& p) {                                                                          \
        unary(to, from, mask, repeats, p, [y](float x) { return RESULT; });                                                 \
    }
SHIM_SCALAR(Adds, x + y)
SHIM_SCALAR(Muls, x* y)

#define SHIM_BINARY(NAME, RESULT)                                                                                             \
    inline void NAME(const LocalTensor<float>& to, const LocalTensor<float>& a, const LocalTensor<float>& b, int32_t count) { \
        binary(to, a, b, count, [](float x, float y) { return RESULT; });                                                     \
    }                                                                                                                         \
    inline void NAME(const LocalTensor<float>& to, const LocalTensor<float>& a, const LocalTensor<float>& b, uint64_t mask,   \
                     uint8_t repeats, const BinaryRepeatParams& p) {                                                          \
        binary(to, a, b, mask, repeats, p, [](float x, float y) { return RESULT; });                                          \
    }
SHIM_BINARY(Add, x + y)
SHIM_BINARY(Sub, x - y)
SHIM_BINARY(Mul, x* y)
SHIM_BINARY(Div, x / y)
SHIM_BINARY(Max, x > y || y != y ? x : y)

inline void fill(const LocalTensor<float>& to, float value, uint64_t bits, uint8_t repeats, uint16_t step, uint8_t jump) {
    begin(false), ready(to);
    each(repeats, bits, [&](uint32_t repeat, uint32_t lane) {
        to.touch(spot(repeat, lane, step, jump), 1, PIPE_V, true);
        *to.at(spot(repeat, lane, step, jump)) = value;
    });
}
inline void Duplicate(const LocalTensor<float>& to, float value, uint64_t mask, uint8_t repeats, uint16_t step, uint8_t jump) {
    fill(to, value, lanes(mask), repeats, step, jump);
}
inline void Duplicate(const LocalTensor<float>& to, float value, uint64_t mask[], uint8_t repeats, uint16_t step, uint8_t jump) {
    fill(to, value, mask[0], repeats, step, jump);
}
inline void Duplicate(const LocalTensor<float>& to, float value, int32_t count) {
    begin(false), ready(to);
    to.touch(0, count, PIPE_V, true);
    std::fill(to.at(0), to.at(count), value);
}

template <class D, class S>
void Cast(const LocalTensor<D>& to, const LocalTensor<S>& from, RoundMode mode, uint32_t count) {
    if ((mode == RoundMode::CAST_NONE) != (sizeof(D) > sizeof(S)))
        fail("%s: Cast to fewer bits needs rounding, to more none", name_of(here()));
    unary(to, from, count, [](S x) { return (D)x; });
}

template <class F>
void reduce(const LocalTensor<float>& to, const LocalTensor<float>& from, int32_t mask, int32_t repeats, int32_t dst, int32_t step,
            int32_t jump, F f) {
    begin(false), to.lies_in(shim::UB), ready(from);
    each(repeats, lanes(mask), [&](uint32_t repeat, uint32_t lane) {
        from.touch(spot(repeat, lane, step, jump), 1, PIPE_V, false);
        to.touch(repeat * dst, 1, PIPE_V, true);
        const float x = *from.at(spot(repeat, lane, step, jump));
        *to.at(repeat * dst) = lane == 0 ? x : f(*to.at(repeat * dst), x);
    });
}
inline void WholeReduceMax(const LocalTensor<float>& to, const LocalTensor<float>& from, int32_t mask, int32_t repeats, int32_t dst,
                           int32_t step, int32_t jump, ReduceOrder order) {
    if (order != ReduceOrder::ORDER_ONLY_VALUE) fail("the shim reduces to values only");
    reduce(to, from, mask, repeats, dst, step, jump, [](float x, float y) { return x > y || y != y ? x : y; });
}
inline void WholeReduceSum(const LocalTensor<float>& to, const LocalTensor<float>& from, int32_t mask, int32_t repeats, int32_t dst,
                           int32_t step, int32_t jump) {
    reduce(to, from, mask, repeats, dst, step, jump, [](float x, float y) { return x + y; });
}

inline void Brcb(const LocalTensor<float>& to, const LocalTensor<float>& from, uint8_t repeats, const BrcbRepeatParams& p) {
    begin(false), ready(to), ready(from);
    for (size_t i = 0; i < 8 * repeats; ++i) {
        const size_t at = (i / 8 * p.dstRepStride + i % 8 * p.dstBlkStride) * 8;
        from.touch(i, 1, PIPE_V, false), to.touch(at, 8, PIPE_V, true);
        std::fill(to.at(at), to.at(at + 8), *from.at(i));
    }
}

}  // namespace AscendC
