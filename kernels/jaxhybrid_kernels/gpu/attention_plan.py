"""Everything static about one call of the softmax attention kernels."""

from typing import Any, NamedTuple

ROWS = 64  # of a product, and so of a block, that one warpgroup has


class Blocks(NamedTuple):
    """How a kernel divides its work.

    Each warpgroup holds 64 rows (queries, or keys in the kernel of their gradients) and all meet the same blocks of
    `columns`. Two or more warpgroups have one more that loads for them; a single one loads for itself, and more of its
    thread blocks share a multiprocessor.
    """

    columns: int
    stages: int  # blocks under way
    warpgroups: int = 1
    by_head: bool = False  # the warpgroups hold the same queries of neighbouring heads, not neighbouring queries
    alternate: bool = False  # two warpgroups take turns at the tensor cores
    ahead: bool = False  # the next block's scores are under way while this one's values are summed

    @property
    def rows(self) -> int:
        """Tokens of a thread block."""
        return ROWS if self.by_head else ROWS * self.warpgroups

    @property
    def heads(self) -> int:
        """Query heads of a thread block."""
        return self.warpgroups if self.by_head else 1

    @property
    def loader(self) -> bool:
        return self.warpgroups > 1

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that loads and of one that computes, where there is a loader."""
        return (24, 240) if self.warpgroups == 2 else (32, 160)


class AttentionPlan(NamedTuple):
    B: int
    Q: int  # queries, whole blocks
    M: int  # keys, whole blocks
    Hq: int
    Hk: int
    D: int
    dtype: Any
    forward: Blocks
    query: Blocks  # of the queries' gradient
    key: Blocks  # of the keys' and values' gradients, or of all gradients
    joint: bool  # one kernel for all gradients
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.Hq // self.Hk
