"""NAMEx in numpy and scipy, in float64, whole matrices at once: slow, plain, and sharing no code with the package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares, nnls

from tests.helpers.checkpoints import PROJECTIONS, experts_of, moe_layers, read_config, read_tensors, shared_name

Matrices = dict[str, np.ndarray]


Numbers = torch.Tensor | np.ndarray


def double(numbers: Numbers) -> np.ndarray:
    return numbers.to(torch.float64).numpy() if isinstance(numbers, torch.Tensor) else np.asarray(numbers, np.float64)


def experts_at(folder: Path, layer: int) -> Matrices:
    """Routed experts of a layer, ``[N, rows, columns]`` by projection, from either layout."""
    config, tensors = read_config(folder), read_tensors(folder)
    block, width = f"model.layers.{layer}.mlp.experts", config["moe_intermediate_size"]
    if f"{block}.gate_up_proj" in tensors:
        both = double(tensors[f"{block}.gate_up_proj"])
        return {
            "gate_proj": both[:, :width],
            "up_proj": both[:, width:],
            "down_proj": double(tensors[f"{block}.down_proj"]),
        }
    return {
        name: np.stack([double(tensors[f"{block}.{i}.{name}.weight"]) for i in range(experts_of(config))])
        for name in PROJECTIONS
    }


def nash(gram: np.ndarray, mean_point: bool = False) -> np.ndarray:
    """``a`` of K a = 1/a (or 1/a + K 1/N, where the mean of the diagonal is made 1); zeros where there is no agreement.

    Players without stake get 0. There is no agreement where some convex combination of the players vanishes.
    """
    count = len(gram)
    weights = np.zeros(count)
    stake = np.diag(gram) > 0
    if not stake.any():
        return weights
    unit = np.sqrt(np.diag(gram).mean())
    matrix = gram / unit**2
    point = matrix.mean(1) if mean_point else np.zeros(count)
    matrix, point = matrix[np.ix_(stake, stake)], point[stake]
    if vanishes(matrix):
        return weights

    def equation(x: np.ndarray) -> np.ndarray:
        return np.exp(x) * (matrix @ np.exp(x) - point) - 1

    def slope(x: np.ndarray) -> np.ndarray:
        a = np.exp(x)
        return a[:, None] * matrix * a[None, :] + np.diag(a * (matrix @ a - point))

    start = -np.log(np.diag(matrix)) / 2
    found = least_squares(equation, start, slope, method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=10_000)
    assert np.abs(found.fun).max() < 1e-10, "the reference has not solved its own equation"
    weights[stake] = np.exp(found.x) / unit
    return weights


def vanishes(matrix: np.ndarray) -> bool:
    """Whether 0 lies in the convex hull of the players, made unit vectors: non-negative least squares says how far."""
    length = np.sqrt(np.diag(matrix))
    values, vectors = np.linalg.eigh(matrix / length[:, None] / length[None, :])
    players = (vectors * np.sqrt(values.clip(min=0))).T
    left = np.vstack([players, np.ones(len(length))])
    shares, _ = nnls(left, np.append(np.zeros(len(length)), 1.0))
    return float(np.linalg.norm(players @ shares)) < 1e-3 * shares.sum()


def game_weights(experts: Matrices, base: Matrices, names: tuple[str, ...], recipe: dict[str, Any]) -> np.ndarray:
    """Weights of one game: EP-CAMEx's 1/N, or the bargain on the simplex or as the lemma has it."""
    count = len(experts["gate_proj"])
    if recipe.get("method") == "ep-camex" or recipe.get("weighting") == "uniform":
        return np.full(count, 1 / count)
    tau = np.concatenate([(experts[name] - base[name]).reshape(count, -1) for name in names], axis=1)
    weights = nash(tau @ tau.T, recipe.get("disagreement") == "mean")
    if recipe.get("scale", "simplex") == "simplex" and weights.sum() > 0:
        weights = weights / weights.sum()
    return weights


def games(recipe: dict[str, Any]) -> list[tuple[str, ...]]:
    return [PROJECTIONS] if recipe.get("granularity") == "expert" else [(name,) for name in PROJECTIONS]


def own_base(folder: Path, layer: int, base: str) -> Matrices:
    experts = experts_at(folder, layer)
    if base == "mean":
        return {name: experts[name].mean(0) for name in PROJECTIONS}
    if base == "shared":
        config, tensors = read_config(folder), read_tensors(folder)
        width, result = config["moe_intermediate_size"], {}
        for name in PROJECTIONS:
            whole = double(tensors[f"model.layers.{layer}.mlp.{shared_name(config)}.{name}.weight"])
            if name == "down_proj":
                result[name] = np.mean([whole[:, k : k + width] for k in range(0, whole.shape[1], width)], axis=0)
            else:
                result[name] = np.mean([whole[k : k + width] for k in range(0, whole.shape[0], width)], axis=0)
        return result
    index = 0 if base == "first" else int(base.split(":")[1])
    return {name: experts[name][index] for name in PROJECTIONS}


