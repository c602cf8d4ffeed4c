"""Prints the lock file: every package of this environment with its version, but for those installed by other means."""

from __future__ import annotations

from importlib.metadata import distributions

HEADER = """\
# Every package of the CPU environment, with its version. Written by `make lock`; installed by `make install`, with
# --no-deps, after torch's CPU build. torchvision, torchaudio and torchcodec must stay out: their registry builds are
# CUDA builds and break `import transformers` beside a CPU torch."""
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "pip", "troupe"}


def main() -> None:
    """Print it."""
    packages = {found.metadata["Name"].lower().replace("_", "-"): found.version for found in distributions()}
    print(HEADER)
    for name in sorted(packages.keys() - LEFT_OUT):
        print(f"{name}=={packages[name]}")


if __name__ == "__main__":
    main()
