"""`patch_checkpoint`: a checkpoint in, a patched model folder out, two layers in memory at most."""

import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bargaining import spectral_radius
from ..calibration.sources import Texts
from ..checkpoint.bytes import Reader, copy_file
from ..checkpoint.companions import carry, companions
from ..checkpoint.folder import STATE, OutputFolder, list_files
from ..checkpoint.identity import hash_weights
from ..checkpoint.layout import left_out_line
from ..checkpoint.resolve import resolve
from ..checkpoint.shard import write_index, write_tensors
from ..checkpoint.source import Checkpoint
from ..checkpoint.tokenizer_code import carry_code, code_line, tokenizer_code
from ..defaults import SHARD_SIZE
from ..errors import CheckpointError, FamilyError, OutputError, RecipeError
from ..files import CARD, CONFIG, HASH, RECIPE, REPORT, STATISTICS, locate, write_text
from ..models import remote_code
from ..progress import ProgressCallback, ProgressEvent, no_progress
from ..recipe import AroundBase, Propagation, Recipe
from ..record import Report
from ..report.card import card
from .budget import spend
from .checkpoint_sink import write_checkpoint
from .checkpoint_source import check_finite, checkpoint_source
from .effort import effort_of
from .estimate import peak_bytes, space_needed
from .pipeline import Passage
from .plan import Plan, make_plan
from .scores import DEPENDS_ON, open_moments, read_scores
from .state import State
from .threads import shared_out

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


def patch_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    texts: Texts | None = None,
    revision: str | None = None,
    export_as: str | None = None,
    like: str | Path | None = None,
    scores: str | Path | None = None,
    moments: str | Path | None = None,
    shard_size: str | int = SHARD_SIZE,
    overwrite: bool = False,
    verify: bool = False,
    progress: ProgressCallback = no_progress,
) -> Report:
    """Patch a checkpoint out of core.

    A run that was killed is continued by the same call; on a folder that is complete already nothing is done and its
    report is returned. A finished folder that lost a file is made anew.

    Args:
        source: a local folder, the name of a packaged model, or a Hub id.
        out: a folder that is new, empty, or of the same run.
        texts: calibration text, in the place of what the recipe names: a list of texts, or of chats, each a list of
            messages. They are part of the run: another list is another run.
        export_as: ``qwen2_moe``: write a grouped DeepSeek-MoE in the stock Qwen2-MoE form.
        like: a folder that ``moments`` of another model of this shape has filled, such as the base model of this one.
            They stand for the text.
        scores: a folder that was patched from the same source on the same text. Its scores of experts stand for the
            text, for recipes that weigh experts by it alone (`Recipe.reads_scores_alone`).
        moments: a folder for second moments of neurons, of one source and text. They are saved there and, where they
            are there, stand for the text: results of several widths from one reading (`Recipe.reads_moments_alone`).
        shard_size: of the shards that are written anew; unchanged shards are copied as they are.
        overwrite: make the folder anew, whichever run it is of (never one that is not ours).
        verify: read all files of a folder that is complete, and make it anew where one has another hash.
        progress: called after every layer, and after every stage of one that text is read for; ``done`` is bytes.

    Memory: one layer's experts and, for ``grouped``, up to one layer of merged ones.

    Raises:
        RecipeError, FamilyError, CheckpointError, CalibrationError: bad input; no output folder is left.
        OutputError: the folder cannot be used, or the disk is full (the folder stays and can be continued).
    """
    checkpoint = resolve(source, revision)
    like = None if like is None else Path(like)
    plan = make_plan(checkpoint, recipe or Recipe(), shard_size, export_as, texts=texts, like=like)
    return run_plan(
        plan, Path(out), scores=scores, moments=moments, overwrite=overwrite, verify=verify, progress=progress
    )


def run_plan(
    plan: Plan,
    out: Path,
    *,
    scores: str | Path | None = None,
    moments: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = False,
    progress: ProgressCallback = no_progress,
) -> Report:
    """Carry out a checked plan. See `patch_checkpoint`."""
    [report] = run_plans(
        [(plan, out)], scores=scores, moments=moments, overwrite=overwrite, verify=verify, progress=progress
    )
    return report


def share_reading(plans: Sequence[Plan]) -> bool:
    """Whether one reading of the text does for all: it is the same text, and layers see it as the original's do."""
    texts = [(plan.tokens, *map(plan.run.get, DEPENDS_ON)) for plan in plans]
    reads = all(plan.reads_text and plan.recipe.reads_original for plan in plans)
    return reads and all(text == texts[0] for text in texts)


