"""What importing the package changes in transformers (three new model types) and what it leaves alone."""

import re
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen2MoeModel,
    conversion_mapping,
)
from transformers.models.qwen2_moe import modeling_qwen2_moe

import namex_hf.models
from namex_hf.models import CLASSES, CLASSIFIERS, PATCHED, remote_code

HERE = Path(namex_hf.models.__file__).parent


def test_vanilla_model_is_untouched(hub_folder):
    config = AutoConfig.from_pretrained(hub_folder("qwen2_moe"))
    assert type(config).__module__.startswith("transformers.")
    for auto, expected in ((AutoModel, Qwen2MoeModel), (AutoModelForCausalLM, Qwen2MoeForCausalLM)):
        model = auto.from_pretrained(hub_folder("qwen2_moe"))
        assert type(model) is expected
    assert type(model.model.layers[0].mlp) is modeling_qwen2_moe.Qwen2MoeSparseMoeBlock
    assert config._auto_class is None
    assert Qwen2MoeForCausalLM._auto_class is None


def test_vanilla_conversion_mapping_is_untouched():
    fresh = conversion_mapping._build_checkpoint_conversion_mapping()
    current = conversion_mapping._checkpoint_conversion_mapping_cache
    assert current.keys() - fresh.keys() == set(CLASSES)
    steps = [
        [(type(s), s.source_patterns, s.target_patterns, [type(o) for o in s.operations]) for s in table["qwen2_moe"]]
        for table in (current, fresh)
    ]
    assert steps[0] == steps[1]
    assert "qwen2_moe" not in conversion_mapping.USER_REGISTERED_MAPPINGS


@pytest.mark.parametrize("family", PATCHED)
def test_local_classes_win_over_the_folders_code(patched_folder, family):
    folder = patched_folder(family)
    assert list(folder.glob("modeling_*.py"))
    config, model, causal_lm = CLASSES[PATCHED[family].model_type]
    for trust in (None, False, True):
        assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is config
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)) is model
        assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)) is causal_lm
    assert not any(name.startswith("transformers_modules") for name in sys.modules)


def test_remote_code_lists_what_travels():
    assert remote_code("qwen2_moe") == ({}, ())
    names = {kind: [file.name for file in remote_code(kind).files] for kind in CLASSES}
    assert names["deepseek"] == ["arguments.py", "configuration_deepseek.py", "modeling_deepseek.py"]
    assert names["namex_qwen2_moe"] == [
        "arguments.py",
        "configuration_deepseek.py",
        "configuration_namex.py",
        "modeling_namex_qwen2_moe.py",
        "patched_model.py",
        "routers.py",
        "soft.py",
        "soft_cache.py",
        "soft_curvature.py",
        "soft_kronecker.py",
        "soft_segments.py",
        "soft_token.py",
        "sparse.py",
    ]
    assert names["namex_deepseek"] == [
        "arguments.py",
        "configuration_deepseek.py",
        "configuration_namex.py",
        "modeling_deepseek.py",
        "modeling_namex_deepseek.py",
        "patched_model.py",
        "routers.py",
        "soft.py",
        "soft_cache.py",
        "soft_curvature.py",
        "soft_kronecker.py",
        "soft_segments.py",
        "soft_token.py",
        "sparse.py",
    ]
    for kind, (config, model, causal_lm) in CLASSES.items():
        classes = {"AutoConfig": config, "AutoModel": model, "AutoModelForCausalLM": causal_lm}
        classes["AutoModelForSequenceClassification"] = CLASSIFIERS[kind]
        assert classes.keys() == remote_code(kind).auto_map.keys()
        for auto, cls in classes.items():
            assert remote_code(kind).auto_map[auto] == f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
        for file in remote_code(kind).files:
            assert file.parent == HERE
            # what the loader of remote code cannot follow
            assert not re.search(r"^\s*(from \.\.|from \. |import namex_hf|from namex_hf)", file.read_text(), re.M)
