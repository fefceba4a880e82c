"""Packages: stf_kernels and llava_integration. reference/, bench/ and tests/ are used from the checkout.

triton is not listed: every GPU build of torch pins the triton that fits it, and without a GPU
stf_kernels runs on its torch path. `[dev]` adds triton for the interpreter and the ahead-of-time compiler.
"""

from pathlib import Path

from setuptools import find_packages, setup

LLAVA = ["transformers>=5.17", "pillow", "safetensors", "tqdm"]
BENCH = [*LLAVA, "einops", "matplotlib", "numpy", "pytest", "pytest-benchmark"]

setup(
    name="stf-kernels",
    version="0.1.0",
    description="Fused Triton kernels for LLaVA-STF: fewer vision tokens, one pass over memory",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["stf_kernels*", "llava_integration*"]),
    package_data={"stf_kernels": ["py.typed", "tuning/tables/*.json"], "llava_integration": ["py.typed"]},
    install_requires=["torch>=2.11"],
    extras_require={
        "llava": LLAVA,
        "bench": BENCH,
        "dev": [
            *BENCH,
            "accelerate",
            "bitsandbytes",
            "hypothesis",
            "peft",
            "ruff",
            "sentencepiece",
            "setuptools>=77",
            "torchao",
            "triton>=3.6",
        ],
    },
)
