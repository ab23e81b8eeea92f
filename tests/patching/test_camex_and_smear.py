"""CAMEx and SMEAR out of core: what is written, and what the folder then says, against loops in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from namex_hf import Recipe, load_patched, patch_checkpoint
from tests.helpers.checkpoints import PROJECTIONS, aligned, differing, moe_layers, read_config, read_tensors, same_bits
from tests.helpers.reference import Matrices, expert64, experts_at, own_base, softmax64

SEGMENT = 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("base", "index"), [("first", 0), ("index:5", 5)])
def test_camex_copies_the_expert_of_every_layer(odd, tmp_path: Path, dtype: torch.dtype, base: str, index: int) -> None:
    """Bit for bit, each layer its own."""
    patch_checkpoint(odd("deepseek", dtype), tmp_path / "out", Recipe(method="camex", base=base))
    written = read_tensors(tmp_path / "out")
    for layer in (1, 2, 3):
        block = f"model.layers.{layer}.mlp"
        for name in PROJECTIONS:
            copied = written[f"{block}.base_expert.{name}.weight"]
            assert same_bits(copied, written[f"{block}.experts.{index}.{name}.weight"])


def test_camex_reports_lengths_and_cosines_and_no_weights(odd, tmp_path: Path) -> None:
    source = odd("deepseek", torch.float32)
    report = patch_checkpoint(source, tmp_path / "out", Recipe(method="camex"))
    statistics = load_file(tmp_path / "out" / "namex/statistics.safetensors")
    assert [layer["layer"] for layer in report.layers] == [1, 2, 3]
    for layer in report.layers:
        number = layer["layer"]
        experts, base = experts_at(source, number), own_base(source, number, "shared")
        cosines = statistics[f"layers.{number}.cosines"].numpy()
        assert [game["projections"] for game in layer["games"]] == [[name] for name in PROJECTIONS]
        for game, cosine, name in zip(layer["games"], cosines, PROJECTIONS, strict=True):
            tau = (experts[name] - base[name]).reshape(len(experts[name]), -1)
            lengths = np.linalg.norm(tau, axis=1)
            assert game["status"] == "own_base"
            assert {game[key] for key in ("weights", "residual", "spread", "step_norm", "cosine_to_mean")} == {None}
            assert game["norms"] == pytest.approx(lengths, rel=1e-5)
            assert cosine == pytest.approx(tau @ tau.T / np.outer(lengths, lengths), abs=1e-5)


def top_k_values(router: np.ndarray, x: np.ndarray, top_k: int) -> np.ndarray:
    p = softmax64(router @ x)
    return np.where(p >= np.sort(p)[-top_k], p, 0)


def camex(experts: Matrices, base: Matrices, shares: list[np.ndarray], x: np.ndarray, merge: str) -> np.ndarray:
    """The routed part of one document, token by token: eq. 2 with the mean of earlier segments, or `residual`."""
    rows = []
    for token, s in enumerate(shares):
        if merge == "residual":
            outputs = [s[i] * expert64(x[token], {n: experts[n][i] for n in PROJECTIONS}) for i in range(len(s))]
            rows.append(sum(outputs) + (1 - s.sum()) * expert64(x[token], base))
            continue
        before = shares[: token // SEGMENT * SEGMENT]
        s = np.mean(before, axis=0) if before else np.zeros(len(s))
        merged = {n: base[n] + sum(s[i] * (experts[n][i] - base[n]) for i in range(len(s))) for n in PROJECTIONS}
        rows.append(expert64(x[token], merged))
    return np.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
@pytest.mark.parametrize("merge", ["residual", "soft"])
@pytest.mark.parametrize("base", ["shared", "first"])
def test_camex_speaks_as_defined(odd, tmp_path: Path, family: str, merge: str, base: str) -> None:
    """Logits of the folder against a pass in float64 whose routed parts are the loops above."""
    source, own = odd(family, torch.float32), {"segment": SEGMENT} if merge == "soft" else {}
    patch_checkpoint(source, tmp_path / "out", Recipe(method="camex", merge=merge, base=base, **own))
    tokens = torch.randint(3, 53, (1, 14), generator=torch.Generator().manual_seed(2))
    found = aligned(load_patched(tmp_path / "out", dtype=torch.float32))(input_ids=tokens).logits
    exact, config = load_patched(tmp_path / "out", dtype=torch.float64), read_config(source)
    for layer in moe_layers(config):
        block = exact.model.layers[layer].mlp
        own_expert, router = own_base(source, layer, base), block.gate.weight.numpy()

        def routed(flat, *_, layer=layer, own_expert=own_expert, router=router):
            x = flat.numpy()
            shares = [top_k_values(router, token, config["num_experts_per_tok"]) for token in x]
            return torch.from_numpy(camex(experts_at(source, layer), own_expert, shares, x, merge))

        block.routed = routed
    wanted = exact(input_ids=tokens, use_cache=False).logits
    assert wanted.dtype == torch.float64
    assert (found - wanted).abs().max() < 2e-5


def test_smear_adds_no_tensor(odd, tmp_path: Path) -> None:
    """The original's bytes under the patched type; no layer was worked on, so there is nothing to tell of one."""
    source = odd("qwen2_moe", torch.bfloat16, shards=2)
    report = patch_checkpoint(source, tmp_path / "out", Recipe(method="smear", merge="soft"))
    assert differing(read_tensors(source), read_tensors(tmp_path / "out")) == []
    assert read_config(tmp_path / "out")["model_type"] == "namex_qwen2_moe"
    assert read_config(tmp_path / "out")["namex"]["method"] == "smear"
    assert report.layers == []
    assert not (tmp_path / "out" / "namex/statistics.safetensors").exists()
