"""The memory calculation: exact parts against tensors of a real step, estimates against what autograd keeps."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from device_memory import (
    DEVICES,
    PUBLISHED,
    STRATEGIES,
    TILE,
    Memory,
    Plan,
    local,
    memory,
    outline,
)
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from namex_hf import Recipe, patch_checkpoint, patch_model
from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.errors import FamilyError, RecipeError, TrainingError
from namex_hf.models.soft_segments import History, plan_segments
from namex_hf.training.choice import lora
from namex_hf.training.live import go_live
from tests.helpers.process import HELPERS, run_pair, script_process

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "finetune" / "memory.py"
CONFIGS = sorted((ROOT / "finetune" / "accelerate_configs").glob("*.yaml"))
CHILD = HELPERS / "sharded_child.py"
RECIPES = [
    Recipe(),
    Recipe(merge="soft"),
    Recipe(merge="soft", curvature="kronecker"),
    Recipe(routing="cosine"),
    Recipe(method="smoe"),
]


def raw(model: str) -> dict:
    return json.loads((PACKAGED / model / "config.json").read_text())


def live(model: str, recipe: Recipe, dtype: torch.dtype):
    return patch_model(AutoModelForCausalLM.from_pretrained(PACKAGED / model, dtype=dtype), recipe)


def step(model) -> dict[str, int]:
    """Bytes that a step of AdamW leaves."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt)
    tokens = torch.randint(3, 4096, (1, 130), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    states = optimizer.state.values()
    return {
        "trained": sum(p.numel() for p in learnt),
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimiser": sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
    }


def exact(found: Memory) -> dict[str, int]:
    return {name: getattr(found, name) for name in ("trained", "weights", "gradients", "optimiser")}


def named(recipe: Recipe, *names: str) -> str:
    return "-".join(str(recipe.to_dict()[name]) for name in names)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: named(r, "method", "merge", "routing", "curvature"))
@pytest.mark.parametrize("model", ["tiny", "tiny-deepseek"])
def test_exact_parts_are_those_of_a_step(model, recipe):
    """Tied embeddings count once; `gate.weight` of a cosine router is a buffer."""
    of = outline(raw(model), recipe)
    for precision, dtype in (("mixed", torch.float32), ("bfloat16", torch.bfloat16)):
        plan = Plan("one", 1, 130, 130, precision=precision)
        assert exact(memory(of, plan)) == step(live(model, recipe, dtype))


@pytest.mark.parametrize(
    "kinds", [("experts", "router"), ("attention", "shared"), ("experts", "base", "attention")], ids="-".join
)
@pytest.mark.parametrize("model", ["tiny", "tiny-deepseek"])
def test_an_adapter(model, kinds):
    """Against PEFT's own adapters in float32 over frozen bfloat16; the base expert's copy stays in bfloat16."""
    patched = live(model, Recipe(), torch.bfloat16)
    adapted = get_peft_model(patched, lora(patched, kinds, 4, 8, 0.0, carry_base=False))
    found = memory(outline(raw(model)), Plan("lora", 1, 130, 130, kinds=kinds, rank=4))
    assert exact(found) == step(adapted)


def test_exact_parts_of_a_live_model():
    """Of its bases one trains, all are held."""
    recipe = Recipe(gamma=0.5)
    plan = Plan("one", 1, 130, 130, precision="mixed", propagation="live")
    assert exact(memory(outline(raw("tiny"), recipe), plan)) == step(go_live(live("tiny", recipe, torch.float32)))


def test_exact_parts_of_an_adapted_live_model():
    patched = live("tiny", Recipe(), torch.bfloat16)
    adapted = get_peft_model(patched, lora(patched, ("experts", "base"), 4, 8, 0.0, carry_base=False))
    go_live(adapted.get_base_model())
    plan = Plan("lora", 1, 130, 130, kinds=("experts", "base"), rank=4, propagation="live")
    assert exact(memory(outline(raw("tiny")), plan)) == step(adapted)


