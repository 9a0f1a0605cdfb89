"""Text in, batches of token rows out: sources -> tokens -> packed rows -> resumable per-host batches.

Each name is imported when it is first used: what needs a tokenizer alone does without grain.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxhybrid.data.batches import Batch, BatchIterator, HeldoutBatches, mean_segment_tokens, training_batches
    from jaxhybrid.data.sources import Source, open_source
    from jaxhybrid.data.split import take_heldout
    from jaxhybrid.data.streaming import TokenStream
    from jaxhybrid.data.text import Text, open_text
    from jaxhybrid.data.tokens import TokenDataset, open_tokens
    from jaxhybrid.data.vocabulary import Vocabulary, load_vocabulary

_HOMES = {
    "batches": ("Batch", "BatchIterator", "HeldoutBatches", "mean_segment_tokens", "training_batches"),
    "sources": ("Source", "open_source"),
    "split": ("take_heldout",),
    "streaming": ("TokenStream",),
    "text": ("Text", "open_text"),
    "tokens": ("TokenDataset", "open_tokens"),
    "vocabulary": ("Vocabulary", "load_vocabulary"),
}

__all__ = [
    "Batch",
    "BatchIterator",
    "HeldoutBatches",
    "Source",
    "Text",
    "TokenDataset",
    "TokenStream",
    "Vocabulary",
    "load_vocabulary",
    "mean_segment_tokens",
    "open_source",
    "open_text",
    "open_tokens",
    "take_heldout",
    "training_batches",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
