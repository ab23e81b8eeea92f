"""Other ways to cut half of the routed parameters, without a fit: ``python benchmarks/other_cuts.py --out DIR``.

``merge: narrow`` leaves every expert with the same number of neurons and looks at one expert at a time. Each row is
another way, by the original's activations on the same calibration text, beside that one (`equal`, `--sweeps 0`):

* `experts`: a common threshold on the loss says how many neurons each expert of a layer keeps.
* `layers`: one threshold for all layers; losses are relative to the energy of the layer's routed output.
* `joint`: one H for the neurons of all experts of a layer, so that downs make up for other experts, too.
* `joint-refit`: neurons are chosen as in `equal`, and only the downs are refitted so.
* `joint-experts`, `joint-layers`: both.
* `sweep`: from `equal`, every expert in turn is cut anew for what the others leave over, the package's default.
* `merged`: a neuron that goes is merged into the one that stays whose activations are most like its own. `merged-alike`
  does so where the cosine is `ALIKE` or more; other neurons are dropped.
* `fewer-12`, `fewer-14`: fewer experts (of 16 that many, pruned by REAP), which are then cut less.
* `halves-8`, `halves-6`, `halves-4`: every expert is split in two, of which half stay, and a token goes to so many.

Rows of unequal experts and of halves have the full width, with columns of zeros for what is gone: scores are those of a
true cut. Problems are those of the seed `choices`, which no published figure has. A run that was killed is continued by
the same command.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from namex_hf import Recipe, patch_model
from namex_hf.checkpoint.resolve import resolve
from namex_hf.evaluation.loading import load, tokenizer_of
from namex_hf.evaluation.measure import scores
from namex_hf.evaluation.perplexity import held_out_texts
from namex_hf.evaluation.settings import Settings
from namex_hf.evaluation.statistics import changes, paired, standard_error, value
from namex_hf.evaluation.table import Table
from namex_hf.families.outline import outline_of
from namex_hf.merging.cut import with_neurons
from namex_hf.merging.error_weights import TINY
from namex_hf.merging.experts import Expert
from namex_hf.merging.moe_layer import MoELayer, Text
from namex_hf.merging.moments import TextMoments
from namex_hf.merging.narrow import Narrowing
from namex_hf.merging.neurons import RIDGE, refitted, ridged
from namex_hf.merging.refit import refit_downs
from namex_hf.merging.routing import TokenRouting, neurons, on_tokens
from namex_hf.patching.check import check_fit
from namex_hf.patching.result import PipelineState
from namex_hf.patching.sources import model_source
from namex_hf.patching.text import text_for
from namex_hf.patching.text_pass import TextPass
from namex_hf.progress import no_progress
from namex_hf.recipe import Narrow

REAP = Path(__file__).parent / "recipes" / "peers" / "reap.yaml"
KIND, SEED = "arithmetic", "choices"
CHUNK = 8192  # tokens whose neurons are in memory together
ALIKE = 0.8


@dataclass(frozen=True)
class Layer:
    """A MoE layer of the original, and what it does with the text. "all" are the neurons of all its N experts."""

    mixture: MoELayer
    text: Text
    width: int  # neurons of an expert that stay on average
    together: Tensor  # H, float64 [all, all]; each expert's block with its own ridge
    always: Tensor  # bool [all]: neurons that carry a super expert's largest output
    energy: float  # of the routed output

    @cached_property
    def expert(self) -> Tensor:
        """Of each neuron, int64 ``[all]``."""
        count = self.mixture.experts.count
        return torch.arange(count).repeat_interleave(len(self.together) // count)

    @property
    def usage(self) -> Tensor:
        """Tokens of each expert, int64 ``[N]``."""
        return self.text.routing.count(self.mixture.experts.count)

    @cached_property
    def down(self) -> Tensor:
        """``[hidden, all]``."""
        down = self.mixture.experts.down
        assert isinstance(down, Tensor)
        return down.permute(1, 0, 2).flatten(1).float()

    def moment(self, joint: bool) -> Tensor:
        """H of all neurons, or with zeros between those of two experts, ``[all, all]``."""
        return self.together if joint else self.together * (self.expert[:, None] == self.expert)


def layers_on_text(model: Any, recipe: Recipe, tokenizer: Any) -> dict[int, Layer]:
    """The MoE layers of a model that is not changed; all receive what the original's give."""
    outline = outline_of(model.config.to_dict())
    recipe, source = check_fit(recipe, outline), model_source(model, outline, copies=False)
    assert isinstance(recipe.merge, Narrow)
    assert recipe.merge.width is not None
    way = TextPass(source, recipe, text_for(recipe, source.config, tokenizer), PipelineState())
    layers = {}
    for number in outline.shape.layers:
        way.tap(number)
        mixture = source.moe_layer(number)
        text = way.activations(mixture)
        whole = Narrowing(mixture, text, recipe.merge)
        energy = float(whole.target.square().sum())  # which finds super experts on the way
        together, always = moments(mixture, text, whole.record["super_experts"])
        layers[number] = Layer(mixture, text, recipe.merge.width, together, always, energy)
        way.pass_on(whole.target)
    return layers


