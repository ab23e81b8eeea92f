"""The decoder, a layer at a time, against transformers' own model, which holds all layers at once."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from namex_hf.calibration.decoder import Decoder, Tapped
from namex_hf.checkpoint.bytes import Reader
from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.checkpoint.source import open_checkpoint
from namex_hf.errors import CheckpointError, FamilyError
from namex_hf.families.outline import outline_of
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import Tensors, read_config, read_tensors, write_folder
from tests.helpers.toy_models import VOCAB, odd_config, toy_tensors

SEQUENCES, LENGTH = 5, 12
BATCHES_OF_2 = 2 * LENGTH
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "qwen": ("qwen2_moe", torch.float32, {}),
    "qwen-renormalised": ("qwen2_moe", torch.float32, {"norm_topk_prob": True}),
    "qwen-sparse-step": ("qwen2_moe", torch.float32, {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "qwen-no-bias": ("qwen2_moe", torch.float32, {"qkv_bias": False}),
    "qwen-sliding": (
        "qwen2_moe",
        torch.float32,
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    ),
    "qwen-tied": ("qwen2_moe", torch.float32, {"tie_word_embeddings": True}),
    "qwen-bf16": ("qwen2_moe", torch.bfloat16, {}),
    "qwen-few-key-heads": ("qwen2_moe", torch.float32, {"num_key_value_heads": 1}),
    "qwen-router-logits": ("qwen2_moe", torch.float32, {"output_router_logits": True}),
    "deepseek": ("deepseek", torch.float32, {}),
    "deepseek-bias": ("deepseek", torch.float32, {"attention_bias": True}),
    "deepseek-renormalised": ("deepseek", torch.float32, {"norm_topk_prob": True}),
    "deepseek-every-second": ("deepseek", torch.float32, {"first_k_dense_replace": 0, "moe_layer_freq": 2}),
    "deepseek-bf16": ("deepseek", torch.bfloat16, {"tie_word_embeddings": True}),
    "deepseek-yarn": (
        "deepseek",
        torch.float32,
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}},
    ),
    "deepseek-dynamic": (
        "deepseek",
        torch.float32,
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    ),
}
MODELS = (*CASES, "tiny", "tiny-deepseek")


class Seen:
    """The whole model: hidden states before the first and after every layer, and what its experts were given."""

    def __init__(self, folder: Path, ids: Tensor) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        self.hidden: list[Tensor] = [self.model.get_input_embeddings()(ids).detach()]
        self.given: dict[int, tuple[Tensor, ...]] = {}
        for index, layer in enumerate(self.model.model.layers):
            layer.register_forward_hook(lambda _, __, output: self.hidden.append(output.detach()))
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_pre_hook(self._keep(index))
        with torch.no_grad():
            self.model(input_ids=ids, use_cache=False)

    def _keep(self, index: int) -> Callable[..., None]:
        def keep(_: Any, arguments: tuple[Tensor, ...]) -> None:
            self.given.setdefault(index, arguments)

        return keep

    @torch.no_grad()
    def routed(self, index: int, tapped: Tapped) -> Tensor:
        experts = self.model.model.layers[index].mlp.experts
        return experts(tapped.inputs, tapped.index, tapped.value).view_as(tapped.rest)


def make(folder: Path, case: str) -> Path:
    family, dtype, changes = CASES[case]
    config = odd_config(family, dtype, **changes)
    tensors = toy_tensors(config, dtype)
    if config["num_key_value_heads"] == 1:
        for name in tensors:
            if ".k_proj." in name or ".v_proj." in name:
                tensors[name] = tensors[name][: config["hidden_size"] // config["num_attention_heads"]].contiguous()
    return write_folder(folder, config, tensors)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(case: str) -> Path:
        if case not in CASES:
            return PACKAGED / case
        if case not in made:
            made[case] = make(tmp_path_factory.mktemp("decoder") / "model", case)
        return made[case]

    return find


def token_ids(vocabulary: int = VOCAB) -> Tensor:
    return torch.randint(vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


def decoder_of(
    config: dict[str, Any], read: Callable[[str], Tensor] | Tensors, batch_tokens: int = BATCHES_OF_2, **options: Any
) -> Decoder:
    outline, tensors = outline_of(config), read

    def reading(name: str) -> Tensor:
        return tensors[outline.stored(name, tensors)] if isinstance(tensors, dict) else tensors(name)

    return Decoder(config, outline, reading, batch_tokens=batch_tokens, **options)


def decoder_in(folder: Path, **options: Any) -> Decoder:
    return decoder_of(read_config(folder), read_tensors(folder), **options)


def walk(decoder: Decoder, ids: Tensor, seen: Seen) -> Iterator[tuple[int, Tensor, Tapped | None]]:
    """Every layer's index, its output, and, of a MoE layer, what was tapped."""
    hidden = decoder.embed(ids)
    for index in range(len(seen.hidden) - 1):
        tapped = None
        with decoder.layer(index) as layer:
            if layer.is_mixture:
                tapped = layer.tap(hidden)
                hidden = tapped.rest + seen.routed(index, tapped)
            else:
                hidden = layer.forward(hidden)
        yield index, hidden, tapped


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", MODELS)
def test_agrees_with_the_whole_model(folder_of: Callable[[str], Path], case: str) -> None:
    checkpoint = open_checkpoint(folder_of(case))
    ids = token_ids(checkpoint.config["vocab_size"])
    seen = Seen(checkpoint.folder, ids)
    with Reader() as reader:
        decoder = decoder_of(checkpoint.config, lambda name: reader.read(checkpoint.spans[name]))
        assert torch.equal(decoder.embed(ids), seen.hidden[0])
        mixtures = set()
        for index, hidden, tapped in walk(decoder, ids, seen):
            close(hidden, seen.hidden[index + 1])
            assert hidden.dtype == torch.float32
            if tapped is not None:
                mixtures.add(index)
                inputs, chosen, value = seen.given[index]
                close(tapped.inputs, inputs)
                assert torch.equal(tapped.index, chosen)
                close(tapped.value, value)
                assert [tapped.inputs.dtype, tapped.value.dtype] == [torch.float32] * 2
    assert mixtures == seen.given.keys()
    assert mixtures


