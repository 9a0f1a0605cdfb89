"""Figures of compiled programs, kept as JSON files."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxhybrid.files import read_json, write_json

FOLDER = "JAXHYBRID_PLAN_CACHE"


def cache_folder() -> Path:
    """Where plans are kept: what JAXHYBRID_PLAN_CACHE names, else ~/.cache/jaxhybrid/plans."""
    return Path(os.environ.get(FOLDER) or "~/.cache/jaxhybrid/plans").expanduser()


class Cache:
    """A folder with a file for each key. It may be deleted at any time."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under `key`, any JSON, or else what `make` gives, kept from then on."""
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
        path, way_out = self.folder / f"{digest}.json", f"set {FOLDER} to another folder"
        if path.exists():
            found: dict[str, Any] = read_json(path, way_out="Delete it.")["figures"]
            return found
        figures = make()
        write_json(path, {"key": key, "figures": figures}, way_out)
        return figures