def moments(mixture: MoELayer, text: Text, protected: list[int]) -> tuple[Tensor, Tensor]:
    """``together`` and ``always`` of `Layer`. Args: protected, super experts."""
    count, width = mixture.experts.count, mixture.expert(0, text.inputs).up.shape[0]
    together = torch.zeros(count * width, count * width, dtype=torch.float64)
    always = torch.zeros(count * width, dtype=torch.bool)
    for start in range(0, len(text.inputs), CHUNK):
        rows = slice(start, start + CHUNK)
        routing = TokenRouting(text.routing.index[rows], text.routing.value[rows])
        active = torch.zeros(len(routing.index), count, width)
        for number in range(count):
            token, gate = routing.of(number)
            each = on_tokens(neurons, text.inputs[rows][token], mixture.experts.expert(number), mixture.activation)
            active[token, number] = gate[:, None] * each
        together += active.flatten(1).T @ active.flatten(1)
    alone = TextMoments(mixture.activation, text, torch.ones(len(text.inputs)), protected)
    for number in range(count):  # the package's own blocks, so that rows differ from `equal` by nothing else
        block = slice(number * width, (number + 1) * width)
        moment, peak = alone.of(number, mixture.experts.expert(number))
        together[block, block], always[block.start + peak] = ridged(moment), True
    return together, always


def elimination_order(layer: Layer, joint: bool, least: int) -> tuple[Tensor, Tensor]:
    """The order in which neurons go, one at a time as in `neurons_that_stay`, and what each costs.

    Args:
        joint: by one H for the layer.
        least: neurons that stay in every expert.
    """
    products, moment = layer.down.T @ layer.down, layer.moment(joint)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment)).float()
    left, closed = layer.expert.bincount(), layer.always.clone()
    order, losses = [], []
    while len(goes := (~closed & (left > least)[layer.expert]).nonzero().flatten()):
        each = (products.diagonal() / inverse.diagonal())[goes]
        one = goes[each.argmin()]
        order.append(int(one))
        losses.append(float(each.min()))
        row = inverse[one].clone()
        moved = row / row[one]  # of the downs of all others
        cross = products[one] - products[one, one] * moved / 2
        inverse.addr_(row, moved, alpha=-1)
        products.addr_(cross, moved, alpha=-1).addr_(moved, cross, alpha=-1)
        closed[one], left[layer.expert[one]] = True, left[layer.expert[one]] - 1
    return torch.tensor(order), torch.tensor(losses)


