"""The GPUs that programs may take, without taking any: they are for this process's children."""

import os
import subprocess


def visible_gpus() -> list[str]:
    """By the names that CUDA_VISIBLE_DEVICES takes; what stands behind a negative number there is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
        return [str(number) for number in range(len(listed.splitlines()))]
    found = []
    for name in filter(None, map(str.strip, named.split(","))):
        if name.startswith("-"):
            break
        found.append(name)
    return found