def quaternion_of(recipe: dict[str, Any]) -> tuple[float, ...]:
    """Any momentum as a quaternion, taken literally: modulus and phase give its first two components."""
    kind, beta = recipe.get("momentum", "none"), recipe.get("beta")
    if kind == "none":
        return (0.0, 0.0, 0.0, 0.0)
    numbers = [float(part) for part in (beta or {"complex": "0.9", "quaternion": "0.8,0.3,0.3,0.3"}[kind]).split(",")]
    if kind == "quaternion":
        return tuple(numbers)
    modulus, phase = [*numbers, 0.0][:2]
    return (modulus * np.cos(phase), modulus * np.sin(phase), 0.0, 0.0)


def quaternion_product(a: tuple[float, ...], b: np.ndarray) -> np.ndarray:
    """Hamilton's product, components on the first axis of ``b``."""
    return np.stack(
        [
            a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
            a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
            a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
            a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
        ]
    )


def base_experts(folder: Path, recipe: dict[str, Any]) -> dict[int, Matrices]:
    """E_m of every MoE layer, unrounded."""
    layers, choice = moe_layers(read_config(folder)), recipe.get("base", "shared")
    if recipe.get("method") == "camex":
        return {layer: own_base(folder, layer, choice) for layer in layers}
    base = own_base(folder, layers[0], choice)
    result, weights, buffers, beta = {}, {}, {}, quaternion_of(recipe)
    for position, layer in enumerate(layers):
        result[layer] = base
        experts = experts_at(folder, layer)
        solves = position == 0 if recipe.get("method") == "namex" else position % recipe.get("every", 1) == 0
        following = {}
        for names in games(recipe):
            if solves or not weights[names].any():
                weights[names] = game_weights(experts, base, names, recipe)
            used = weights[names]
            if not used.any() and recipe.get("disagreement") == "mean":
                used = np.full(len(used), 1 / len(used))
            for name in names:
                step = sum(w * (expert - base[name]) for w, expert in zip(used, experts[name], strict=True))
                buffers[name] = quaternion_product(beta, buffers.get(name, np.zeros((4, *step.shape))))
                buffers[name][0] += step
                following[name] = base[name] + recipe.get("gamma", 1.0) * buffers[name][0]
        base = following
    return result


def merged_group(experts: Matrices, members: list[int], recipe: dict[str, Any]) -> Matrices:
    """A group's merged expert: its first member keeps 1/n, the others share the rest by the bargain around it."""
    count = len(members)
    inside = {name: experts[name][members] for name in PROJECTIONS}
    base = {name: inside[name][0] for name in PROJECTIONS}
    result = {}
    for names in games(recipe):
        shares = game_weights(inside, base, names, recipe)
        if recipe.get("weighting") != "uniform" and recipe.get("method") != "ep-camex":
            shares = shares * (count - 1) / count
            shares[0] = 1 / count
            if np.isclose(shares.sum(), 1 / count):
                shares = np.full(count, 1 / count)
        for name in names:
            result[name] = np.tensordot(shares, inside[name], 1)
    return result