def remaining_neurons(layers: dict[int, Layer], joint: bool, span: str) -> dict[int, Tensor]:
    """Neurons that stay, of all of a layer, ascending. Args: span, what has its fair share: expert, layer or model."""
    gone = {number: len(one.together) - one.width * one.mixture.experts.count for number, one in layers.items()}
    ways = {
        number: elimination_order(one, joint, one.width if span == "expert" else 0) for number, one in layers.items()
    }
    if span == "model":  # a neuron goes no earlier than those before it, though it may cost less
        costs = {number: losses.cummax(0).values / layers[number].energy for number, (_, losses) in ways.items()}
        threshold = torch.cat([*costs.values()]).sort().values[sum(gone.values()) - 1]
        gone = {number: int((cost <= threshold).sum()) for number, cost in costs.items()}
    stay = {}
    for number, (order, _) in ways.items():
        mask = torch.ones(len(layers[number].together), dtype=torch.bool)
        mask[order[: gone[number]]] = False
        stay[number] = mask.nonzero().flatten()
    return stay


def set_expert_weights(model: Any, number: int, name: str, value: Tensor) -> None:
    """Of all experts of a MoE layer, in place. Args: value, ``[N, rows, columns]``."""
    model.get_parameter(outline_of(model.config.to_dict()).fused(number, name)).copy_(value)


def emulated(model: Any, layers: dict[int, Layer], joint: bool, span: str, chosen_alone: bool = False) -> Any:
    """A copy of the model with zeros for neurons that go.

    Args:
        joint, span: as `remaining_neurons`.
        chosen_alone: only the refit is joint.
    """
    model, remaining = copy.deepcopy(model), remaining_neurons(layers, joint and not chosen_alone, span)
    for number, layer in layers.items():
        down, stay = torch.zeros_like(layer.down), remaining[number]
        down[:, stay] = refitted(layer.moment(joint), layer.down, stay).float()
        of_each = down.unflatten(1, (layer.mixture.experts.count, -1)).permute(1, 0, 2)
        set_expert_weights(model, number, "down_proj", of_each)
        left = layer.expert[stay].bincount(minlength=layer.mixture.experts.count)
        active = float((left * layer.usage).sum() / layer.usage.sum() / layer.width)
        print(f"  layer {number}: {active:.2f} times the active neurons of `equal`, by expert", left.tolist())
    return model


def merged(model: Any, layers: dict[int, Layer], alike: float) -> Any:
    """A copy of the model whose neurons that go are merged. Args: alike, the least cosine."""
    model, remaining = copy.deepcopy(model), remaining_neurons(layers, joint=False, span="expert")
    for number, layer in layers.items():
        new = []
        for one in range(layer.mixture.experts.count):
            mine = (layer.expert == one).nonzero().flatten()
            stays = torch.isin(mine, remaining[number])
            new.append(merged_expert(layer, one, layer.together[mine][:, mine], stays, alike))
        gate_up = torch.stack([torch.cat([expert["gate_proj"], expert.up]) for expert in new])
        set_expert_weights(model, number, "gate_up_proj", gate_up)
        set_expert_weights(model, number, "down_proj", torch.stack([expert.down for expert in new]))
    return model


def merged_expert(layer: Layer, number: int, moment: Tensor, stays: Tensor, alike: float) -> Expert:
    """An expert at full width, with zeros in the downs of neurons that are gone.

    Rows are means by energy. Where a neuron is the opposite of the one it goes to, its up row turns its sign. Downs are
    refitted to the merged neurons' activations, and drawn by the ridge to what they were, as `refitted` does.

    Args:
        moment: H of the expert, with its ridge, ``[neurons, neurons]``.
        stays: bool ``[neurons]``.
    """
    own, stay = layer.mixture.expert(number, layer.text.inputs), stays.nonzero().flatten()
    scale = moment.diagonal().sqrt()
    cosine = (moment / scale / scale[:, None])[:, stay].float()
    cosine[stay] = torch.eye(len(stay))
    near, to = cosine.abs().max(1)
    share = torch.zeros(len(stay), len(moment))  # of each neuron in the one that it goes to
    energy = (moment.diagonal() * own.down.square().sum(0)).float().clamp(min=TINY)
    share[to, torch.arange(len(moment))] = energy * (near >= alike)
    share /= share.sum(1, keepdim=True)
    gate, up = own["gate_proj"].clone(), own.up.clone()
    gate[stay], up[stay] = share @ gate, (share * cosine.sign().T) @ up
    new = own.of(lambda name: {"gate_proj": gate, "up_proj": up}.get(name, torch.zeros_like(own.down)), own)
    token, gates = layer.text.routing.of(number)
    inputs, activation = layer.text.inputs[token], layer.mixture.activation
    before = gates[:, None] * on_tokens(neurons, inputs, own, activation)
    after = (gates[:, None] * on_tokens(neurons, inputs, new, activation))[:, stay]
    ridge = RIDGE * before.square().sum(0).mean().double()
    product = own.down.double() @ (before.T @ after).double() + ridge * own.down[:, stay]
    second = (after.T @ after).double() + ridge * torch.eye(len(stay))
    new.down[:, stay] = torch.linalg.solve(second, product.T).T.float()
    return new


