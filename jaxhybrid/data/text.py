"""The text of a run, opened from its `data` settings: training text, held-out text, and the tokenizer they share."""

from dataclasses import dataclass

import jax

from jaxhybrid import hosts
from jaxhybrid.data.batches import BatchIterator, HeldoutBatches, training_batches
from jaxhybrid.data.sources import open_source
from jaxhybrid.data.split import take_heldout, without
from jaxhybrid.data.streaming import TokenStream
from jaxhybrid.data.tokens import TokenDataset, open_tokens
from jaxhybrid.data.vocabulary import Vocabulary, load_vocabulary
from jaxhybrid.model.partition import ROWS, own_share
from jaxhybrid.settings.run import DataConfig
from jaxhybrid.settings.stages import StageConfig


@dataclass(frozen=True)
class Text:
    train: TokenDataset | TokenStream
    heldout: TokenDataset  # no document of it, word for word, is in train
    vocabulary: Vocabulary
    separate_documents: bool  # in a row, they do not see each other

    def fingerprints(self) -> dict[str, str]:
        """Of all that is read; equal where the same text was read the same way."""
        return {
            "training text": self.train.fingerprint,
            "held-out text": self.heldout.fingerprint,
            "tokenizer": self.vocabulary.fingerprint,
        }

    def training_batches(self, stage: StageConfig, seed: int, host: tuple[int, int] | None = None) -> BatchIterator:
        """This process's batches of a stage, from their start; or those of process `host[0]` of `host[1]`."""
        train, host = self.train.at_least(stage.min_document_tokens or 1), host or _this_host()
        return training_batches(
            train, stage.sequence_length, stage.batch_size, seed, *host, separate_documents=self.separate_documents
        )

    def heldout_batches(self, sequence_length: int, batch_size: int, tokens: int) -> HeldoutBatches:
        """This process's batches of the first `tokens` held-out tokens."""
        return HeldoutBatches(
            self.heldout, sequence_length, batch_size, tokens, *_this_host(), separate_documents=self.separate_documents
        )


def _this_host() -> tuple[int, int]:
    """Which share of a batch's rows is this process's, and how many shares there are."""
    mesh = jax.sharding.get_mesh()
    return (jax.process_index(), jax.process_count()) if mesh.empty else own_share(mesh, *ROWS)


def open_text(config: DataConfig, teacher_folder: str, vocab_size: int, progress: bool = True) -> Text:
    """Opens, and on first use tokenises, everything that `config` names. Raises DataError.

    Of many hosts the first one goes ahead: the others find what it has fetched and tokenised, where they see its disk.
    """
    with hosts.first_in_turn("text"):
        return _open_text(config, teacher_folder, vocab_size, progress and hosts.is_first())


def _open_text(config: DataConfig, teacher_folder: str, vocab_size: int, progress: bool) -> Text:
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
    return Text(train, heldout, vocabulary, config.separate_documents)
