"""The pictures of real patched folders: which there are, what they are made of, and that nothing leaves them."""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")

from namex_hf.bargaining import spectral_radius
from namex_hf.checkpoint.bytes import Reader
from namex_hf.checkpoint.header import TensorSpan
from namex_hf.merging.experts import PROJECTIONS
from namex_hf.recipe import Recipe
from namex_hf.report.answers import answers
from namex_hf.report.distances import distances
from namex_hf.report.folder import PatchedFolder, open_patched
from namex_hf.report.pictures import Material, Picture, draw
from namex_hf.report.pictures.groups import letters, marks, pruned
from namex_hf.report.pictures.picture import INK, PALE, tiles
from namex_hf.report.pictures.similarity import whole
from namex_hf.report.pictures.stability import radii_over_beta, total_weight
from namex_hf.report.pictures.usage import entropy
from namex_hf.report.pictures.utilities import half_sphere, octant
from namex_hf.report.pictures.weights import interactions, relative_weights
from tests.helpers.forms import CALIBRATED

TOKENS = 1024
WALKING = {"1-similarity", "2-weights", "3-walk", "4-utilities", "5-stability", "6-usage"}
NAMES = {
    "qwen2_moe residual": WALKING,
    "qwen2_moe grouped": {"1-similarity", "2-weights", "3-walk", "6-usage", "6-groups"},
    "qwen2_moe calibrated": {"1-similarity", "2-weights", "3-walk", "6-usage", "6-groups", "6-damage"},
    "qwen2_moe pruned": {"1-similarity", "6-usage", "6-groups", "6-damage"},
    "qwen2_moe sparse": {"1-similarity", "6-usage"},
    "qwen2_moe stable": {"1-similarity", "6-usage", "6-damage"},
    "qwen2_moe smear": {"1-similarity", "6-usage"},
    "deepseek residual": WALKING,
    "deepseek camex": WALKING - {"2-weights", "5-stability"},
    "deepseek kronecker": WALKING,
    "deepseek as qwen2_moe": {"1-similarity", "2-weights", "3-walk", "6-usage", "6-groups"},
}


def material_of(folder: PatchedFolder, tokens: int = TOKENS) -> Material:
    return Material(folder, answers(folder, tokens), distances(folder))


@pytest.fixture(scope="module")
def drawn(patched: dict[str, Path]) -> dict[str, list[Picture]]:
    return {form: draw(material_of(open_patched(patched[form]))) for form in NAMES}


@pytest.mark.parametrize("form", NAMES)
def test_a_folder_has_the_pictures_that_it_has_data_for(drawn: dict[str, list[Picture]], form: str):
    assert {picture.name for picture in drawn[form]} == NAMES[form]


@pytest.mark.parametrize("form", NAMES)
def test_every_text_lies_within_its_picture(drawn: dict[str, list[Picture]], form: str):
    for picture in drawn[form]:
        picture.figure.draw_without_rendering()
        around = picture.figure.bbox.padded(1)
        for text in texts_of(picture):
            box = text.get_window_extent()
            assert around.x0 <= box.x0 <= box.x1 <= around.x1, (picture.name, text.get_text())
            assert around.y0 <= box.y0 <= box.y1 <= around.y1, (picture.name, text.get_text())


def texts_of(picture: Picture) -> list[Any]:
    """Titles, axis labels and legends; ticks beyond an axis' limits are there, but not drawn."""
    texts = []
    for axes in picture.figure.axes:
        if axes.get_visible():
            texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
            texts += axes.get_legend().get_texts() if axes.get_legend() else []
    return [text for text in texts if text.get_text().strip()]


@pytest.mark.parametrize("form", NAMES)
def test_no_title_or_legend_lies_on_another(drawn: dict[str, list[Picture]], form: str):
    for picture in drawn[form]:
        picture.figure.draw_without_rendering()
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(picture)]
        for (first, one), (second, other) in combinations(boxes, 2):
            assert not one.padded(-1).overlaps(other.padded(-1)), (picture.name, first, second)


