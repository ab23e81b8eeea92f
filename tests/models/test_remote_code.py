"""A patched folder where the package is absent: works with ``trust_remote_code=True``, fails loudly without."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from namex_hf.models import remote_code
from tests.helpers.absent import child

TRUSTED = """
tokens = torch.tensor(json.loads(sys.argv[3]))
logits = {}
for kind, folder in folders.items():
    kwargs = {"trust_remote_code": True, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert model.config._experts_implementation == "grouped_mm"
    logits[kind] = model(tokens).logits.detach()
    headless = AutoModel.from_pretrained(folder, **kwargs).eval()
    hidden = headless(tokens).last_hidden_state
    assert torch.equal(model.lm_head(hidden), logits[kind])
    how = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 2):
        made = [model.generate(tokens, num_beams=beams, use_cache=cached, **how) for cached in (True, False)]
        assert torch.equal(*made), kind
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0, **kwargs).eval()
    assert type(reward).__module__.startswith("transformers_modules."), type(reward)
    assert torch.equal(reward(tokens).logits, reward.score(hidden)[:, -1])
    model.save_pretrained(f"{out}/{kind}")
save_file(logits, f"{out}/logits.safetensors")
"""

UNTRUSTED = """
for kind, folder in folders.items():
    for auto in (AutoModel, AutoModelForCausalLM):
        try:
            model = auto.from_pretrained(folder)
            print("LOADED", kind, type(model))
        except Exception as error:
            print("REFUSED", kind, type(error).__name__, str(error).replace("\\n", " "))
            last = error
raise last
"""


@pytest.fixture(scope="module")
def folders(hub_folder, patched_folder, tmp_path_factory) -> dict[str, str]:
    """One folder a model type; the plain DeepSeek as this package saves it, its name with characters to escape."""
    plain = tmp_path_factory.mktemp("saved") / "deepseek-moe.v1"
    AutoModelForCausalLM.from_pretrained(hub_folder("deepseek"), dtype=torch.float32).save_pretrained(plain)
    return {
        "deepseek": str(plain),
        "namex_qwen2_moe": str(patched_folder("qwen2_moe")),
        "namex_deepseek": str(patched_folder("deepseek")),
    }


@pytest.fixture(scope="module")
def chosen_folders(namex_model, tmp_path_factory) -> dict[str, str]:
    """Folders whose recipe asks for a router or a curvature of our own, as this package saves them."""
    soft = {"merge": "soft", "segment": 4}
    kinds = {
        "cosine": {"routing": "cosine"},
        "cosine_soft": {"routing": "cosine", **soft},
        "stable": {"routing": "stable", "method": "smoe"},
        "stable_soft": {"routing": "stable", **soft},
        "kronecker": {"curvature": "kronecker", "rank": 2, **soft},
        "token": {"merge": "soft"},
    }
    made = {}
    for family in ("qwen2_moe", "deepseek"):
        for kind, fields in kinds.items():
            name = f"{family}_{kind}"
            made[name] = str(tmp_path_factory.mktemp("chosen") / name)
            namex_model(family, **fields).save_pretrained(made[name])
    return made


def test_trusted_code_gives_equal_logits_and_saves_itself(folders, chosen_folders, tokens, tmp_path):
    folders, out = folders | chosen_folders, tmp_path / "out"
    out.mkdir()
    done = child(TRUSTED, [json.dumps(folders), str(out), json.dumps(tokens.tolist())], tmp_path / "cwd")
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|deprecated", done.stderr, re.IGNORECASE), done.stderr
    logits = load_file(out / "logits.safetensors")
    for kind, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert type(model).__module__.startswith("namex_hf.models")
        assert torch.equal(model(tokens).logits, logits[kind]), kind
        before, after = load_file(f"{folder}/model.safetensors"), load_file(out / kind / "model.safetensors")
        assert before.keys() == after.keys()
        assert {p.name for p in Path(folder).glob("*.py")} == {p.name for p in (out / kind).glob("*.py")}
        configs = [json.loads(Path(f, "config.json").read_text()) for f in (folder, out / kind)]
        assert configs[0]["auto_map"] == configs[1]["auto_map"]
        assert configs[0].get("namex") == configs[1].get("namex")


def test_without_trust_nothing_is_loaded(folders, tmp_path):
    # a folder without code and without auto_map, as a careless copy leaves it, must not pass for the stock model either
    bare = tmp_path / "qwen2_moe"
    bare.mkdir()
    source = Path(folders["namex_qwen2_moe"])
    config = json.loads((source / "config.json").read_text())
    del config["auto_map"]
    (bare / "config.json").write_text(json.dumps(config))
    (bare / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    cases = folders | {"bare": str(bare)}
    done = child(UNTRUSTED, [json.dumps(cases), str(tmp_path)], tmp_path / "cwd")
    assert done.returncode != 0
    assert "LOADED" not in done.stdout
    refusals = re.findall(r"REFUSED (\S+) (.*)", done.stdout)
    assert [kind for kind, _ in refusals] == [kind for kind in cases for _ in range(2)]
    for kind, message in refusals:
        assert ("model type `namex_qwen2_moe`" if kind == "bare" else "trust_remote_code=True") in message
    assert "ValueError: The checkpoint you are trying to load has model type `namex_qwen2_moe`" in done.stderr


def test_transformers_4_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("transformers.configuration_utils.PreTrainedConfig")
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    (file,) = (path for path in remote_code("namex_qwen2_moe").files if path.name == "configuration_deepseek.py")
    with pytest.raises(ImportError, match=r"^found transformers 4\.57\.6; this code accepts 5\.16 and newer$"):
        runpy.run_path(str(file))
