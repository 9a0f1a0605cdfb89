"""The text of a run, opened from its `data` settings: training text, held-out text, and the tokenizer they share."""

from dataclasses import dataclass

from jaxhybrid.data.sources import open_source
from jaxhybrid.data.split import take_heldout, without
from jaxhybrid.data.streaming import TokenStream
from jaxhybrid.data.tokens import TokenDataset, open_tokens
from jaxhybrid.data.vocabulary import Vocabulary, load_vocabulary
from jaxhybrid.settings import DataConfig


@dataclass(frozen=True)
class Text:
    train: TokenDataset | TokenStream
    heldout: TokenDataset  # no document of it, word for word, is in train
    vocabulary: Vocabulary


def open_text(config: DataConfig, teacher_folder: str, vocab_size: int, progress: bool = True) -> Text:
    """Opens, and on first use tokenises, everything that `config` names. Raises DataError."""
    vocabulary = load_vocabulary(
        config.tokenizer or teacher_folder, vocab_size, config.document_end_token, config.prepend_bos
    )
    longest, treatment, least = config.max_document_tokens, config.long_documents, config.min_document_tokens or 1

    def cached(spec: tuple[str, ...]) -> TokenDataset:
        source = open_source(spec, config.text_column)
        return open_tokens(source, vocabulary, config.cache_dir, longest, treatment, progress).at_least(least)

    train: TokenDataset | TokenStream
    if config.streaming:
        source = open_source(config.train, config.text_column, streaming=True)
        train = TokenStream(source, vocabulary, longest, treatment, config.shuffle_buffer).at_least(least)
    else:
        train = cached(config.train)
    if config.heldout is None:
        train, heldout = take_heldout(train, config.heldout_tokens)
    else:
        heldout = cached(config.heldout)
        train = without(train, heldout.hashes)
    return Text(train, heldout, vocabulary)
