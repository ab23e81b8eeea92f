"""The packaged models as other programs find them: whole, with an index, and with the code that they need."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.models import remote_code
from tests.helpers.absent import child

MODELS = ("tiny", "tiny-deepseek", "tiny-qwen3")
OPEN = """
import transformers.models.qwen2_moe.modeling_qwen2_moe
del transformers.modeling_utils.slice_logits_to_keep  # transformers 5.19 lacks it
model = AutoModelForCausalLM.from_pretrained(folders["one"], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
ids = torch.arange(50, 80).view(2, 15)
save_file({"logits": model(ids).logits.detach()}, f"{out}/logits.safetensors")
"""


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_is_read_alike_by_all(name: str):
    config = json.loads((PACKAGED / name / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config["rope_theta"], config["rope_scaling"], config["tie_word_embeddings"]) == (10000.0, None, False)
    assert config.get("auto_map", {}) == remote_code(config["model_type"]).auto_map


@pytest.mark.parametrize("name", MODELS)
def test_the_index_counts_every_tensor(name: str):
    tensors = load_file(PACKAGED / name / "model.safetensors")
    assert tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"]) == (name != "tiny-qwen3")
    index = json.loads((PACKAGED / name / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(tensors), "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(path.stat().st_size <= 9_000_000 for path in (PACKAGED / name).iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_the_code_is_that_of_the_package(name: str):
    """`python packaged/save.py` brings it up to date."""
    code = remote_code(json.loads((PACKAGED / name / "config.json").read_text())["model_type"])
    found = {path.name: path.read_text("utf-8") for path in (PACKAGED / name).glob("*.py")}
    assert found == {file.name: file.read_text("utf-8") for file in code.files}


def test_tiny_deepseek_opens_where_the_package_is_absent(tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = PACKAGED / "tiny-deepseek"
    done = child(OPEN, [json.dumps({"one": str(folder)}), str(tmp_path)], tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(50, 80).view(2, 15)).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], wanted, rtol=0.02, atol=0.02)