def fewer(model: Any, layers: dict[int, Layer], recipe: Recipe, tokenizer: Any, share: float) -> Any:
    """By the package: a share of the experts, cut to the width that leaves as many parameters as the others have."""
    first = next(iter(layers.values()))
    experts = round(share * first.mixture.experts.count)
    width = round(first.width * first.mixture.experts.count / experts)
    fields = {"calibration_tokens": recipe.calibration.tokens, "calibrate": "before", "device": recipe.device}
    smaller = Recipe.from_yaml(REAP, experts=experts, width=width, **fields)
    return patch_model(copy.deepcopy(model), smaller, tokenizer)


def halved(layer: Layer, top_k: int, count: int) -> tuple[MoELayer, Tensor, Tensor]:
    """A layer of halves of experts: an expert's neurons of most energy, and those of least.

    Each has the expert's router row and its downs doubled, so that all of them, with the doubled top-k, are the layer.
    Returned with it are the expert of each half, ``[count]``, and the neurons that it has of that, ``[count, half]``.

    Args:
        top_k: halves of a token.
        count: halves that stay, those of most energy.
    """
    source = layer.mixture
    energy = (layer.together.diagonal() * layer.down.double().square().sum(0)).view(source.experts.count, 2, -1)
    of_expert = energy.flatten(1).sort(descending=True)
    best = of_expert.values.view_as(energy).sum(2).flatten().topk(count).indices.sort().values
    expert, remaining = best // 2, of_expert.indices.view_as(energy).flatten(0, 1)[best].sort(1).values
    halves = []
    for number, stay in zip(expert.tolist(), remaining, strict=True):
        whole = source.expert(number, layer.text.inputs)
        halves.append(with_neurons(whole, stay, 2 * whole.down[:, stay]))
    experts = halves[0].of(lambda name: torch.stack([half[name] for half in halves]), halves[0])
    gate = replace(source.gate, top_k=top_k)
    return replace(source, experts=experts, router=source.router[expert], gate=gate), expert, remaining


def of_halves(model: Any, layers: dict[int, Layer], top_k: int) -> Any:
    """A copy of the model whose experts are half of the halves; their downs are refitted under the new gates."""
    model, outline = copy.deepcopy(model), outline_of(model.config.to_dict())
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = top_k
    for number, layer in layers.items():
        source, inputs = layer.mixture, layer.text.inputs
        new, expert, remaining = halved(layer, top_k, source.experts.count)
        routing, target = new.route(inputs), source.output(inputs, layer.text.routing)
        output, even = new.output(inputs, routing), torch.ones(len(inputs))
        refit_downs(new, inputs, routing, output, target, even, RIDGE, sweeps=2)
        whole = [source.expert(one, inputs) for one in expert.tolist()]
        down = torch.zeros_like(torch.stack([one.down for one in whole]))
        down.scatter_(2, remaining[:, None].expand(-1, down.shape[1], -1), torch.stack([*new.experts.down]))
        set_expert_weights(model, number, "down_proj", down)
        gate_up = torch.stack([torch.cat([one["gate_proj"], one.up]) for one in whole])
        set_expert_weights(model, number, "gate_up_proj", gate_up)
        model.get_parameter(outline.router(number)).copy_(new.router)
    return model


