"""Package metadata. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
JAX = "0.10.2"

setup(
    name="tokeff",
    version="0.1.0",
    description="Token efficiency in JAX: KV-cache compression, sparse attention, token reduction and parallel decoding that compose",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["tokeff", "tokeff.*"]),
    package_data={
        "tokeff": ["py.typed", "calibrated/*.json"],
        "tokeff.data": ["text/*"],
        "tokeff.report": ["*.j2"],
        "tokeff.kernels": ["README.md"],
    },
    install_requires=[
        f"jax>={JAX}",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "tensorflow-datasets>=4.9.10",
        "array_record>=0.8",
        "grain>=0.2.18",
        "numpy>=2",
        "scipy>=1.15",
        "safetensors>=0.6",
        "gguf>=0.17",
        "tokenizers>=0.22",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "pillow>=11",
        "rich>=14",
        "tyro>=1.0",
        "tqdm>=4.66",
        "importlib_resources>=6",
    ],
    extras_require={
        "test": [
            f"jax=={JAX}",
            "libtpu==0.0.42.1",
            "flatbuffers",
            "absl-py",
            "bm25s>=0.3",
            "pytest>=9,<9.2",  # xdist 3.8 loses its groups with 9.2, and every cached run is made on every worker
            "pytest-xdist>=3.8",
            "hypothesis>=6",
            "ruff>=0.14",
            "basedpyright>=1.36",
            "nbformat>=5",
            "nbclient>=0.10",
            "ipykernel>=7",
        ],
        "tpu": [f"jax[tpu]>={JAX}"],
        "cuda": [f"jax[cuda13]>={JAX}"],
        "notebooks": ["nbformat>=5", "nbclient>=0.10", "ipykernel>=7"],
        "retrieval": ["bm25s>=0.3"],
        "hub": ["huggingface_hub>=1.0"],
        "peers": ["torch==2.13.0", "transformers==5.2.0", "kvpress==0.5.5"],
    },
    entry_points={"console_scripts": ["tokeff=tokeff.cli:main"]},
    classifiers=["Programming Language :: Python :: 3"],
)
