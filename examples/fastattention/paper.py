"""What FastAttention's paper (arXiv 2410.16663) claims, as far as we know it, and how safely we do."""

from typing import NamedTuple

ABSTRACT = "abstract"
REVIEWS = "reviews"
RECALLED = "recalled"

TRUST = {
    ABSTRACT: "the paper's abstract says so, and all that we found about the paper repeats it",
    REVIEWS: "reviews and notes by others say so; we did not have the paper's text",
    RECALLED: "from memory, held against no text: a hint",
}


class Claim(NamedTuple):
    """One claim; `key` is what a measurement answers to."""

    key: str
    text: str
    trust: str


CLAIMS = (
    Claim(
        "hand_overs",
        "large tiles cut the hand-overs between matrix and vector cores; small tiles within them fit the chip's buffers",
        REVIEWS,
    ),
    Claim("mask", "one small mask of 2M x 2M, of which every block's mask is a shifted view, replaces the S x S mask", REVIEWS),
    Claim("skipped", "blocks that the mask hides are neither computed nor loaded", REVIEWS),
    Claim("memory", "memory grows with the length, not with its square", REVIEWS),
    Claim("numbers", "the result is that of standard attention", REVIEWS),
    Claim("volta", "operands of Volta's m8n8k4 lie in shared memory so that no layout is converted and no bank conflicts", REVIEWS),
    Claim("reduce", "all-reduce in blocks after the output projection runs beside the next block's computing", REVIEWS),
    Claim("length", "up to 256K tokens of input on 8 V100, with the CPU's memory and computing", ABSTRACT),
    Claim("length_before", "16K tokens without the CPU, for PanGu-38B on 8 V100 of 32 GB", RECALLED),
    Claim("speed_ascend", "up to 10.7x against standard attention on an Ascend NPU", ABSTRACT),
    Claim("speed_llama", "up to 5.16x the throughput of Llama-7B on an Ascend NPU", ABSTRACT),
    Claim("speed_volta", "up to 1.43x against xformers on V100 (by notes of others 1.03 to 1.17x without a causal mask)", ABSTRACT),
    Claim("speed_pangu", "1.46x end to end for PanGu-38B on 8 V100", ABSTRACT),
    Claim("speed_host", "1.27 to 1.48x by attention on the CPU against bringing keys and values to the GPU", RECALLED),
)