def test_one_batch_of_all_taps_what_the_experts_see_to_the_bit(folder_of: Callable[[str], Path]) -> None:
    folder, ids = folder_of("qwen"), token_ids()
    decoder = decoder_in(folder, batch_tokens=ids.numel())
    with decoder.layer(0) as layer:
        tapped = layer.tap(decoder.embed(ids))
    for ours, theirs in zip((tapped.inputs, tapped.index, tapped.value), Seen(folder, ids).given[0], strict=True):
        assert torch.equal(ours, theirs)


def noted(told: list[int], event: ProgressEvent) -> None:
    told.append(event.amount)


@pytest.mark.parametrize(("batch_tokens", "batches"), [(1, [1] * 5), (2 * LENGTH + 1, [2, 2, 1]), (10**6, [5])])
@pytest.mark.parametrize("case", ["qwen-sliding", "deepseek"])
def test_batches_do_not_matter(
    folder_of: Callable[[str], Path], case: str, batch_tokens: int, batches: list[int]
) -> None:
    folder, ids = folder_of(case), token_ids()
    for index in range(2):
        runs, told = [], []
        progress = partial(noted, told)
        for tokens in (3 * LENGTH, batch_tokens):
            decoder = decoder_in(folder, batch_tokens=tokens)
            told.clear()
            with decoder.layer(index) as layer:
                given = decoder.embed(ids)
                tapped = layer.tap(given, progress) if layer.is_mixture else None
                runs.append(vars(tapped) if tapped else {"hidden": layer.forward(given, progress)})
        assert told == batches
        for name in runs[0]:
            close(runs[0][name], runs[1][name])


def test_written_in_place(folder_of: Callable[[str], Path]) -> None:
    decoder = decoder_in(folder_of("deepseek"))
    hidden = decoder.embed(token_ids())
    before = hidden.clone()
    with decoder.layer(0) as layer:
        assert layer.forward(hidden) is hidden
    assert not torch.equal(hidden, before)
    with decoder.layer(1) as layer:
        assert layer.tap(hidden).rest is hidden


def test_equal_runs_give_equal_bits(folder_of: Callable[[str], Path]) -> None:
    folder, ids = folder_of("qwen-bf16"), token_ids()
    seen = Seen(folder, ids)
    for (_, one, tapped), (_, other, again) in zip(
        walk(decoder_in(folder), ids, seen), walk(decoder_in(folder), ids, seen), strict=True
    ):
        assert torch.equal(one, other)
        if tapped is not None:
            assert again is not None
            assert all(torch.equal(vars(tapped)[name], vars(again)[name]) for name in vars(tapped))


