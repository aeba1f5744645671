import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent


def as_shown_elsewhere(text: str) -> str:
    """The README where packages are shown: the files that it links to are not there, so their names stand as text."""

    def replace(link: re.Match) -> str:
        picture, words, target = link.groups()
        if target.startswith(("http:", "https:", "#")):
            return link[0]
        return f"*Picture: {words} ({target}).*" if picture else f"{words} ({target})" if words != target else words

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replace, text)


version = next(
    line.split('"')[1]
    for line in (here / "prefixmem_fast" / "_version.py").read_text().splitlines()
    if line.startswith("__version__")
)

train = ["transformers>=4.57.1", "accelerate", "peft", "pyyaml", "pyarrow", "matplotlib", "sacrebleu"]
serve = ["transformers>=4.57.1", "fastapi", "uvicorn", "prometheus-client"]
export = ["onnx", "onnxscript", "onnxruntime"]

setup(
    name="prefixmem_fast",
    version=version,
    description="Fused Triton kernels, autograd operators and modules for PrefixMem, an encoder for Semantic IDs",
    long_description=as_shown_elsewhere((here / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["prefixmem_fast*"]),
        *(f"prefixmem_fast.{name}" for name in find_packages(include=["kernels*", "bench*"])),
    ],
    # Top-level packages named "kernels" and "bench" would shadow others; the Hugging Face package "kernels" is one.
    package_dir={"prefixmem_fast.kernels": "kernels", "prefixmem_fast.bench": "bench"},
    package_data={
        "prefixmem_fast.kernels": ["native/*"],
        "prefixmem_fast.bench": ["cpp/*"],
        "prefixmem_fast.serving": ["page/*"],
        "prefixmem_fast.examples": ["*.cpp"],
    },
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
        "index": ["faiss-cpu"],
        "serve": serve,
        "export": export,
        "page": ["playwright"],
        "bench": [*train, "nvidia-ml-py"],
        "test": [
            *train,
            *serve,
            *export,
            "faiss-cpu",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "httpx2",
            "ruff",
            "setuptools>=68",
        ],
    },
    entry_points={
        "console_scripts": ["prefixmem = prefixmem_fast.cli:main"],
        "vllm.general_plugins": ["prefixmem_fast = prefixmem_fast.serving.vllm:register"],
    },
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
