"""What is carried over beside the weights: known files of the source itself, nothing that a link leads to."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from namex_hf import patch_checkpoint
from namex_hf.checkpoint.companions import companions, is_companion
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import CheckpointError
from tests.helpers.checkpoints import differing, read_tensors

CARRIED = """
tokenizer.json tokenizer.4.0.0.json Tokenizer_Config.json tokenizer.model tokenizer.model.v3 tekken.json spiece.model
sentencepiece.bpe.model tiktoken.model qwen.tiktoken source.spm vocab.json vocab.txt vocab.bpe entity_vocab.json
vocab-src.json merges.txt special_tokens_map.json added_tokens.json generation_config.json chat_template.jinja
chat_template.json additional_chat_templates/tool_use.jinja LICENSE license.txt License.MD LICENCE COPYING NOTICE
notice.txt LICENSE-CODE LICENSE-MODEL LICENSE-APACHE-2.0 MODEL_LICENSE USE_POLICY.md THIRD_PARTY_NOTICES.txt
"""
LEFT = """
tokenizer.pt tokenizer.pkl tokenizer.bin tokenizer.PY tokenization.py tokenizer_setup.exe chat_template.sh vocab.pkl
vocab.so LICENSE.pt LICENSE.py license.SH LICENSE-x.exe NOTICE.so tokenizer.json.sh merges.txt.exe notes.txt .env
additional_chat_templates/a.py additional_chat_templates/a/b.jinja other/LICENSE preprocessor_config.json config.json
README.md model.safetensors training_args.bin LICENSE.txt.part
"""


def test_names() -> None:
    assert [name for name in CARRIED.split() if not is_companion(name)] == []
    assert [name for name in LEFT.split() if is_companion(name)] == []


@pytest.fixture
def source(odd, tmp_path: Path) -> Path:
    return Path(shutil.copytree(odd("qwen2_moe", torch.bfloat16, tokenizer=True, shards=1), tmp_path / "source"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that is not the model's."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_text("mine alone")
    return tmp_path / "private/key"


def test_what_belongs_is_carried_and_nothing_else(source: Path, tmp_path: Path) -> None:
    before = {path.name for path in companions(source)}
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ 'A' }}", "tool_use": "{{ 'B' }}", "rag": "{{ 'C' }}"}
    tokenizer.save_pretrained(source)
    for name in ("license.txt", "USE_POLICY.md", "tokenizer.pkl", "LICENSE.sh", "vocab.so", "chat_template.PY"):
        (source / name).write_text(name)
    patch_checkpoint(source, tmp_path / "out")
    out = {path.relative_to(tmp_path / "out").as_posix() for path in companions(tmp_path / "out")}
    assert out >= before | {"license.txt", "USE_POLICY.md", "additional_chat_templates/rag.jinja"}
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert not there & {"tokenizer.pkl", "LICENSE.sh", "vocab.so", "chat_template.PY"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert "license_link: license.txt" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("name", ["LICENSE-x", "license", "tokenizer.json", "generation_config.json"])
def test_a_link_that_leaves_the_source(source: Path, secret: Path, tmp_path: Path, name: str) -> None:
    """Refused before a byte is written, whether or not there is something at its end."""
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    for _ in ("there", "gone"):
        with pytest.raises(CheckpointError, match=f"{name} is a link that leaves the folder; needed: the file itself"):
            patch_checkpoint(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        secret.unlink(missing_ok=True)


def test_a_folder_of_templates_that_is_a_link(source: Path, secret: Path, tmp_path: Path) -> None:
    (secret.parent / "a.jinja").write_text("mine alone")
    (source / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(CheckpointError, match=r"a\.jinja is a link that leaves the folder"):
        patch_checkpoint(source, tmp_path / "out")


def test_what_is_no_file(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "LICENSE")
    with pytest.raises(CheckpointError, match="LICENSE is no regular file"):
        patch_checkpoint(source, tmp_path / "out")
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to("LICENSE")  # a circle
    with pytest.raises(CheckpointError, match="LICENSE is "):
        patch_checkpoint(source, tmp_path / "out")
    (source / "LICENSE").unlink()
    (source / "licenses").mkdir()
    assert "licenses" not in {path.name for path in companions(source)}


def test_links_inside_the_source_and_to_it(source: Path, tmp_path: Path) -> None:
    (source / "texts").mkdir()
    (source / "texts/mit").write_text("MIT License")
    (source / "LICENSE").symlink_to("texts/mit")
    (tmp_path / "link").symlink_to(source)
    patch_checkpoint(tmp_path / "link", tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_text() == "MIT License"
    assert not (tmp_path / "out/LICENSE").is_symlink()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_that_are_links(source: Path, secret: Path, name: str) -> None:
    (source / name).rename(secret.parent / name)
    (source / name).symlink_to(secret.parent / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link that leaves the folder"):
        resolve(source)


def test_a_shard_that_is_a_link(odd, secret: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(odd("qwen2_moe", torch.bfloat16, shards=2), tmp_path / "source"))
    shard = min(source.glob("model-*.safetensors"))
    shard.rename(secret.parent / shard.name)
    shard.symlink_to(secret.parent / shard.name)
    with pytest.raises(CheckpointError, match=f"{shard.name} is a link that leaves the folder"):
        resolve(source)


def cached(source: Path, cache: Path, name: str) -> Path:
    """The source as the Hub's cache has it: links to blobs."""
    snapshot, blobs = cache / f"models--{name}/snapshots" / ("1" * 40), cache / f"models--{name}/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


def test_the_hub_cache_and_folders_of_links_to_it(source: Path, tmp_path: Path) -> None:
    """Its own blobs belong to a model, those of another repository do not."""
    patch_checkpoint(source, tmp_path / "plain")
    snapshot = cached(source, tmp_path / "cache", "me--q")
    (tmp_path / "mine").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "mine" / path.name).symlink_to(path)
    for folder in (snapshot, tmp_path / "mine"):
        patch_checkpoint(folder, tmp_path / f"of-{folder.name}")
        out = tmp_path / f"of-{folder.name}"
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert differing(read_tensors(tmp_path / "plain"), read_tensors(out)) == []
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    other = cached(source, tmp_path / "cache", "me--private")
    for folder in (snapshot, tmp_path / "mine"):
        (folder / "LICENSE").symlink_to(other / "tokenizer.json")
        with pytest.raises(CheckpointError, match="LICENSE is a link that leaves the folder"):
            resolve(folder)