def run_plans(
    runs: Sequence[tuple[Plan, Path]],
    *,
    scores: str | Path | None = None,
    moments: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = False,
    progress: ProgressCallback = no_progress,
) -> list[Report]:
    """Carry out plans that `share_reading`, or one: all results of a layer are made before the text goes on.

    Memory: as of one plan. The states of all are on the disk at once.
    """
    progress, shared = _counting([plan for plan, _ in runs], progress), Passage()
    needed = [max(0, space_needed(plan) - _present(out)) for plan, out in runs]
    return _in_step(
        [
            _running(plan, out, scores, moments, overwrite, verify, progress, shared, sum(needed) - own)
            for (plan, out), own in zip(runs, needed, strict=True)
        ]
    )


def _in_step(runs: Sequence[Generator[int, None, Report]]) -> list[Report]:
    """Let the run go on that is at the lowest layer, until all have ended. What ends one early ends all."""
    reports: dict[int, Report] = {}
    layers = dict.fromkeys(range(len(runs)), -1)
    try:
        while layers:
            number = min(layers, key=layers.__getitem__)
            try:
                layers[number] = next(runs[number])
            except StopIteration as end:
                reports[number] = end.value
                del layers[number]
    except BaseException as error:
        for run in runs:
            with suppress(type(error)):
                run.throw(error)
        raise
    return [reports[number] for number in range(len(runs))]


def _running(
    plan: Plan,
    out: Path,
    scores: str | Path | None,
    moments: str | Path | None,
    overwrite: bool,
    verify: bool,
    progress: ProgressCallback,
    shared: Passage,
    beside: int,
) -> Generator[int, None, Report]:
    """The run of a plan, as `write_checkpoint`. Args: beside, bytes that the others need."""
    folder = OutputFolder(out, plan.run, plan.checkpoint.identity, verify, device=plan.device)
    keep_apart(plan.checkpoint, out)
    folder.check(overwrite)
    known = None if scores is None else read_scores(Path(scores), plan)
    measured = plan.like if moments is None else open_moments(Path(moments), plan)
    if not overwrite and folder.complete:
        logger.info("%s is complete", out)
        shutil.rmtree(out / STATE, ignore_errors=True)
        return Report.from_file(locate(out, REPORT))
    saves_moments = measured is not None and not measured.is_complete
    folder.check_space(max(0, space_needed(plan, saves_moments) - _present(out) + beside))
    start = time.perf_counter()
    with folder.claimed(overwrite):
        state = State(out / STATE, plan.checkpoint.identity)
        if state.is_damaged(plan.shape.layers):
            logger.warning("%s: the state of an earlier run is damaged; the run begins anew", out)
            folder.begin_anew()
        for line in filter(None, (left_out_line(plan.left_out), code_line(plan.checkpoint.folder))):
            logger.warning(line)
        earlier = set(state.shards())
        if measured is not None and saves_moments:
            measured.begin()
        try:
            if plan.spends_budget:
                plan = with_counts(plan, state, progress)
            with nullcontext() if plan.recipe.needs_text else shared_out():
                weight_map = yield from write_checkpoint(plan, out, state, progress, known, measured, shared)
            plan.checkpoint.identity.settle()
            if measured is not None and saves_moments:
                measured.end()
        except (CheckpointError, FamilyError, RecipeError):
            folder.remove()
            raise
        shards = _settled(plan, state, out, earlier)
        report = _report(plan, state, out, weight_map, time.perf_counter() - start)
        config = json.dumps(plan.config(), indent=2) + "\n"
        _write_companions(plan, out, state, report, weight_map)
        report = replace(report, files=list_files(out, config, shards))
        write_text(out / REPORT, report.to_json())
        folder.finish(config)
    return report


def with_counts(plan: Plan, state: State, progress: ProgressCallback) -> Plan:
    """The plan with its budget dealt out by `spend`, as it was before a kill."""
    record = state.load_budget()
    if record is None:
        assert plan.text is not None
        check_finite(plan, no_progress)
        with Reader(plan.checkpoint.identity.digests) as reader:
            record = spend(checkpoint_source(plan, reader), plan.recipe, plan.text, progress)
        state.save_budget(record)
    return replace(plan, counts=tuple(layer["experts"] for layer in record))


