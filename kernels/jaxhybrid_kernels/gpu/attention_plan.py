"""Everything static about one call of the softmax attention kernels."""

from typing import Any, NamedTuple

ROWS = 64  # of a product, and so of what one warpgroup holds: queries of one head, or keys
WARPGROUPS = 2  # of a thread block that holds queries; one more loads the keys that both meet


class Blocks(NamedTuple):
    """What passes through shared memory: blocks of so many tokens, so many of them under way at once."""

    columns: int
    stages: int


class AttentionPlan(NamedTuple):
    B: int
    Q: int  # queries, whole blocks
    M: int  # keys, whole blocks
    Hq: int
    Hk: int
    D: int
    dtype: Any
    forward: Blocks  # of keys
    query: Blocks  # of keys, in the queries' gradient
    key: Blocks  # of queries, in the keys' and values' gradients
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.Hq // self.Hk

    @property
    def by_head(self) -> bool:
        """The warpgroups of a thread block hold the same queries of neighbouring heads, else neighbouring queries."""
        return self.group % WARPGROUPS == 0

    @property
    def rows(self) -> int:
        """Queries that a thread block holds, of each of its heads."""
        return ROWS if self.by_head else ROWS * WARPGROUPS

    @property
    def heads(self) -> int:
        """Query heads of a thread block that holds queries."""
        return WARPGROUPS if self.by_head else 1