@pytest.mark.parametrize("form", NAMES)
def test_axes_are_labelled(drawn: dict[str, list[Picture]], form: str):
    for picture in drawn[form]:
        places = [axes for axes in picture.figure.axes if axes.get_visible()]
        assert any(axes.get_ylabel() for axes in places), picture.name
        assert picture.name == "6-groups" or any(axes.get_xlabel() for axes in places), picture.name


@pytest.mark.parametrize("form", NAMES)
def test_a_picture_says_what_it_shows(drawn: dict[str, list[Picture]], form: str):
    for picture in drawn[form]:
        assert len(picture.line) > 60
        assert picture.title


def test_vectors_take_the_ink_of_their_ground(drawn: dict[str, list[Picture]]):
    picture = drawn["qwen2_moe residual"][0]
    assert INK.encode() in picture.svg()
    assert INK.encode() not in picture.svg(PALE)
    assert PALE.encode() in picture.svg(PALE)
    assert picture.svg() == picture.svg() == replace(picture).svg()
    assert picture.png().startswith(b"\x89PNG")


def test_a_layer_can_be_asked_for(patched: dict[str, Path]):
    folder = open_patched(patched["deepseek residual"])
    for layer in folder.shape.layers:
        (line,) = [one.line for one in draw(Material(folder, layer=layer)) if one.name == "4-utilities"]
        assert line.startswith(f"Layer {layer} (this layer was asked for)")


