"""What surrounds a teacher's weights."""

import string

import pytest


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """What surrounds a teacher's weights: config, tokenizer, generation config, licence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("hub") / "models--acme--tiny-1M" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    # Letters in pieces of BPE: for Qwen2 transformers makes a tokenizer of that kind, whatever the file has.
    letters = ["<eos>", "Ġ", *string.ascii_letters]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.7, "do_sample": true}')
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 0, "bos_token_id": 1}')
    (folder / "LICENSE").write_text("Do good.\n")
    (folder / "USE_POLICY.md").write_text("Do no harm.\n")
    (folder / "pytorch_model.bin").write_text("not to be copied")
    return folder
