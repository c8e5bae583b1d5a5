// FastAttention for Ascend 910B in Ascend C, forward: the two-level tiling of ../tiling_forward.py. README.md has budget and checks.
//
// An AI core is one Cube core and two Vector cores that meet in memory. It takes blocks of queries; for each, large tiles of keys go by:
//
//   Cube    scores = Q K^T of tile j + 1 -> SCORES     waits WEIGHTS of tile j, products = weights V -> VALUES
//   Vector  waits SCORES of tile j, weights -> WEIGHTS waits VALUES of tile j - 1, sums = sums * shrink + products
//
// One flag per large tile and direction; small tiles need none. Exchanges have two slots, tile after tile, and the flags order their reuse
// too: Cube fills scores of tile j + 2 after WEIGHTS of j and products of j + 2 after WEIGHTS of j + 2, Vector weights of j + 2 after
// VALUES of j.
#include "cube.h"
#include "vector.h"

namespace fast_attention {

template <uint32_t D>
__aicore__ inline void Attention(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR mask, GM_ADDR workspace, GM_ADDR out, GM_ADDR lse,
                                 const Shape& shape) {
    if ASCEND_IS_AIC {
        Cube<D> cube;
        cube.Init(q, k, v, workspace, shape);
        cube.Process();
    }
    if ASCEND_IS_AIV {
        Vector<D> vector;
        vector.Init(mask, workspace, out, lse, shape);
        vector.Process();
    }
}

}  // namespace fast_attention

// q [batch,heads,queries,d] and k, v [batch,kvHeads,keys,d] in fp16, without gaps; heads is a multiple of kvHeads, keys at least 1.
// Query i stands at position qOffset + i, key j at j. mask: the template in fp16, 1 where the column is above the row.
// workspace: Exchange<d>::BYTES for each AI core. out as q; lse [batch,heads,queries] in fp32.
#define ATTENTION(NAME, D)                                                                                                                 \
    extern "C" __global__ __aicore__ void NAME(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR mask, GM_ADDR workspace, GM_ADDR out, GM_ADDR lse, \
                                               uint32_t batch, uint32_t heads, uint32_t kvHeads, uint32_t queries, uint32_t keys,          \
                                               uint32_t qOffset, uint32_t causal, float scale) {                                           \
        KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);                                                                                 \
        const fast_attention::Shape shape = {batch, heads, kvHeads, queries, keys, qOffset, causal, scale};                                \
        fast_attention::Attention<D>(q, k, v, mask, workspace, out, lse, shape);                                                           \
    }
ATTENTION(attention_64, 64)
ATTENTION(attention_128, 128)
