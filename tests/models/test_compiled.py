"""`torch.compile` takes in the whole MoE block: no graph break, no graph for every length, the same numbers.

Under ``fullgraph=True`` dynamo records operators whose shapes depend on data and breaks at them otherwise, so what
counts here is that compiling *without* it finds no reason to break.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters

from namex_hf.models.soft_segments import History, Segments, plan_segments

HIDDEN, VOCAB = 32, 61
LENGTHS = (12, 21, 17)
over_families = pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
SPARSE = [
    {"merge": "residual"},
    {"merge": "residual", "routing": "cosine"},
    {"merge": "residual", "routing": "stable"},
    {"merge": "residual", "method": "smoe", "routing": "cosine"},
    {"merge": "residual", "method": "smoe", "routing": "stable"},
]
SOFT = [
    {"merge": "soft", "segment": 4, **fields}
    for fields in (
        {},
        {"curvature": "calibrated", "rank": 2},
        {"curvature": "kronecker", "rank": 2},
        {"routing": "cosine"},
        {"routing": "stable"},
        {"method": "smear"},
        {"eta": 0.5, "routing_span": "previous"},
    )
]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def layout(batch: int, length: int) -> Segments:
    """Two packed documents in the first row, padding in the last; without a cache, as in training."""
    real = torch.ones(batch, length, dtype=torch.bool)
    real[-1, :3] = False
    position = torch.arange(length).repeat(batch, 1)
    position[0, length // 2 :] -= length // 2
    return plan_segments(History.empty(batch, real.device), real, position, 4, "all", keep=False)[0]


def inputs(length: int, dtype: torch.dtype, segments: bool) -> tuple:
    draw = torch.Generator().manual_seed(length)
    hidden = torch.randn(2, length, HIDDEN, generator=draw).to(dtype).requires_grad_()
    ids = torch.randint(VOCAB, (2, length), generator=draw)
    return (hidden, ids, layout(2, length), None) if segments else (hidden, ids)


def answers(block, module, args, training: bool) -> list[torch.Tensor]:
    """Output of `block`, or of what was compiled of it, and in training all gradients of some loss."""
    with torch.set_grad_enabled(training):
        output = block(*args)
    if not training:
        return [output]
    weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    learnt = [args[0], *module.parameters()]
    return [output, *torch.autograd.grad((output * weights).sum(), learnt)]


def check_block(block, soft: bool, training: bool, dtype: torch.dtype = torch.float32) -> int:
    """One block against itself compiled, over `LENGTHS`; returns how many graphs were made."""
    block.train(training)
    counter = CompileCounterWithBackend("aot_eager") if training else CompileCounter()
    compiled = torch.compile(block, backend=counter)
    for length in LENGTHS:
        args = inputs(length, dtype, soft)
        wanted, found = answers(block, block, args, training), answers(compiled, block, args, training)
        assert sum(bool(part.any()) for part in wanted) >= len(wanted) - 1  # smear: what no input chooses is not learnt
        torch.testing.assert_close(found, wanted)
    return counter.frame_count


@in_both_modes
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *(("qwen2_moe", fields) for fields in SPARSE + SOFT),
        *(("deepseek", fields) for fields in (SPARSE[0], SOFT[0], SOFT[2])),  # the mixins are the same
    ],
    ids=str,
)
def test_the_block_is_one_graph(namex_model, family, fields, training):
    model = namex_model(family, **fields)
    graphs = check_block(model.model.layers[-1].mlp, fields["merge"] == "soft", training)
    assert not counters["graph_break"]
    assert graphs <= 2  # one of the first length, one of any


def test_the_block_is_one_graph_in_bfloat16(namex_model):
    """Compiled, transformers multiplies float32 experts another way than these."""
    model = namex_model("qwen2_moe", torch.bfloat16, merge="residual")
    graphs = check_block(model.model.layers[-1].mlp, soft=False, training=True, dtype=torch.bfloat16)
    assert not counters["graph_break"]
    assert graphs <= 2


@pytest.mark.parametrize("fields", [{}, {"curvature": "kronecker", "rank": 2}], ids=str)
def test_the_block_by_token_is_one_graph(namex_model, fields):
    """In bfloat16, as the grouped product is not compiled in float32; there the batched one is."""
    for dtype, implementation in ((torch.bfloat16, "grouped_mm"), (torch.float32, "batched_mm")):
        model = namex_model("qwen2_moe", dtype, merge="soft", **fields)
        model.set_experts_implementation(implementation)
        graphs = check_block(model.model.layers[-1].mlp, soft=False, training=True, dtype=dtype)
        assert not counters["graph_break"]
        assert graphs <= 2
        torch.compiler.reset()


@pytest.mark.parametrize(("implementation", "breaks"), [("grouped_mm", 0), ("batched_mm", 0), ("eager", 1)])
def test_implementations_of_the_experts(namex_model, implementation, breaks):
    """transformers' loop over the experts in use, ``eager``, asks data how long it is."""
    model = namex_model("qwen2_moe", merge="residual")
    model.set_experts_implementation(implementation)
    check_block(model.model.layers[-1].mlp, soft=False, training=True)
    assert bool(counters["graph_break"]) == breaks


