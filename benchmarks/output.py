"""Rows of results that a benchmark adds to one JSON file as it goes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax


def told(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:,.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


class Output:
    """Rows in a file that is whole after each. A row takes the place of one that has the same values of `same`."""

    def __init__(self, path: Path, same: Sequence[str]):
        self.path, self.same = path, same

    def add(self, part: str, **row: Any) -> None:
        if "device" not in row:  # it was measured in this process
            row = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **row}
        row = {"part": part, **row}
        found = [old for old in self.read() if any(old.get(name) != row.get(name) for name in self.same)]
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps([*found, row], indent=1))
        beside.replace(self.path)
        print(told({name: value for name, value in row.items() if name not in ("device", "jax", "shape")}), flush=True)

    def read(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text()) if self.path.exists() else []
