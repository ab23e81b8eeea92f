"""Whether two commits give the same results: patch with every recipe of the repository, then compare, byte for byte.

    python benchmarks/same_results.py patch BEFORE --root OLD_CHECKOUT
    python benchmarks/same_results.py patch AFTER
    python benchmarks/same_results.py compare BEFORE AFTER

``patch`` runs the command ``namex-patch`` of a checkout, each run in a process of its own; the same command continues.
Recipes that name no model run on both packaged models: ``grouped`` without a number of experts keeps 8, on ``tiny``
with a fit of whole layers. Recipes with more experts than these models have run on a random one with 64. ``MORE`` are
values that no recipe has. A run is named by model and values, so a recipe file that moved keeps its run.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parents[1]
FOLDERS = ("patches", "eval/recipes", "benchmarks/recipes", "experiments")
MODELS = ("tiny", "tiny-deepseek")
EXPERTS, TOY_EXPERTS = 16, 64
SHORT = ("--calibration-tokens", "4096")
STEPS = ("--fit-steps", "20")
MORE = """
--method namex --solver ccp
--method camex --base index:3
--momentum complex --gamma 0.5 --granularity expert
--momentum quaternion --base mean --every 2
--first-layer sparse --disagreement mean --base first
--merge soft
--merge soft --method camex --segment 16
--merge soft --method smear --routing-span previous
--merge soft --routing-span prompt --momentum complex --eta 0.9 --renormalise true --top-k 8
--merge soft --curvature calibrated --calibration-tokens 4096
--merge soft --curvature kronecker --align activations --calibration-tokens 4096
--routing cosine --temperature norms
--merge grouped --experts 8 --granularity expert --shard-size 2MB
--merge grouped --experts 8 --budget damage --fit router --fit-steps 20 --calibration-tokens 4096
--merge grouped --experts 8 --power usage --target model --fit layer --fit-steps 20 --calibration-tokens 4096
""".strip().splitlines()
FREE = {"seconds", "version", "versions", "recipe_version", "mtime_ns", "ctime_ns", "peak_resident_bytes"}
"""Keys that may differ in what is JSON or YAML."""
REWRITTEN = ("config.json", "namex/report.json", "namex/recipe.yaml")
ENTRY = "import sys; from {} import {} as main; sys.exit(main())"


@dataclass(frozen=True)
class Run:
    """One call of ``namex-patch``."""

    name: str
    model: str
    options: tuple[str, ...]
    losses: bool = False  # whether the recipe is of the game over losses


def runs(recipes: Path) -> list[Run]:
    """All calls for the recipes of a checkout, each different one once."""
    by_name: dict[str, Run] = {}
    for file in sorted(file for folder in FOLDERS for file in (recipes / folder).rglob("*.yaml")):
        values = {name: value for name, value in yaml.safe_load(file.read_text()).items() if name not in FREE}
        for model, options in _calls(file, values):
            digest = hashlib.sha256(json.dumps([values, options], sort_keys=True).encode()).hexdigest()
            name = f"{model.replace('/', '-')}-{file.stem}-{digest[:6]}"
            by_name[name] = Run(name, model, ("--recipe", str(file), *options), values.get("metric") == "calibrated")
    for model in MODELS:
        for line in MORE:
            by_name[model + line.replace(" ", "-")] = Run(
                model + line.replace(" ", "-"), model, tuple(shlex.split(line))
            )
    options = tuple(shlex.split("--merge grouped --experts 8 --export-as qwen2_moe"))
    return [*by_name.values(), Run("exported", "tiny-deepseek", options)]


def _calls(file: Path, values: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Models for a recipe, with the options of each."""
    named = [model for model in ("deepseek", "qwen") if model in file.parent.name]
    models = [MODELS[named[0] == "deepseek"]] if named else list(MODELS)
    if values.get("experts", 0) > EXPERTS:
        models = [f"toys/{model}" for model in models]
    if values.get("merge") != "grouped":
        reads_text = values.get("temperature") == "entropy" or values.get("routing") == "stable"
        return [(model, SHORT if reads_text else ()) for model in models]
    experts = () if "experts" in values else ("--experts", "8")
    if "fit" in values:
        return [(model, (*experts, *SHORT, *STEPS)) for model in models]
    if named:
        return [(model, experts) for model in models]
    layer = (MODELS[0], (*experts, "--fit", "layer", *SHORT, *STEPS))
    if values.get("operator") in ("random", "shared") or "target" in values:  # which mean nothing without a fit
        return [layer]
    return [layer, (MODELS[1], (*experts, *SHORT))]


