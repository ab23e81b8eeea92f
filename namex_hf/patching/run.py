"""One run: a plan into the folder of its result."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..bargaining import spectral_radius
from ..checkpoint.bytes import Reader, copy_file
from ..checkpoint.companions import carry
from ..checkpoint.folder import STATE, OutputFolder, list_files
from ..checkpoint.identity import hash_weights
from ..checkpoint.layout import left_out_line
from ..checkpoint.shard import write_index, write_tensors
from ..checkpoint.source import Checkpoint
from ..checkpoint.tokenizer_code import carry_code, code_line
from ..errors import CheckpointError, FamilyError, OutputError, RecipeError
from ..files import CARD, HASH, RECIPE, REPORT, STATISTICS, locate, write_text
from ..models import remote_code
from ..progress import ProgressCallback, no_progress
from ..recipe import AroundBase, Propagation
from ..record import Report
from ..report.card import card
from .budget import spend
from .checkpoint_sink import write_checkpoint
from .checkpoint_source import check_finite, checkpoint_source
from .estimate import space_needed
from .moments import MomentsFolder
from .pipeline import Passage
from .plan import Plan
from .scores import open_moments, read_scores
from .state import State
from .threads import shared_out

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A plan on its way into a folder, from where a killed run left it.

    Args:
        scores, moments, overwrite, verify: as of `patch_checkpoint`.
    """

    plan: Plan
    out: Path
    scores: Path | None = None
    moments: Path | None = None
    overwrite: bool = False
    verify: bool = False

    @cached_property
    def folder(self) -> OutputFolder:
        plan = self.plan
        return OutputFolder(self.out, plan.run, plan.checkpoint.identity, self.verify, device=plan.device)

    @cached_property
    def state(self) -> State:
        return State(self.out / STATE, self.plan.checkpoint.identity)

    def check(self, of_any: bool = False) -> None:
        """Refuse a folder that this run must not write. Args: of_any, it may be of any run of ours.

        Raises:
            OutputError: saying why.
        """
        folder = self.folder
        keep_apart(self.plan.checkpoint, self.out)
        folder.check(self.overwrite or of_any)

    def room(self, saves_moments: bool = False) -> int:
        """Bytes that are still to be written, at most."""
        present = sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file()) if self.out.is_dir() else 0
        return max(0, space_needed(self.plan, saves_moments) - present)

    def go(self, progress: ProgressCallback, shared: Passage, beside: int) -> Generator[int, None, Report]:
        """Carry the plan out, once it is checked. Where layers depend on each other, each is yielded before it begins.

        Args:
            shared: with runs that go in step with this one.
            beside: bytes that those will write.

        Raises:
            As `patch_checkpoint`.
        """
        plan, folder = self.plan, self.folder
        known = None if self.scores is None else read_scores(self.scores, plan)
        measured = plan.like if self.moments is None else open_moments(self.moments, plan)
        if not self.overwrite and folder.complete:
            logger.info("%s is complete", self.out)
            shutil.rmtree(self.out / STATE, ignore_errors=True)
            return Report.from_file(locate(self.out, REPORT))
        to_save = None if measured is None or measured.is_complete else measured
        folder.check_space(self.room(to_save is not None) + beside)
        start = time.perf_counter()
        with folder.claimed(self.overwrite):
            self._begin(to_save)
            earlier = set(self.state.shards())
            try:
                if plan.spends_budget:
                    plan = self.plan = self._with_counts(progress)
                with nullcontext() if plan.recipe.needs_text else shared_out():
                    writing = write_checkpoint(plan, self.out, self.state, progress, known, measured, shared)
                    weight_map = yield from writing
                plan.checkpoint.identity.settle()
                if to_save is not None:
                    to_save.end()
            except (CheckpointError, FamilyError, RecipeError):
                folder.remove()
                raise
            return self._finish(self._settled(earlier), weight_map, start)

    def _begin(self, moments: MomentsFolder | None) -> None:
        if self.state.is_damaged(self.plan.shape.layers):
            logger.warning("%s: the state of an earlier run is damaged; the run begins anew", self.out)
            self.folder.begin_anew()
        for line in filter(None, (left_out_line(self.plan.left_out), code_line(self.plan.checkpoint.folder))):
            logger.warning(line)
        if moments is not None:
            moments.begin()

    def _with_counts(self, progress: ProgressCallback) -> Plan:
        """The plan with its budget dealt out by `spend`, as it was before a kill."""
        plan, record = self.plan, self.state.load_budget()
        if record is None:
            assert plan.text is not None
            check_finite(plan, no_progress)
            with Reader(plan.checkpoint.identity.digests) as reader:
                record = spend(checkpoint_source(plan, reader), plan.recipe, plan.text, progress)
            self.state.save_budget(record)
        return replace(plan, counts=tuple(layer["experts"] for layer in record))

    def _settled(self, earlier: set[str]) -> dict[str, dict[str, Any]]:
        """Size and hash of every shard. Copies that an earlier, killed run made are compared with the source, whose
        hash is known by now, and made again where they differ."""
        identity, shards = self.plan.checkpoint.identity, self.state.shards()
        for name, listed in shards.items():
            if (source := listed.pop("copy_of", None)) is None:
                continue
            listed[HASH] = identity.digests.of_file(identity.weights[source])
            copy = self.out / name
            if name in earlier and hash_weights(copy) != listed[HASH]:
                copy.unlink()
                with ThreadPoolExecutor(1) as settling:
                    copy_file(identity.weights[source], copy, settling, self.state.record_shard).result()
        return shards

    def _finish(self, shards: dict[str, dict[str, Any]], weight_map: dict[str, str], start: float) -> Report:
        """Write what stands beside the shards, the configuration last: the folder becomes a model."""
        report = self._report(weight_map, time.perf_counter() - start)
        self._write_companions(report, weight_map)
        config = json.dumps(self.plan.config(), indent=2) + "\n"
        report = replace(report, files=list_files(self.out, config, shards))
        write_text(self.out / REPORT, report.to_json())
        self.folder.finish(config)
        return report

    def _report(self, weight_map: dict[str, str], seconds: float) -> Report:
        plan, records = self.plan, self.state.records()
        files = {name: (self.out / name).stat().st_size for name in sorted(set(weight_map.values()))}
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
            totals["budget"] = self.state.load_budget()
        merge = plan.recipe.merge
        if isinstance(merge, AroundBase) and merge.propagation.momentum != "none":
            totals |= _stability(merge.propagation, records)
        source = {
            "name": plan.checkpoint.name,
            "commit": plan.checkpoint.commit,
            "fingerprint": plan.checkpoint.fingerprint(),
            "bytes": plan.checkpoint.size,
        }
        return Report(plan.run, source, plan.family.model_type, records, totals)

    def _write_companions(self, report: Report, weight_map: dict[str, str]) -> None:
        plan, out, source = self.plan, self.out, self.plan.checkpoint.folder
        write_index(out, weight_map, plan.bytes_out)
        carry(source, out)
        carry_code(source, out)
        config = plan.config()
        for file in remote_code(config["model_type"]).files:
            write_text(out / file.name, file.read_text("utf-8"))
        if statistics := self.state.statistics():
            write_tensors(out / STATISTICS, statistics)
        write_text(out / RECIPE, plan.recipe.to_yaml(stored=True))
        write_text(out / CARD, card(report, config, out, source))


def keep_apart(checkpoint: Checkpoint, out: Path) -> None:
    """Raises:
    OutputError: the output folder is the model's own, or inside it or around it.
    """
    source, target = checkpoint.folder.resolve(), out.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise OutputError(f"--out {out} is the model's own folder, or inside it or around it; another folder is needed")


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