@pytest.mark.parametrize("case", ["qwen", "deepseek-bias"])
def test_reads_a_layer_s_own_tensors_once_and_no_routed_expert(folder_of: Callable[[str], Path], case: str) -> None:
    tensors, names = read_tensors(folder_of(case)), []

    def read(name: str) -> Tensor:
        names.append(name)
        return tensors[name]

    decoder = decoder_of(read_config(folder_of(case)), read)
    assert names == []
    hidden = decoder.embed(token_ids())
    assert names == ["model.embed_tokens.weight"]
    for index in range(4):
        names.clear()
        with decoder.layer(index) as layer:
            _ = layer.tap(hidden) if layer.is_mixture else layer.forward(hidden)
        of_layer = [name for name in tensors if name.startswith(f"model.layers.{index}.")]
        assert sorted(names) == sorted(name for name in of_layer if ".mlp.experts." not in name)


@pytest.fixture
def nothing_yet() -> None:
    """`live_bytes` counts from here on."""
    gc.collect()
    gc.freeze()


def live_bytes() -> int:
    """Bytes of all tensors that Python holds; shared memory counts once."""
    kinds = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.device.type == "cpu"]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kinds}.values())


@pytest.mark.parametrize("case", ["qwen-bf16", "deepseek-bf16"])
def test_one_layer_is_alive_at_a_time(folder_of: Callable[[str], Path], case: str, nothing_yet: None) -> None:
    config, tensors = read_config(folder_of(case)), read_tensors(folder_of(case))
    empty = live_bytes()
    decoder = decoder_of(config, lambda name: tensors[name].clone())
    hidden = decoder.embed(token_ids())
    assert live_bytes() - empty < hidden.nbytes + 1000  # for the rotary embedding; the table has more
    with decoder.layer(0) as layer:  # so that the arguments of the layers are there
        _ = layer.tap(hidden) if layer.is_mixture else layer.forward(hidden)
    del _
    before = live_bytes()
    for index in range(4):
        own = [name for name in tensors if name.startswith(f"model.layers.{index}.") and ".experts." not in name]
        with decoder.layer(index) as layer:
            assert live_bytes() - before == sum(4 * tensors[name].numel() for name in own)
            _ = layer.tap(hidden) if layer.is_mixture else layer.forward(hidden)
        del _
        assert live_bytes() == before, "with the layer's object still in hand"


def test_weights_go_when_the_caller_fails(folder_of: Callable[[str], Path], nothing_yet: None) -> None:
    decoder = decoder_in(folder_of("qwen-bf16"))
    before = live_bytes()

    def fail() -> None:
        with decoder.layer(0):
            assert live_bytes() > before
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    gc.collect()
    assert live_bytes() == before


def test_one_tensor_in_its_own_dtype_at_a_time(folder_of: Callable[[str], Path]) -> None:
    tensors = read_tensors(folder_of("qwen-bf16"))
    memory: list[weakref.ref[Any]] = []

    def read(name: str) -> Tensor:
        assert all(one() is None for one in memory)
        bits = tensors[name].view(torch.int16).numpy().copy()
        memory.append(weakref.ref(bits))
        return torch.from_numpy(bits).view(torch.bfloat16)  # holds the array as long as its memory is in use

    decoder = decoder_of(read_config(folder_of("qwen-bf16")), read)
    decoder.embed(token_ids())
    with decoder.layer(0):
        pass
    assert len(memory) > 10


def test_layers_in_any_order_and_again(folder_of: Callable[[str], Path]) -> None:
    decoder = decoder_in(folder_of("qwen"))
    outputs = []
    for index in (3, 0, 3):
        with decoder.layer(index) as layer:
            outputs.append(layer.tap(decoder.embed(token_ids())).rest)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("case", ["qwen-sliding", "deepseek-yarn"])
def test_over_a_live_model(folder_of: Callable[[str], Path], case: str) -> None:
    ids = token_ids()
    seen = Seen(folder_of(case), ids)
    parameters = dict(seen.model.named_parameters())
    frozen = set(list(parameters)[::2])
    for name in frozen:
        parameters[name].requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    decoder = decoder_of(seen.model.config.to_dict(), parameters.__getitem__)
    for index, hidden, tapped in walk(decoder, ids, seen):
        close(hidden, seen.hidden[index + 1])
        assert not hidden.requires_grad
        assert tapped is None or not tapped.inputs.requires_grad
    for name, parameter in parameters.items():
        assert parameter.requires_grad == (name not in frozen)
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, before[name])