def make_toy(source: Path, out: Path) -> None:
    """A packaged model's first three layers with 64 random experts each, of the packaged experts' variance."""
    draw = torch.Generator().manual_seed(0)
    config = json.loads((source / "config.json").read_text())
    layers, experts = 3, "n_routed_experts" if "n_routed_experts" in config else "num_experts"
    config |= {"num_hidden_layers": layers, experts: TOY_EXPERTS}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    tensors = {}
    for name, tensor in sorted(load_file(source / "model.safetensors").items()):
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= layers:
            continue
        if ".mlp.experts.0." in name:
            for number in range(TOY_EXPERTS):
                random = torch.randn(tensor.shape, generator=draw) * tensor.float().std()
                tensors[name.replace(".experts.0.", f".experts.{number}.")] = random.to(tensor.dtype)
        elif name.endswith(".mlp.gate.weight"):
            random = torch.randn(TOY_EXPERTS, tensor.shape[1], generator=draw) * tensor.float().std()
            tensors[name] = random.to(tensor.dtype)
        elif ".mlp.experts." not in name:
            tensors[name] = tensor
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".py") and path.name != "model.safetensors.index.json":
            shutil.copy(path, out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2))


def patch(out: Path, root: Path, recipes: Path, workers: int, only: str) -> bool:
    """Carry all runs out, those that are not done yet. Returns whether none failed."""
    for model in MODELS:
        if not (out / "toys" / model / "config.json").exists():
            shutil.rmtree(out / "toys" / model, ignore_errors=True)
            make_toy(HERE / "namex_hf" / "packaged" / model, out / "toys" / model)
    todo = [run for run in runs(recipes) if only in run.name and not (out / run.name / "config.json").exists()]
    print(f"{len(todo)} runs to do", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        return all(list(pool.map(lambda run: _patched(run, out, root), todo)))


def _patched(run: Run, out: Path, root: Path) -> bool:
    experiment = root / "experiments" / "loss_game" / "run.py"
    if run.losses and experiment.exists():
        command = [str(experiment), "patch"]
    else:
        scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
        command = ["-c", ENTRY.format(*scripts["namex-patch"].split(":"))]
    call = [sys.executable, *command, run.model, "--out", run.name, "--quiet", *run.options]
    paths = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(call, cwd=out, env=os.environ | paths, capture_output=True, text=True)
    reason = "" if done.returncode == 0 else f": status {done.returncode}, {done.stderr.strip()}"
    print(f"{time.perf_counter() - start:6.1f} s  {run.name}{reason}", flush=True)
    return done.returncode == 0


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two folders of runs. A run that only the second one has is no difference."""
    lines = []
    for run in sorted(path.parent for path in before.glob("*/config.json")):
        if not (after / run.name / "config.json").exists():
            lines.append(f"{run.name}: only before")
            continue
        names = [
            {path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file() and _counts(path)}
            for top in (run, after / run.name)
        ]
        lines += [f"{run.name}/{name}: only in one" for name in sorted(names[0] ^ names[1])]
        for name in sorted(names[0] & names[1]):
            lines += [f"{run.name}/{where}" for where in _file_differences(name, run / name, after / run.name / name)]
    return lines


def _counts(path: Path) -> bool:
    return path.suffix != ".py" and path.name != "README.md"


def _file_differences(name: str, before: Path, after: Path) -> list[str]:
    if name not in REWRITTEN:
        return [] if before.read_bytes() == after.read_bytes() else [name]
    read = json.loads if name.endswith(".json") else yaml.safe_load
    one, other = (_facts(read(path.read_text()), "") for path in (before, after))
    return [f"{name}: {key}" for key in sorted(one.keys() | other.keys()) if one.get(key, "") != other.get(key, "")]


def _facts(value: Any, place: str) -> dict[str, str]:
    """Leaves by their place, the free ones and those of files that are compared by themselves left out."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    facts = {} if isinstance(value, (dict, list)) and value else {place: repr(value)}
    for key, inside in pairs:
        if key not in FREE and not (place == ".files" and (key in REWRITTEN or not _counts(Path(str(key))))):
            facts |= _facts(inside, f"{place}.{key}")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("patch", help="make a folder of results")
    one.add_argument("out", type=Path)
    one.add_argument("--root", type=Path, default=HERE, help="the checkout that patches (default: this one)")
    one.add_argument("--recipes", type=Path, help="the checkout whose recipes are used (default: that of --root)")
    one.add_argument("--workers", type=int, default=2)
    one.add_argument("--only", default="", metavar="TEXT", help="runs whose name has this text")
    two = commands.add_parser("compare", help="compare two such folders")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "patch":
        root = options.root.resolve()
        recipes = (options.recipes or root).resolve()
        sys.exit(0 if patch(options.out.resolve(), root, recipes, options.workers, options.only) else 1)
    lines = differences(options.before, options.after)
    count = len(list(options.before.glob("*/config.json")))
    print("\n".join([*lines, f"{count} runs compared, {len(lines)} differences"]))
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
