from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "prefixmem_fast" / "_version.py").read_text().splitlines()
    if line.startswith("__version__")
)

train = ["transformers>=4.57.1", "accelerate", "peft", "pyyaml", "pyarrow", "matplotlib", "sacrebleu"]

setup(
    name="prefixmem_fast",
    version=version,
    description="Fused Triton kernels, autograd operators and modules for PrefixMem, an encoder for Semantic IDs",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["prefixmem_fast*"]),
        *(f"prefixmem_fast.{name}" for name in find_packages(include=["kernels*", "bench*"])),
    ],
    # Top-level packages named "kernels" and "bench" would shadow others; the Hugging Face package "kernels" is one.
    package_dir={"prefixmem_fast.kernels": "kernels", "prefixmem_fast.bench": "bench"},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "triton; platform_system == 'Linux'",
        "numpy",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "hf": ["transformers>=4.57.1"],
        "train": train,
        "bench": [*train, "nvidia-ml-py"],
        "test": [*train, "pytest", "pytest-xdist", "hypothesis", "ruff", "setuptools>=68"],
    },
    entry_points={"console_scripts": ["prefixmem = prefixmem_fast.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