def average_linkage(experts: Matrices, count: int) -> list[list[int]]:
    """Agglomerative clustering of whole experts by 1 - cosine, the mean distance between members deciding."""
    flat = np.concatenate([experts[name].reshape(len(experts[name]), -1) for name in PROJECTIONS], axis=1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    distance = 1 - flat @ flat.T
    groups = [[index] for index in range(len(flat))]
    while len(groups) > count:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = min(pairs, key=lambda pair: distance[np.ix_(groups[pair[0]], groups[pair[1]])].mean())
        groups[j] += groups.pop(i)
    return sorted(sorted(group) for group in groups)


def curvatures(floor: np.ndarray, leading: np.ndarray) -> np.ndarray:
    """``c_i = t_i (I + V_i V_i^T)`` in full, ``[N, columns, columns]``, from t ``[N]`` and V ``[N, columns, rank]``."""
    return np.stack([t * (np.eye(len(v)) + v @ v.T) for t, v in zip(floor, leading, strict=True)])


def curved_mean(
    shares: np.ndarray, experts: np.ndarray, base: np.ndarray | None, curvature: np.ndarray, usage: np.ndarray
) -> np.ndarray:
    """``(sum_i s_i E_i c_i + l E_m C) (sum_i s_i c_i + l C)^-1``, C = sum_i p_i c_i, l = 1 - sum_i s_i.

    Args:
        base: None: there is no such expert, and l is 0.
        curvature: c_i in full.
        usage: p.
    """
    left = sum(s * expert @ c for s, expert, c in zip(shares, experts, curvature, strict=True))
    right = sum(s * c for s, c in zip(shares, curvature, strict=True))
    if base is not None:
        common = sum(p * c for p, c in zip(usage, curvature, strict=True))
        left, right = left + (1 - shares.sum()) * base @ common, right + (1 - shares.sum()) * common
    return np.linalg.solve(right, left.T).T


def softmax64(logits: Numbers) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(double(logits) - double(logits).max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def neurons64(inputs: Numbers, expert: Mapping[str, Numbers]) -> np.ndarray:
    """SwiGLU ahead of the last matrix: of inputs ``[..., hidden]`` the neurons ``[..., width]``."""
    gate, up = (double(inputs) @ double(expert[name]).T for name in ("gate_proj", "up_proj"))
    return gate / (1 + np.exp(-gate)) * up


def expert64(inputs: Numbers, expert: Mapping[str, Numbers]) -> np.ndarray:
    """An expert's answer to inputs ``[..., hidden]``."""
    return neurons64(inputs, expert) @ double(expert["down_proj"]).T


def answers64(inputs: Numbers, experts: Mapping[str, Numbers]) -> np.ndarray:
    """Every expert's answer to every token, ``[tokens, N, hidden]``."""
    count = len(experts["gate_proj"])
    all_of = [{name: double(experts[name])[number] for name in PROJECTIONS} for number in range(count)]
    return np.stack([expert64(inputs, one) for one in all_of], axis=1)


def shared64(inputs: Numbers, shared: Mapping[str, Numbers]) -> np.ndarray:
    """A shared expert's answer to every token, ``[tokens, hidden]``, behind its gate where it has one."""
    given = expert64(inputs, shared)
    return given / (1 + np.exp(-double(inputs) @ double(shared["gate"]).T)) if "gate" in shared else given


def gates64(routing: Any, experts: int) -> np.ndarray:
    """Gate values ``[tokens, N]``, 0 beyond the top-k."""
    gates = np.zeros((len(routing.index), experts))
    for token, (numbers, values) in enumerate(zip(routing.index.tolist(), routing.value.tolist(), strict=True)):
        gates[token, numbers] = values
    return gates


def output64(inputs: Numbers, routing: Any, experts: Mapping[str, Numbers]) -> np.ndarray:
    """The routed output, ``[tokens, hidden]``."""
    return np.einsum("tn,tnh->th", gates64(routing, len(experts["gate_proj"])), answers64(inputs, experts))


def usage64(routing: Any, experts: int) -> np.ndarray:
    """Tokens that every expert received, ``[N]``."""
    return (gates64(routing, experts) > 0).sum(0).astype(float)


def saliency64(inputs: Numbers, routing: Any, experts: Mapping[str, Numbers]) -> np.ndarray:
    """Mean over an expert's tokens of gate value times norm of its answer, ``[N]``; 0 of one without tokens."""
    gates = gates64(routing, len(experts["gate_proj"]))
    added = (gates * np.linalg.norm(answers64(inputs, experts), axis=2)).sum(0)
    return added / np.maximum((gates > 0).sum(0), 1)


def routed_mass(router: np.ndarray, norm: np.ndarray, top_k: int, directions: int = 20_000) -> float:
    """Mean over random directions of the sum of the top-k softmax values."""
    inputs = np.random.default_rng(5).standard_normal((directions, router.shape[1])) * norm
    shares = softmax64(inputs @ router.T)
    return float(np.sort(shares, axis=1)[:, -top_k:].sum(1).mean())


def spacing(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The unit in the last place of each value."""
    info = torch.finfo(dtype)
    size = np.maximum(np.abs(values), info.tiny)
    return info.eps * 2.0 ** np.floor(np.log2(size))


def assert_rounded(found: torch.Tensor, wanted: np.ndarray, roundings: float = 1) -> None:
    """``found`` is ``wanted`` rounded to its dtype, up to what float32 arithmetic may lose.

    float32: to 1e-5 of the matrix. Else: to half a unit in the last place (for one rounding) and 2e-6 of the matrix.
    """
    values, size = double(found), float(np.sqrt((wanted**2).mean()))
    assert values.shape == wanted.shape
    error = np.abs(values - wanted)
    if found.dtype == torch.float32:
        assert error.max() <= 1e-5 * size
    else:
        assert (error <= roundings / 2 * spacing(wanted, found.dtype) + 2e-6 * size).all()
