"""The GPUs that programs may take, without taking any: they are for this process's children."""

import os
import subprocess


def visible_gpus() -> list[str]:
    """By the names that CUDA_VISIBLE_DEVICES takes."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    return [str(number) for number in range(len(listed.splitlines()))]
