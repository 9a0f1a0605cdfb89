"""Text in, batches of token rows out: sources -> tokens -> packed rows -> resumable per-host batches."""

from jaxhybrid.data.batches import Batch, BatchIterator, HeldoutBatches, mean_segment_tokens, training_batches
from jaxhybrid.data.sources import Source, open_source
from jaxhybrid.data.split import take_heldout
from jaxhybrid.data.streaming import TokenStream
from jaxhybrid.data.text import Text, open_text
from jaxhybrid.data.tokens import TokenDataset, open_tokens
from jaxhybrid.data.vocabulary import Vocabulary, load_vocabulary

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
