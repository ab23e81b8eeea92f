"""The native DeepSeek-MoE v1 against the architecture written out in plain torch, float64."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from namex_hf.models import DeepseekConfig, DeepseekForCausalLM, remote_code

ODD = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 26,
    "moe_intermediate_size": 12,
    "n_routed_experts": 7,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,
    "moe_layer_freq": 2,
    "vocab_size": 37,
}
CASES = {
    "plain": {},
    "odd": ODD,
    "misaligned": {"moe_intermediate_size": 10, "intermediate_size": 13},
    "one shared": {"n_shared_experts": 1},
    "none shared": {"n_shared_experts": None},
    "biases": {"attention_bias": True},
    "renormalised": {"norm_topk_prob": True},
    "renormalised top-1": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "all sparse": {"first_k_dense_replace": 0},
    "scaled rotary": {"rope_scaling": {"type": "linear", "factor": 2.0}},
}


class Reference:
    """The architecture from the paper and the Hub's field names; nothing of transformers, one token at a time."""

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor]):
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.router_probabilities: list[torch.Tensor] = []

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * self.tensors[name]

    def swiglu(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate = self.linear(f"{name}.gate_proj", x)
        return self.linear(f"{name}.down_proj", gate * gate.sigmoid() * self.linear(f"{name}.up_proj", x))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions, x [tokens, heads, dim]: the pair (i, i + dim/2) turns by position * theta^(-2i/dim)."""
        half = x.shape[-1] // 2
        frequency = self.config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        factor = (self.config["rope_scaling"] or {"factor": 1.0})["factor"]
        angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None] / factor * frequency
        pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([pairs.real, pairs.imag], -1)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        heads = self.config["num_attention_heads"]
        q, k, v = (self.linear(f"{name}.{p}_proj", x).view(len(x), heads, -1) for p in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        rows = []
        for t in range(len(x)):
            weights = (torch.einsum("hd,shd->hs", q[t], k[: t + 1]) / q.shape[-1] ** 0.5).softmax(-1)
            rows.append(torch.einsum("hs,shd->hd", weights, v[: t + 1]).flatten())
        return self.linear(f"{name}.o_proj", torch.stack(rows))

    def moe(self, name: str, x: torch.Tensor) -> torch.Tensor:
        probabilities = self.linear(f"{name}.gate", x).softmax(-1)
        self.router_probabilities.append(probabilities)
        top_k = self.config["num_experts_per_tok"]
        rows = []
        for token, p in zip(x, probabilities, strict=True):
            chosen = sorted(range(len(p)), key=lambda i: -float(p[i]))[:top_k]
            mass = sum(p[i] for i in chosen) if self.config["norm_topk_prob"] and top_k > 1 else 1.0
            rows.append(sum(p[i] / mass * self.swiglu(f"{name}.experts.{i}", token) for i in chosen))
        y = torch.stack(rows)
        return y + self.swiglu(f"{name}.shared_experts", x) if self.config["n_shared_experts"] else y

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """``[tokens] -> [tokens, vocab]``."""
        x = self.tensors["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            normed = self.norm(f"{name}.input_layernorm.weight", x)
            x = x + self.attention(f"{name}.self_attn", normed)
            normed = self.norm(f"{name}.post_attention_layernorm.weight", x)
            sparse = layer >= self.config["first_k_dense_replace"] and layer % self.config["moe_layer_freq"] == 0
            x = x + (self.moe if sparse else self.swiglu)(f"{name}.mlp", normed)
        return self.linear("lm_head", self.norm("model.norm.weight", x))


def reference_of(folder) -> Reference:
    return Reference(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))


def load(folder, **kwargs) -> DeepseekForCausalLM:
    if json.loads((folder / "config.json").read_text())["moe_intermediate_size"] % 4:
        kwargs["experts_implementation"] = "eager"  # torch's grouped_mm wants rows of a multiple of 16 bytes
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


@pytest.mark.parametrize("case", CASES)
def test_equals_the_architecture_written_out(hub_folder, tokens, case):
    folder = hub_folder("deepseek", **CASES[case])
    reference, model = reference_of(folder), load(folder)
    ids = tokens % reference.config["vocab_size"]
    expected = torch.stack([reference.logits(row) for row in ids])
    actual = model(ids).logits
    assert expected.std() > 0.3  # the comparison sees something
    assert (actual - expected).abs().max() < 1e-5


def test_reads_an_old_config(hub_folder):
    config = load(hub_folder("deepseek")).config
    assert config.rope_parameters == {"rope_theta": 5000.0, "rope_type": "default"}
    assert AutoModel.from_pretrained(hub_folder("deepseek")).dtype == torch.bfloat16
    assert config.num_experts == 8
    assert DeepseekConfig().rope_parameters["rope_theta"] == 10000.0
    assert DeepseekConfig(num_attention_heads=4).num_key_value_heads == 4
    with pytest.raises(ValueError, match="sigmoid"):
        DeepseekConfig(scoring_func="sigmoid")


def test_local_class_wins_over_a_foreign_auto_map(hub_folder):
    # The named repository cannot be fetched here, so a look at it would fail.
    for trust in (None, True, False):
        assert type(load(hub_folder("deepseek"), trust_remote_code=trust)) is DeepseekForCausalLM


@pytest.mark.parametrize("case", ["plain", "odd"])
def test_round_trip_keeps_the_hub_layout(hub_folder, tokens, tmp_path, case):
    folder = hub_folder("deepseek", **CASES[case])
    model = load(folder)
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config, code = json.loads((tmp_path / "config.json").read_text()), remote_code("deepseek")
    assert config["auto_map"] == code.auto_map  # nothing of the foreign one is left
    assert {p.name for p in tmp_path.glob("*.py")} == {p.name for p in code.files}
    ids = tokens % config["vocab_size"]
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


def test_bfloat16(hub_folder, tokens):
    folder = hub_folder("deepseek")
    half = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert half.dtype == torch.bfloat16
    expected = torch.stack([reference_of(folder).logits(row) for row in tokens])
    difference = half(tokens).logits.double() - expected
    assert difference.norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("case", ["plain", "odd"])
def test_experts_implementations_agree(hub_folder, tokens, case):
    folder = hub_folder("deepseek", **CASES[case])
    ids = tokens % json.loads((folder / "config.json").read_text())["vocab_size"]
    eager = load(folder, experts_implementation="eager")
    grouped = load(folder)
    assert grouped.config._experts_implementation == "grouped_mm"
    assert eager.config._experts_implementation == "eager"
    assert (eager(ids).logits - grouped(ids).logits).abs().max() < 1e-5


def test_logits_of_some_positions(hub_folder, tokens):
    model = load(hub_folder("deepseek"))
    whole, mask = model(tokens).logits, torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, 2] = mask[1, 4] = mask[1, 5] = True
    cases = [
        (0, whole),
        (3, whole[:, -3:]),
        (torch.tensor([1, 4]), whole[:, [1, 4]]),
        (torch.tensor([[1, 4], [0, 2]]), torch.stack([whole[0, [1, 4]], whole[1, [0, 2]]])),
        (mask, torch.stack([whole[0, 2], whole[1, 4], whole[1, 5]])),
    ]
    for keep, expected in cases:
        torch.testing.assert_close(model(tokens, logits_to_keep=keep).logits, expected)


def balance_loss(probabilities: list[list[torch.Tensor]], top_k: int, per_sequence: bool) -> float:
    """DeepSeekMoE eq. 12-14 by counting; ``probabilities[layer][sequence]`` is ``[tokens, experts]``."""
    total = 0.0
    for layer in probabilities:
        groups = layer if per_sequence else [torch.cat(layer)]
        terms = []
        for group in groups:
            tokens, experts = group.shape
            count = [0] * experts
            for row in group:
                for i in row.argsort(descending=True)[:top_k]:
                    count[i] += 1
            terms.append(sum(experts / (top_k * tokens) * count[i] * float(group[:, i].mean()) for i in range(experts)))
        total += sum(terms) / len(terms)
    return total


@pytest.mark.parametrize("per_sequence", [True, False])
@pytest.mark.parametrize("case", ["plain", "odd"])
def test_auxiliary_loss(hub_folder, tokens, case, per_sequence):
    folder = hub_folder("deepseek", **CASES[case], seq_aux=per_sequence, aux_loss_alpha=0.5)
    reference, model = reference_of(folder), load(folder)
    ids = tokens % reference.config["vocab_size"]
    for row in ids:
        reference.logits(row)
    layers = len(reference.router_probabilities) // 2
    probabilities = [[reference.router_probabilities[layer + s * layers] for s in (0, 1)] for layer in range(layers)]
    expected = balance_loss(probabilities, reference.config["num_experts_per_tok"], per_sequence)
    output = model(ids, labels=ids, output_router_logits=True)
    assert len(output.router_logits) == layers
    assert output.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    plain = model(ids, labels=ids)
    assert plain.aux_loss is None
    assert (output.loss - plain.loss).item() == pytest.approx(0.5 * expected, rel=1e-4)
    as_tuple = model(ids, labels=ids, output_router_logits=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0] == output.loss
    model.zero_grad()
    output.aux_loss.backward()
    gates = [p.grad for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gates)


def test_gradients_are_finite_and_reach_everything(hub_folder, tokens):
    model = load(hub_folder("deepseek")).train()
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_signature_names_what_trainer_feeds():
    # Trainer drops every data column that forward does not name; without attention_mask padding would be attended.
    assert {"input_ids", "attention_mask", "position_ids", "labels"} <= set(
        inspect.signature(DeepseekForCausalLM.forward).parameters
    )


def test_generates_while_recording_the_router(hub_folder, tokens):
    model = load(hub_folder("deepseek"))
    model.config.output_router_logits = True
    greedy = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    cached = model.generate(tokens, attention_mask=mask, **greedy)
    assert cached.shape == (2, 15)
    assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **greedy))
