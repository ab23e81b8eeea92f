"""How many decoder layers are in memory at once while text passes through a deep model."""

import weakref
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_module_registration_hook
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from namex_hf import patch_checkpoint
from tests.helpers.family_models import save_stock
from tests.helpers.recipes import recipe_of
from tests.helpers.toy_models import add_tokenizer

DEPTH = 12


class Layers:
    """All decoder layers that there are, and the largest number of them that had numbers when any module ran."""

    def __init__(self) -> None:
        self.found: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.most, self.calls = 0, 0

    def register(self, owner: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(module, Qwen3MoeDecoderLayer):
            self.found.add(module)

    def count(self, module: nn.Module, inputs: Any) -> None:
        held = [layer for layer in self.found if any(not parameter.is_meta for parameter in layer.parameters())]
        self.most, self.calls = max(self.most, len(held)), self.calls + bool(held)


def test_at_most_two_of_twelve(words: Path, tmp_path: Path) -> None:
    source = save_stock(tmp_path / "source", "qwen3_moe", num_hidden_layers=DEPTH)
    add_tokenizer(source)
    layers = Layers()
    hooks = [
        register_module_module_registration_hook(layers.register),
        register_module_forward_pre_hook(layers.count),
    ]
    try:
        fields = {"merge": "grouped", "experts": 4, "fit": "router"}
        patch_checkpoint(source, tmp_path / "out", recipe_of(words, fields, tokens=512))
    finally:
        for hook in hooks:
            hook.remove()
    assert layers.calls > DEPTH  # all layers ran with their numbers
    assert 1 <= layers.most <= 2, layers.most