def rows_of(model: Any, recipe: Recipe, tokenizer: Any) -> dict[str, Callable[[], Any]]:
    """What makes the model of each row. Text is read for the first one that needs it."""
    read: dict[int, Layer] = {}
    swept = Recipe.from_dict({**recipe.to_dict(), "sweeps": 1, "device": recipe.device})

    def on_text(make: Callable[..., Any], *arguments: Any) -> Any:
        read.update({} if read else layers_on_text(model, recipe, tokenizer))
        return make(model, read, *arguments)

    return {
        "original": lambda: model,
        "equal": lambda: patch_model(copy.deepcopy(model), recipe, tokenizer),
        "experts": partial(on_text, emulated, False, "layer"),
        "layers": partial(on_text, emulated, False, "model"),
        "joint": partial(on_text, emulated, True, "expert"),
        "joint-refit": partial(on_text, emulated, True, "expert", True),
        "joint-experts": partial(on_text, emulated, True, "layer"),
        "joint-layers": partial(on_text, emulated, True, "model"),
        "sweep": lambda: patch_model(copy.deepcopy(model), swept, tokenizer),
        "merged": partial(on_text, merged, 0.0),
        "merged-alike": partial(on_text, merged, ALIKE),
        "fewer-12": partial(on_text, fewer, recipe, tokenizer, 12 / 16),
        "fewer-14": partial(on_text, fewer, recipe, tokenizer, 14 / 16),
        **{f"halves-{top_k}": partial(on_text, of_halves, top_k) for top_k in (8, 6, 4)},
    }


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    """Ratios to the original; differences to `equal` with their standard errors, item by item."""
    table = Table(["", "mean", "worst", "times `equal`", "exact, %", "points to `equal`", "p"], [])
    before, equal = ([*rows[name]["losses"].values()] for name in ("original", "equal"))
    for name, row in rows.items():
        losses, right = [*row["losses"].values()], row["right"]
        more, apart = changes(losses, before), changes(losses, equal)
        ratio, worst = max((value("text", [each]), domain) for each, domain in zip(more, row["losses"], strict=True))
        answers = paired(right, rows["equal"]["right"])
        cells = [f"{value('text', more):.4f}", f"{ratio:.3f} {worst}"]
        cells += [f"{value('text', apart):.4f} ± {standard_error('text', apart):.4f}", f"{100 * fmean(right):.1f}"]
        cells += [f"{100 * answers.mean:+.1f} ± {100 * answers.stderr:.1f}", f"{answers.p:.2f}"]
        table.rows.append([name, *cells])
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny", metavar="MODEL", help="a name or a folder")
    parser.add_argument("--out", type=Path, required=True, help="of the rows, a file each")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="some rows, beside the original and equal")
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration text (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=200, help="default: %(default)s")
    options = parser.parse_args()
    folder = resolve(options.model).folder
    model, tokenizer = load(folder), tokenizer_of(folder)
    settings = Settings(held_out_texts(), problems=options.problems, kinds=(KIND,), problem_seed=SEED)
    rows = rows_of(model, Recipe(keep=0.5, sweeps=0, calibration_tokens=options.tokens, device="cpu"), tokenizer)
    if unknown := {*(options.only or ())} - {*rows}:
        parser.error(f"no row {', '.join(unknown)}; accepted: {', '.join(rows)}")
    options.out.mkdir(parents=True, exist_ok=True)
    scored_rows = {}
    for name in ["original", "equal", *(one for one in options.only or rows if one not in ("original", "equal"))]:
        file = options.out / f"{folder.name}-{options.tokens}-{options.problems}-{name}.json"
        if not file.exists():
            start = time.perf_counter()
            scored = scores(rows[name](), tokenizer, settings, no_progress, clocked=False)
            seconds = round(time.perf_counter() - start)
            row = {"losses": scored["losses"], "right": scored["answers"][KIND]["right"], "seconds": seconds}
            file.write_text(json.dumps(row))
            print(f"{name}: {seconds} s", flush=True)
        scored_rows[name] = json.loads(file.read_text())
    title = f"{folder.name}, {options.tokens} tokens of text, {options.problems} problems of the seed '{SEED}'"
    print(title, "", *table_of(scored_rows).markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