def test_a_live_base_is_kept_for_each_layer_and_in_checkpoints_with_its_momentum():
    plan = Plan("one", devices=1)
    base = 3 * 128 * 80  # four layers have one more than the first
    for checkpointing, momentum, kept in [(False, "none", 2), (True, "none", 4), (True, "complex", 8)]:
        model = outline(raw("tiny"), Recipe(momentum=momentum))
        stored = replace(plan, checkpointing=checkpointing)
        more = memory(model, replace(stored, propagation="live")).activations - memory(model, stored).activations
        assert more == 4 * kept * base + 4 * 16 * 128 * 80  # and a matrix of all experts
    with pytest.raises(TrainingError, match="propagation is 'live', and no base expert of this model walks"):
        memory(outline(raw("tiny"), Recipe(method="camex")), replace(plan, propagation="live"))


def test_an_adapter_on_what_is_not_there():
    with pytest.raises(
        TrainingError, match=r"an adapter on 'curvature', which the model does not have; it has experts,"
    ):
        memory(outline(raw("tiny")), Plan("lora", 1, kinds=("curvature",)))


@pytest.mark.parametrize("name", ["tiny", "tiny-deepseek"])
def test_shards_of_fsdp2_on_two_processes(name, tmp_path):
    patch_checkpoint(name, tmp_path / "patched")
    job = {"folder": str(tmp_path / "patched"), "name": "x", "checkpointing": False, "auxiliary": False}
    (tmp_path / "jobs.json").write_text(json.dumps([{**job, "tokens": [list(range(60)), list(range(60, 120))]}]))
    run_pair(CHILD, [tmp_path / "jobs.json", tmp_path], tmp_path)
    ranks = [json.loads((tmp_path / f"x.{rank}.json").read_text())["bytes"] for rank in range(2)]
    of = outline(json.loads((tmp_path / "patched" / "config.json").read_text()))
    found = memory(of, Plan("fsdp2", 2, 60, 60))
    assert ranks[0] == {
        "weights": found.weights - of.buffers,
        "gradients": found.gradients,
        "moments": found.optimiser,
    }
    assert ranks[0]["weights"] + ranks[1]["weights"] == 4 * sum(of.counts.values())


def test_what_a_device_holds_of_a_parameter():
    two_ways = [local((60, 3), Plan(strategy, 8)) for strategy in ("fsdp2", "zero3")]
    assert two_ways == [8 * 3, 23]
    assert local((1, 5), Plan("fsdp2", 8)) == 5
    assert local((60, 3), Plan("one", 1)) == 180


