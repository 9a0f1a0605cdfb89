"""Uploads, to a hub that is played."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from jaxhybrid.errors import ConfigError, RunError
from jaxhybrid.export.folder import export
from jaxhybrid.export.hub import push, require_token
from jaxhybrid.report.notes import model_card
from jaxhybrid.settings.run import RunConfig
from tests.export.students import make_student


@pytest.fixture
def hub(monkeypatch):
    """What was asked of the hub; it takes everything, or raises what is in `trouble`."""
    asked = SimpleNamespace(calls=[], trouble=None)

    class Hub:
        def create_repo(self, repository, *, private, exist_ok):
            asked.calls.append(("create_repo", repository, private, exist_ok))
            if asked.trouble:
                raise asked.trouble

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            names = sorted(path.name for path in folder_path.iterdir())
            asked.calls.append(("upload_folder", repo_id, names))
            return SimpleNamespace(commit_url="https://hub.example/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_played")
    return asked


@pytest.fixture
def exported(tmp_path, teacher_folder):
    return export(make_student(teacher_folder), tmp_path / "student")


def test_all_files_go_in_one_commit(hub, exported):
    assert push(exported, "me/hybrid") == "https://hub.example/commit/1"
    names = sorted(path.name for path in exported.iterdir())
    assert hub.calls == [("create_repo", "me/hybrid", True, True), ("upload_folder", "me/hybrid", names)]
    assert {"checksums.json", "README.md", "LICENSE", "model.safetensors"} <= set(names)


def test_nothing_is_sent_without_a_token_or_a_name(hub, exported, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="hybrid: name a repository as owner/name"):
        push(exported, "hybrid")
    with pytest.raises(ConfigError, match="is not an exported folder"):
        push(tmp_path, "me/hybrid")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token of the Hugging Face hub; run `hf auth login`"):
        require_token("me/hybrid")
    with pytest.raises(ConfigError, match="no token"):
        push(exported, "me/hybrid")
    assert hub.calls == []


def test_a_damaged_file_is_not_sent(hub, exported):
    weights = exported / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunError, match=r"model\.safetensors does not match its checksum; nothing was sent"):
        push(exported, "me/hybrid")
    assert hub.calls == []


def test_what_the_hub_refuses_is_one_error(hub, exported):
    hub.trouble = OSError("403 Forbidden")
    with pytest.raises(RunError, match=r"me/hybrid on the hub did not take .*403 Forbidden"):
        push(exported, "me/hybrid")


def test_the_card_says_how_it_was_made_and_on_which_terms(tmp_path, teacher_folder):
    config = RunConfig.model_validate(
        {"name": "a", "teacher": "t", "data": {"train": "/home/me/text.jsonl"}, "select": {"method": "kl_guided"}}
    )
    figures = {"models": {"teacher": {"perplexity": 9.5, "kl": None}, "finetune": {"perplexity": 10.25, "kl": 0.125}}}
    target = export(make_student(teacher_folder), tmp_path / "student", made=model_card(config, figures))
    card = (target / "README.md").read_text()
    assert "license: other\nlicense_link: LICENSE\n---" in card
    assert "The terms of the base model apply: LICENSE, USE_POLICY.md." in card
    assert "Tokens: align 100,000,000, distill 600,000,000, finetune 100,000,000. Text: text.jsonl." in card
    assert "chosen by `kl_guided`" in card
    assert "| finetune | 10.25 | 0.1250 |" in card
    assert "## Figures" not in model_card(config, None)