def test_the_outcome_can_take_part_in_training(folder_of: Callable[[str], Path]) -> None:
    decoder = decoder_in(folder_of("qwen"))
    with decoder.layer(0) as layer:
        tapped = layer.tap(decoder.embed(token_ids()))
    weight = torch.zeros(tapped.inputs.shape[1], requires_grad=True)
    (tapped.inputs @ weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_leaves_and_ignores_the_global_state(folder_of: Callable[[str], Path], dtype: torch.dtype) -> None:
    folder, ids = folder_of("deepseek-yarn"), token_ids()
    tensors, config = read_tensors(folder), read_config(folder)
    given, seen = copy.deepcopy(config), Seen(folder, ids)
    expected = [hidden for _, hidden, _ in walk(decoder_of(config, tensors), ids, seen)]
    draw = torch.get_rng_state()
    torch.set_default_dtype(dtype)
    try:
        found = [hidden for _, hidden, _ in walk(decoder_of(config, tensors), ids, seen)]
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))
    assert torch.empty(()).device.type == "cpu"
    assert torch.is_grad_enabled()
    assert torch.equal(draw, torch.get_rng_state())
    assert config == given


def test_a_dropout_of_the_configuration_is_off(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("qwen")
    outputs = []
    for dropout in (0.0, 0.5):
        decoder = decoder_of(read_config(folder) | {"attention_dropout": dropout}, read_tensors(folder))
        with decoder.layer(0) as layer:
            outputs.append(layer.tap(decoder.embed(token_ids())).rest)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("named", ["attn_implementation", "_attn_implementation"])
def test_the_configuration_s_attention_kernel_is_not_needed(folder_of: Callable[[str], Path], named: str) -> None:
    folder = folder_of("qwen")
    outputs = []
    for change in ({}, {named: "flash_attention_2"}):
        decoder = decoder_of(read_config(folder) | change, read_tensors(folder))
        with decoder.layer(0) as layer:
            outputs.append(layer.tap(decoder.embed(token_ids())).rest)
    assert torch.equal(*outputs)


def test_tied_embeddings_under_the_name_of_the_head(folder_of: Callable[[str], Path]) -> None:
    config, tensors = read_config(folder_of("qwen-tied")), read_tensors(folder_of("qwen-tied"))
    expected = decoder_of(config, tensors).embed(token_ids())
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    assert torch.equal(decoder_of(config, tensors).embed(token_ids()), expected)
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight is missing"):
        decoder_of(config | {"tie_word_embeddings": False}, tensors).embed(token_ids())


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_names_the_tensor_that_is_wrong(folder_of: Callable[[str], Path], name: str, fault: str) -> None:
    config, tensors = read_config(folder_of("qwen")), read_tensors(folder_of("qwen"))
    good = tensors.pop(name)
    if fault != "missing":
        tensors[name] = good[..., :-1] if fault == "shape" else good.to(torch.float8_e4m3fn)
    says = {
        "missing": "is missing",
        "shape": rf"is .*\b{good.shape[-1] - 1}\]; config\.json makes it .*\b{good.shape[-1]}\]",
        "dtype": r"is torch\.float8_e4m3fn; accepted: bfloat16, float16, float32",
    }
    decoder = decoder_of(config, tensors)

    def run() -> None:
        decoder.embed(token_ids())
        for index in range(2):
            with decoder.layer(index):
                pass

    with pytest.raises(CheckpointError, match=rf"tensor {name.replace('.', '[.]')} {says[fault]}"):
        run()


def test_refuses_ids_that_the_vocabulary_does_not_have(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"token id {VOCAB}: .* vocabulary {VOCAB}"):
        decoder_in(folder_of("qwen")).embed(torch.tensor([[1, VOCAB]]))


def test_refuses_what_transformers_cannot_build(folder_of: Callable[[str], Path]) -> None:
    config = read_config(folder_of("qwen"))
    with pytest.raises(FamilyError, match=r"config\.json: no model of type 'qwen2_moe' can be built .*nonsense"):
        decoder_of(config | {"hidden_act": "nonsense"}, {})


def test_a_mixture_is_tapped_and_a_dense_layer_run(folder_of: Callable[[str], Path]) -> None:
    decoder = decoder_in(folder_of("deepseek"))
    hidden = decoder.embed(token_ids())
    with decoder.layer(0) as layer, pytest.raises(ValueError, match="layer 0 is dense"):
        layer.tap(hidden)
    with decoder.layer(1) as layer, pytest.raises(ValueError, match="layer 1 is a mixture"):
        layer.forward(hidden)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("kept", ["cpu", "cuda"])
def test_on_the_accelerator(folder_of: Callable[[str], Path], kept: str) -> None:
    folder, ids = folder_of("qwen-sliding"), token_ids()
    seen = Seen(folder, ids)
    decoder = decoder_in(folder, device="cuda")
    hidden = decoder.embed(ids)
    assert hidden.is_cuda
    with decoder.layer(0) as layer:
        tapped = layer.tap(hidden.to(kept))
    for ours, theirs in zip((tapped.inputs, tapped.index, tapped.value), seen.given[0], strict=True):
        assert ours.device.type == kept
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