def _settled(plan: Plan, state: State, out: Path, earlier: set[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of every shard. Copies that an earlier, killed run made are compared with the source, whose hash
    is known by now, and made again where they differ."""
    identity, shards = plan.checkpoint.identity, state.shards()
    for name, listed in shards.items():
        if (source := listed.pop("copy_of", None)) is None:
            continue
        listed[HASH] = identity.digests.of_file(identity.weights[source])
        if name in earlier and hash_weights(out / name) != listed[HASH]:
            (out / name).unlink()
            with ThreadPoolExecutor(1) as settling:
                copy_file(identity.weights[source], out / name, settling, state.record_shard).result()
    return shards


def _present(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.is_dir() else 0


def keep_apart(checkpoint: Checkpoint, out: Path) -> None:
    """Raises:
    OutputError: the output folder is the model's own, or inside it or around it.
    """
    source, target = checkpoint.folder.resolve(), out.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise OutputError(f"--out {out} is the model's own folder, or inside it or around it; another folder is needed")


def _counting(plans: Sequence[Plan], progress: ProgressCallback) -> ProgressCallback:
    """A callback, for several threads, that adds how many bytes of all runs are done."""
    # Looked at or merged once; where shards are carried over as they are, copied as well.
    total = sum(plan.checkpoint.size * (1 if plan.recipe.merge.rewrites else 2) for plan in plans)
    done, lock = 0, threading.Lock()

    def count(event: ProgressEvent) -> None:
        nonlocal done
        with lock:
            done += event.amount
            progress(replace(event, done=min(done, total), total=total))

    return count


def _report(plan: Plan, state: State, out: Path, weight_map: dict[str, str], seconds: float) -> Report:
    files = {name: (out / name).stat().st_size for name in sorted(set(weight_map.values()))}
    totals: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "bytes_in": plan.checkpoint.size,
        "bytes_out": sum(files.values()),
        "files": len(files),
        "tensors": len(weight_map),
        "peak_resident_bytes": _peak_resident_bytes(),
    }
    if plan.left_out:
        totals["left_out"] = plan.left_out
    if plan.curvature_parameters:
        totals["curvature_parameters"] = plan.curvature_parameters
    if plan.spends_budget:
        totals["budget"] = state.load_budget()
    merge = plan.recipe.merge
    if isinstance(merge, AroundBase) and merge.propagation.momentum != "none":
        totals |= _stability(merge.propagation, state.records())
    source = {
        "name": plan.checkpoint.name,
        "commit": plan.checkpoint.commit,
        "fingerprint": plan.checkpoint.fingerprint(),
        "bytes": plan.checkpoint.size,
    }
    return Report(plan.run, source, plan.family.model_type, state.records(), totals)


def _peak_resident_bytes() -> int | None:
    """The most memory that this process has had so far; None where the system does not count it."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _stability(propagation: Propagation, layers: list[dict[str, Any]]) -> dict[str, float]:
    """How the walk's distance to its fixed point changes in a layer in the long run, and over this model's layers."""
    sums = [sum(game["weights"]) for layer in layers for game in layer["games"]]
    radius = spectral_radius(propagation.complex_beta, propagation.gamma, sum(sums) / len(sums))
    return {"spectral_radius": radius, "spectral_radius_over_layers": radius ** len(layers)}


def _write_companions(plan: Plan, out: Path, state: State, report: Report, weight_map: dict[str, str]) -> None:
    write_index(out, weight_map, plan.bytes_out)
    carry(plan.checkpoint.folder, out)
    carry_code(plan.checkpoint.folder, out)
    config = plan.config()
    for file in remote_code(config["model_type"]).files:
        write_text(out / file.name, file.read_text("utf-8"))
    statistics = state.statistics()
    if statistics:
        write_tensors(out / STATISTICS, statistics)
    write_text(out / RECIPE, plan.recipe.to_yaml(stored=True))
    write_text(out / CARD, card(report, config, out, plan.checkpoint.folder))


def describe(plan: Plan, out: Path, saves_moments: bool = False) -> dict[str, Any]:
    """What a run would do, for ``--dry-run``."""
    place = out
    while not place.exists():
        place = place.absolute().parent
    return {
        "layers": len(plan.shape.layers),
        "experts": plan.shape.experts,
        "kept": plan.experts,
        "width": plan.width,
        "share": plan.experts * plan.width / (plan.shape.experts * plan.shape.width),
        "bytes_in": plan.checkpoint.size,
        "bytes_out": plan.bytes_out,
        "space_needed": space_needed(plan, saves_moments),
        "free": shutil.disk_usage(place).free,
        "peak_bytes": peak_bytes(plan),
        "carried": _carried(plan.checkpoint),
        "calibration_tokens": plan.recipe.calibration.tokens if plan.reads_text else None,
        "curvature_parameters": plan.curvature_parameters,
        "effort": effort_of(plan),
        "device": plan.recipe.device,
    }


def _carried(checkpoint: Checkpoint) -> list[str]:
    """Names of what is carried over, of a folder or of a repository of which headers were fetched."""
    if checkpoint.elsewhere is not None:
        return list(checkpoint.elsewhere)
    folder = checkpoint.folder
    return [path.relative_to(folder).as_posix() for path in (*companions(folder), *tokenizer_code(folder))]


def rewrite_report(out: Path, report: Report) -> None:
    """Put a report with more in it (perplexity, say) in the place of the old one, and into the card."""
    config = json.loads((out / CONFIG).read_text("utf-8"))
    write_text(out / CARD, card(report, config, out))
    write_text(locate(out, REPORT), report.to_json())