def two_layers(model):
    """The first two, which take less time to compile; of DeepSeek one is dense."""
    model.model.layers = model.model.layers[:2]
    return model


def losses(model, called, training: bool, auxiliary: bool) -> list[list[torch.Tensor]]:
    """Loss, and in training all gradients, of `model` or of what was compiled of it, over `LENGTHS`."""
    found = []
    for length in LENGTHS:
        tokens = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.set_grad_enabled(training):
            output = called(tokens, labels=tokens, use_cache=False, output_router_logits=auxiliary)
        found.append([output.loss.detach()])
        if training:
            found[-1] += torch.autograd.grad(output.loss, list(model.parameters()))
    return found


@pytest.mark.parametrize(
    ("family", "fields", "checkpointing"),
    [
        ("qwen2_moe", SPARSE[0], False),
        ("qwen2_moe", SPARSE[0], True),
        ("qwen2_moe", SOFT[0], True),
        ("deepseek", SOFT[0], False),
    ],
    ids=str,
)
def test_the_whole_model_in_training(namex_model, family, fields, checkpointing):
    """``soft`` is laid out between two graphs, as the number of runs and groups is data.

    Under checkpointing without the auxiliary loss: transformers notes router logits in a list, which a graph that is
    computed twice must not touch.
    """
    model = two_layers(namex_model(family, **fields)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = losses(model, model, training=True, auxiliary=not checkpointing)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    found = losses(model, compiled, training=True, auxiliary=not checkpointing)
    torch.testing.assert_close(found, wanted)
    soft = fields["merge"] == "soft"
    assert len(counters["graph_break"]) == soft
    assert all("SegmentedModel._lay_out" in reason for reason in counters["graph_break"])
    assert counter.frame_count <= (4 if soft else 2)


def test_the_whole_model_without_gradients(namex_model):
    model = two_layers(namex_model("qwen2_moe", **SOFT[0]))
    wanted = losses(model, model, training=False, auxiliary=True)
    counter = CompileCounter()
    torch.testing.assert_close(losses(model, torch.compile(model, backend=counter), False, True), wanted)
    assert len(counters["graph_break"]) == 1
    assert counter.frame_count <= 4


@over_families
def test_generation_through_compiled_blocks(namex_model, family):
    """With a cache, data says whose experts are kept: recorded all the same, in one graph a kind of pass."""
    model = namex_model(family, **SOFT[2])
    prompt = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    wanted = model.generate(prompt, **how)
    counter, blocks = CompileCounter(), [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    assert model.generate(prompt, **how).equal(wanted)
    assert 0 < counter.frame_count <= 4 * len(blocks)