def test_cosines_are_those_of_the_experts_around_the_base(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe residual"])
    tensors = {}
    for file in patched["qwen2_moe residual"].glob("model*.safetensors"):
        tensors |= load_file(file)
    parts = ("gate_proj", "up_proj", "down_proj")
    for layer in folder.shape.layers:
        block = f"model.layers.{layer}.mlp"
        base = torch.cat([tensors[f"{block}.base_expert.{part}.weight"].flatten() for part in parts]).double()
        tau = torch.stack(
            [
                torch.cat([tensors[f"{block}.experts.{e}.{part}.weight"].flatten() for part in parts]).double() - base
                for e in range(folder.shape.experts)
            ]
        )
        tau = torch.nn.functional.normalize(tau, dim=1)
        np.testing.assert_allclose(whole(Material(folder), layer), (tau @ tau.T).numpy(), atol=5e-3)  # bfloat16 bases


def test_distances_of_the_recipe_are_the_steps_that_its_run_made(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe residual"])
    wanted = [math.hypot(*(game["step_norm"] for game in record["games"])) for record in folder.report.layers[:-1]]
    found = distances(folder)
    assert found["NAMEx-Full"] == pytest.approx(wanted, rel=1e-4)
    assert len(found) == 5
    assert found["NAMEx-Full, quaternion"][0] == pytest.approx(wanted[0], rel=1e-4)  # no momentum before the first
    assert found["NAMEx-Full, quaternion"][1] != pytest.approx(wanted[1], rel=1e-3)


def test_the_methods_walk_side_by_side(patched: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """However many they are, a tensor is read once, and the last layer's, from which no base comes, not at all."""
    folder, read = open_patched(patched["qwen2_moe residual"]), []
    of_span = {(span.file, span.begin): name for name, span in folder.spans.items()}
    read_into = Reader.read_into

    def counted(self: Reader, span: TensorSpan, target: torch.Tensor) -> None:
        read.append(of_span[span.file, span.begin])
        read_into(self, span, target)

    monkeypatch.setattr(Reader, "read_into", counted)
    assert len(distances(folder)) == 5
    shared = [folder.outline.shared(folder.shape.layers[0])[part] for part in PROJECTIONS]
    experts = [
        folder.outline.expert(layer, expert, part)
        for layer in folder.shape.layers[:-1]
        for part in PROJECTIONS
        for expert in range(folder.shape.experts)
    ]
    assert sorted(read) == sorted([*experts, *shared])


def test_a_momentum_of_its_own_walks_too(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe residual"])
    other = replace(folder, recipe=replace(folder.recipe, momentum="complex", beta="0.5,0.3"))
    assert "NAMEx-Full, momentum 0.5,0.3" in distances(other)
    same = replace(folder, recipe=replace(folder.recipe, momentum="complex", beta="0.9"))
    assert len(distances(same)) == 5


def test_the_experts_hear_what_the_model_hears(patched: dict[str, Path]):
    path = patched["qwen2_moe sparse"]
    folder = open_patched(path)
    found = answers(folder, TOKENS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(path)
    from namex_hf.calibration.text import calibration_text

    text = calibration_text("packaged", tokenizer, TOKENS, 512, folder.recipe.seed)
    assert (found.sha256, found.tokens, found.asked) == (text.sha256, TOKENS, 1024)
    heard = {}
    for layer in folder.shape.layers:
        block = model.model.layers[layer].mlp
        block.register_forward_pre_hook(lambda _, given, layer=layer: heard.__setitem__(layer, given[0].flatten(0, 1)))
    with torch.no_grad():
        model(text.ids)
        for layer, inputs in heard.items():
            block = model.model.layers[layer].mlp
            chosen = (inputs @ block.gate.weight.T).topk(folder.shape.top_k).indices
            usage = chosen.flatten().bincount(minlength=folder.shape.experts)
            assert (usage - found.layers[layer].usage).abs().max() <= 2  # of 384 on average: ties round either way
            gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
            said = []
            for expert in (0, 1):
                gate, up = (inputs @ gate_up[expert].T).chunk(2, dim=-1)
                said.append(torch.nn.functional.silu(gate) * up @ down[expert].T)
            cosine = torch.nn.functional.cosine_similarity(*said, dim=-1).mean()
            assert float(found.layers[layer].cosines[0, 1]) == pytest.approx(float(cosine), abs=1e-3)


def test_weights_are_relative_to_the_plain_mean(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe residual"])
    found = relative_weights(folder)
    assert list(found) == ["gate", "up", "down"]
    wanted = [[8 * weight for weight in record["games"][1]["weights"]] for record in folder.report.layers]
    np.testing.assert_allclose(found["up"], wanted)


def test_weights_of_groups_are_relative_to_their_group(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe grouped"])
    record = folder.report.layers[0]
    found = relative_weights(folder)["gate"][0]
    for group in record["groups"]:
        if len(group) == 1:
            assert np.isnan(found[group[0]])
        else:
            assert found[group].sum() == pytest.approx(len(group))
    assert interactions(folder) == {}


def test_no_agreement_and_no_stake_are_left_blank(patched: dict[str, Path]):
    folder = open_patched(patched["deepseek residual"])  # base: first, who has no stake in the first layer
    found = relative_weights(folder)
    assert np.isnan(found["gate"][0, 0])
    assert np.isfinite(found["gate"][0, 1:]).all()
    assert np.isnan(interactions(folder)["gate"][0, 0])
    games = [{**game, "status": "no_agreement"} for game in folder.report.layers[0]["games"]]
    layers = [{**folder.report.layers[0], "games": games}, *folder.report.layers[1:]]
    none = replace(folder, report=replace(folder.report, layers=layers))
    assert np.isnan(relative_weights(none)["gate"][0]).all() if layers[1:] else not relative_weights(none)


def test_usage_after_is_shown_beside_before_on_the_same_text_alone(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe calibrated"])

    def labels(tokens: int) -> list[str]:
        (usage,) = [one for one in draw(material_of(folder, tokens)) if one.name == "6-usage"]
        return [text.get_text() for text in usage.figure.axes[0].get_legend().get_texts()]

    assert labels(CALIBRATED.calibration.tokens) == ["original's router", "this model's router"]
    assert labels(TOKENS) == ["original's router"]


def test_a_router_is_the_original_s_until_it_is_trained(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe residual"])
    trained = replace(folder, report=replace(folder.report, training={"steps": 0, "loss": []}))
    heard = answers(folder, TOKENS)
    for one, wanted in ((folder, "the router, which is the original's"), (trained, "this model's router")):
        (usage,) = [picture for picture in draw(Material(one, heard)) if picture.name == "6-usage"]
        assert [text.get_text() for text in usage.figure.axes[1].get_legend().get_texts()] == [wanted]


def test_entropy_by_hand():
    assert entropy(torch.tensor([5.0, 5.0, 5.0, 5.0])) == pytest.approx(1.0)
    assert entropy(torch.tensor([7.0, 0.0])) == pytest.approx(0.0)
    assert entropy(torch.tensor([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)
    assert entropy(torch.tensor([3.0])) == 1.0


def test_the_plane_of_momenta_is_what_eigenvalues_say():
    real, imaginary, radii = radii_over_beta(0.7, 1.3)
    for row, column in ((0, 5), (20, 100), (60, 60), (110, 30)):
        beta = complex(real[column], imaginary[row])
        assert radii[row, column] == pytest.approx(spectral_radius(beta, 0.7, 1.3), abs=1e-7)


def test_the_sum_of_weights_is_one_on_the_simplex(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe residual"])
    assert total_weight(folder) == pytest.approx(1.0)
    assert total_weight(replace(folder, report=replace(folder.report, layers=[]))) == 1.0


def test_half_sphere_and_octant():
    points = half_sphere()
    np.testing.assert_allclose(np.linalg.norm(points, axis=-1), 1.0)
    np.testing.assert_allclose(points[0], 1 / math.sqrt(3))
    assert (points.sum(-1) > -1e-9).all()
    directions, triangles = octant(5)
    assert len(directions) == 21
    assert len(triangles) == 25
    assert (directions.sum(1) == 5).all()
    assert (directions >= 0).all()


def test_letters_and_marks_of_groups():
    assert [letters(number) for number in (0, 25, 26, 27)] == ["A", "Z", "AA", "AB"]
    found = marks([[0, 2], [1], [3, 4]])
    assert [found[expert][0] for expert in range(5)] == ["A", "·", "A", "B", "B"]
    assert found[1][1] == INK
    assert [mark for mark, _ in pruned(4, [1, 3]).values()] == ["×", "·", "×", "·"]


def test_pruned_experts_are_crossed_out(drawn: dict[str, list[Picture]], patched: dict[str, Path]):
    (tree,) = [one for one in drawn["qwen2_moe pruned"] if one.name == "6-groups"]
    records = open_patched(patched["qwen2_moe pruned"]).report.layers
    for axes, record in zip(tree.figure.axes, records, strict=False):
        said = dict(label.get_text().split("\n") for label in axes.get_xticklabels())
        assert {int(expert) for expert, mark in said.items() if mark == "·"} == set(record["kept"])
        assert set(said.values()) == {"·", "×"}
    assert "A cross is an expert that is gone." in tree.line


def test_controls_have_no_tree(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe grouped"])
    for operator in ("random", "shared"):
        control = replace(folder, recipe=Recipe(merge="grouped", experts=5, operator=operator, fit="router"))
        assert "6-groups" not in {one.name for one in draw(Material(control))}


@pytest.mark.parametrize(("count", "wanted"), [(1, (1, 1)), (6, (1, 6)), (24, (4, 6)), (28, (5, 6))])
def test_tiles(count: int, wanted: tuple[int, int]):
    assert tiles(count) == wanted


@pytest.mark.parametrize("bargains", [True, False])
def test_a_training_run(patched: dict[str, Path], bargains: bool):
    folder = open_patched(patched["qwen2_moe residual"])
    history = [{"step": step, "loss": 3.0 / step, "aux_loss": 4.0} for step in (1, 2, 3)]
    if bargains:
        history[1] |= {"bargain/spread": 0.05, "bargain/drift": 0.01}
    trained = replace(folder, report=replace(folder.report, training={"steps": 3, "loss": history}))
    (run,) = [one for one in draw(Material(trained)) if one.name == "7-training"]
    panels = [axes for axes in run.figure.axes if axes.get_visible()]
    assert len(panels) == (4 if bargains else 2)
    assert panels[0].lines[0].get_xydata().tolist() == [[1, 3.0], [2, 1.5], [3, 1.0]]
    assert ("No bargain" in run.line) != bargains