def kept_by_autograd(layer, hidden: torch.Tensor, **inputs) -> int:
    """Bytes of what a forward pass keeps for the backward pass, beside parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden * 1, **inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "recipe",
    [
        *RECIPES[:3],
        Recipe(method="smoe"),
        Recipe(merge="soft", method="smear"),
        Recipe(merge="soft", method="smear", segment=64),
        Recipe(merge="soft", segment=64),
    ],
    ids=lambda r: named(r, "method", "merge", "curvature", "routing_span"),
)
@pytest.mark.parametrize("model", ["tiny", "tiny-deepseek"])
def test_activations_of_a_layer_are_estimated_to_a_sixth(model, recipe):
    patched, length = live(model, recipe, torch.bfloat16).train(), 256
    layer = patched.model.layers[-1]
    hidden = torch.randn(2, length, 128).bfloat16().requires_grad_()
    angles = torch.randn(1, length, 32).bfloat16()
    inputs = {"position_embeddings": (angles, angles.clone())}
    if recipe.to_dict()["segment"] is not None:
        real = torch.ones(2, length, dtype=torch.bool)
        inputs["segments"] = plan_segments(History.empty(2, real.device), real, None, 64, "all", keep=False)[0]
    kept = kept_by_autograd(layer, hidden, **inputs)
    of = outline(raw(model), recipe)
    plan = Plan("one", 1, 2 * length, length, checkpointing=False)
    estimate = memory(of, plan).activations / len(patched.model.layers)
    assert 5 / 6 < estimate / kept < 7 / 6


def test_checkpointing_keeps_the_inputs_and_one_layer():
    of = outline(PUBLISHED["qwen1.5-moe-a2.7b"].to_dict())
    plan = Plan("one", 1)
    kept, again = memory(of, replace(plan, checkpointing=False)), memory(of, plan)
    assert again.activations == kept.activations // 24 + 24 * 2 * 2048 * plan.tokens
    assert again.logits == kept.logits == 2 * 4096 * 32768 + 4 * 2048 * (4096 + 151936)


def test_tiles_are_trl_s():
    assert TILE == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)


def test_published_shapes():
    """Sizes as their authors state them, 14.3 and 16.4 thousand million, and the base experts besides."""
    sizes = {name: outline(config.to_dict(), Recipe(method="smoe")).counts for name, config in PUBLISHED.items()}
    assert sum(sizes["qwen1.5-moe-a2.7b"].values()) == 14_315_784_192
    assert sum(sizes["deepseek-moe-16b"].values()) == 16_375_728_128
    patched = outline(PUBLISHED["deepseek-moe-16b"].to_dict())
    assert patched.counts["base"] == 27 * 3 * 2048 * 1408
    assert (
        patched.largest_layer() == 64 * 3 * 2048 * 1408 + 64 * 2048 + 3 * (2 + 1) * 2048 * 1408 + 4 * 2048**2 + 2 * 2048
    )
    assert patched.head() == 102400 * 2048


def test_strategies_against_each_other():
    of = outline(PUBLISHED["qwen1.5-moe-a2.7b"].to_dict())
    numbers = sum(of.counts.values())
    found = {
        strategy: memory(of, Plan(strategy, 8 if strategy in ("fsdp2", "zero3") else 1)) for strategy in STRATEGIES
    }
    assert found["one"].exact == 16 * numbers + of.buffers
    assert 2 * numbers <= found["zero3"].exact - of.buffers <= 2 * numbers + 16 * len(of.parts)
    assert found["fsdp2"].exact / found["zero3"].exact == pytest.approx(64 / 60, rel=0.02)  # 60 experts on 8 devices
    assert found["fsdp2"].gathered == found["zero3"].gathered == 2 * (3 * of.largest_layer() + 2 * of.head())
    assert found["one"].gathered == found["lora"].gathered == 0
    half = memory(of, Plan("lora", 1, rank=8))
    assert half.trained * 2 == found["lora"].trained
    assert memory(of, Plan("one", 1, precision="8bit")).exact == 6 * numbers + of.buffers


def test_what_fits():
    found = Memory(0, 30 * 10**9, 0, 0, 0, 5 * 10**9, 10**9)
    assert [size for size in DEVICES if found.fits(size)] == [40, 80, 141]
    assert found.total == 36 * 10**9
    assert not replace(found, logits=10**9 + 1).fits(40)


def test_a_patched_model_has_its_own_recipe():
    soft = outline({**raw("tiny"), "model_type": "namex_qwen2_moe", "namex": Recipe(merge="soft").to_dict()})
    assert soft.parts == outline(raw("tiny"), Recipe(merge="soft")).parts
    with pytest.raises(TrainingError, match="the model is patched already, so a recipe says nothing; accepted: none"):
        outline({**raw("tiny"), "namex": {"merge": "soft"}}, Recipe())


@pytest.mark.parametrize("share", [{"keep": 0.5}, {"merge": "grouped", "keep": 0.5}])
def test_a_share_is_what_stays(share):
    def routed(recipe):
        return sum(part.size for part in outline(raw("tiny"), recipe).parts if part.kind == "experts")

    assert 2 * routed(Recipe(**share)) == routed(Recipe(method="smoe"))


def test_refused_models_and_recipes():
    with pytest.raises(FamilyError, match="model_type 'llama' is not a supported family"):
        outline({"model_type": "llama"})
    with pytest.raises(RecipeError, match="norm_topk_prob"):
        outline({**raw("tiny"), "norm_topk_prob": True})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "zero2"}, "strategy is 'zero2'; accepted: one, fsdp2, zero3, lora"),
        ({"precision": "fp8"}, "precision is 'fp8'; accepted: mixed, master, bfloat16, 8bit"),
        ({"devices": 0}, "devices is 0; accepted: a whole number from 1"),
        ({"length": -1}, "length is -1; accepted: a whole number from 1"),
        ({"rank": 0}, "rank is 0; accepted: a whole number from 1"),
        (
            {"strategy": "lora", "devices": 2},
            "devices is 2 and strategy 'lora' is for one; accepted with more: fsdp2, zero3",
        ),
        ({"tokens": 1000, "length": 300}, "tokens is 1000; accepted: a multiple of length, 300"),
        ({"strategy": "lora", "devices": 1, "kinds": ("norms",)}, "'norms' cannot be trained; accepted"),
    ],
    ids=str,
)
def test_refused_plans(fields, message):
    with pytest.raises(TrainingError, match=message):
        Plan(**fields)


def test_a_live_base_is_refused_where_the_first_layer_has_none():
    with pytest.raises(TrainingError, match="'first_layer' is 'sparse'"):
        memory(outline(raw("tiny"), Recipe(first_layer="sparse")), Plan(propagation="live"))


@pytest.fixture(scope="module")
def script():
    """The script as a module; `finetune` is no package."""
    spec = importlib.util.spec_from_file_location("finetune_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_prints_both_models(tmp_path):
    process = script_process(SCRIPT, [], tmp_path / "log")
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 0, said
    for text in ("14,523,402,240", "16,609,298,432", "fsdp2 x 8", "4,096 tokens"):
        assert text in said


def test_the_script_with_a_folder_and_a_recipe(script, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("merge: soft\ncurvature: kronecker\n")
    (tmp_path / "config.json").write_text((PACKAGED / "tiny" / "config.json").read_text())
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--strategy", "one", "--length", "128", "--tokens", "512"]
    assert script.main([str(tmp_path), *options, "--no-checkpointing", "--precision", "8bit"]) == 0
    said = capsys.readouterr().out
    assert "curvature" in said
    assert "8bit" in said
    assert "fsdp2" not in said
    assert "512 tokens in a device's forward pass, in sequences of 128; activations are kept" in said


def test_devices_are_those_of_what_is_sharded(script):
    chosen = script.plans(script.parser().parse_args(["--devices", "4"]))
    assert [(plan.strategy, plan.devices) for plan in chosen] == [("one", 1), ("fsdp2", 4), ("zero3", 4), ("lora", 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere"],
            "MODEL nowhere: no such folder; accepted: a folder, a packaged model (tiny, tiny-deepseek, tiny-qwen3), or "
            "a Hub id USER/NAME, or a shape by name (qwen1.5-moe-a2.7b, deepseek-moe-16b)",
        ),
        (["--strategy", "zero1"], "strategy is 'zero1'; accepted: one, fsdp2, zero3, lora"),
        (["--devices", "0"], "devices is 0; accepted: a whole number from 1"),
        (["--strategy", "one", "--devices", "2"], "devices is 2 and strategy 'one' is for one"),
        (["tiny", "--recipe", "missing.yaml"], "missing.yaml"),
        ([str(ROOT / "finetune")], "config.json"),
    ],
    ids=str,
)
def test_the_script_answers_mistakes_in_one_line(script, capsys, arguments, message):
    assert script.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("memory.py: error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_the_script_answers_wrong_usage_in_one_line(script, capsys):
    with pytest.raises(SystemExit) as left:
        script.main(["--devices", "many"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said == "memory.py: error: argument --devices: invalid int value: 'many' (see memory.py --help)\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_of_the_launch_configurations_is_known(path):
    """accelerate refuses unknown keys at the top; those below it would set silently, and nothing would read them."""
    ClusterConfig.from_yaml_file(path)
    options = vars(launch_command_parser().parse_args(["script.py"]))
    content = yaml.safe_load(path.read_text())
    for name in ("fsdp_config", "deepspeed_config", "dynamo_config"):
        assert set(content.get(name, {})) <= set(options), name
    assert content.get("fsdp_config", {}).get("fsdp_version", 2) == 2


def test_there_are_three_launch_configurations():
    assert [path.stem for path in CONFIGS] == ["fsdp2", "one_gpu", "zero3"]


def test_moe_classes_of_zero3_are_real():
    """The one that is set is of the default recipe on Qwen; the others are named in the file."""
    text = (ROOT / "finetune" / "accelerate_configs" / "zero3.yaml").read_text()
    assert yaml.safe_load(text)["deepspeed_config"]["deepspeed_moe_layer_cls_names"] == "NamexQwen2MoeSparseMoeBlock"
    for model in ("tiny", "tiny-deepseek"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(PACKAGED / model))
        names = {type(stock.model.layers[-1].mlp).__name__}
        for recipe in (Recipe(), Recipe(merge="soft")):
            names.add(type(live(model, recipe, torch.float32).model.layers[-1].mlp).__name__)
        assert len(names) == 3
        assert all(f" {name}" in text for name in names)
