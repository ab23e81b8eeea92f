"""The report of a zero-shot run: what was measured, against what, and where each number comes from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from huggingface_hub import EvalResult

from ..render import rendered
from .baseline import is_unmerged
from .candidates import Candidate
from .paper import PaperScore
from .statistics import Difference
from .table import Table

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of items, shown in per cent."""
LM_EVAL = "https://github.com/EleutherAI/lm-evaluation-harness"
FORMATS = ("arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "xml")
"""What a task's file names in place of a data set where it reads plain files."""
TO_ORIGINAL = "to the original"
CHOICES = ("merge", "routing", "method", "disagreement")
"""Columns that tell what was done to a model."""


@dataclass(frozen=True)
class ScoredModel:
    """A row's model."""

    label: str
    name: str
    commit: str | None
    fingerprint: str
    """Of the checkpoint, from its configuration and headers."""
    recipe: dict[str, Any] | None
    original: str | None
    """Label of the model it was made of."""
    dtype: str

    @classmethod
    def of(cls, row: Candidate, dtype: str) -> "ScoredModel":
        """Args: dtype, of the weights, as lm-eval takes it."""
        source = row.checkpoint
        return cls(row.label, source.name, source.commit, source.fingerprint(), row.recipe, row.original, dtype)

    @property
    def choices(self) -> tuple[str, str, str, str]:
        """Merge, routing, method and disagreement point, as in the paper's tables; dashes of an unpatched model."""
        if self.recipe is None:
            return ("-", "linear", "-", "-")
        merge = "-" if is_unmerged(self.recipe) else self.recipe["merge"]
        bargains = self.recipe["method"].startswith("namex")
        disagreement = self.recipe.get("disagreement", "zero") if bargains else "-"
        return merge, self.recipe.get("routing", "linear"), self.recipe["method"], disagreement


@dataclass(frozen=True)
class Score:
    """One number."""

    model: str
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    items: int
    num_fewshot: int | None
    """Worked examples in the prompt; None of a group whose tasks have different numbers."""
    higher_is_better: bool
    data: dict[str, Any]
    """Data set, its configuration and split, as the task's file names them."""
    file: str
    """Where it stands, relative to the report; the samples lie beside it."""
    baseline: str | None = None
    """Label of the model that it is compared with."""
    difference: Difference | None = None
    paper: PaperScore | None = None


@dataclass(frozen=True)
class ZeroShotReport:
    """Everything, as ``report.json`` holds it. All values are plain but for the nested records."""

    run: dict[str, Any]
    models: list[ScoredModel]
    scores: list[Score]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ZeroShotReport":
        values = json.loads(text)
        scores = [
            Score(
                **{
                    **score,
                    "difference": score["difference"] and Difference(**score["difference"]),
                    "paper": score["paper"] and PaperScore(**score["paper"]),
                }
            )
            for score in values["scores"]
        ]
        return cls(values["run"], [ScoredModel(**model) for model in values["models"]], scores)

    def model(self, label: str) -> ScoredModel:
        return next(model for model in self.models if model.label == label)


def eval_results(report: ZeroShotReport, label: str) -> list[EvalResult]:
    """The entries of a model card's ``model-index`` for one model of the report (`ModelCardData(eval_results=...)`).

    The Hub takes results of equal data set, configuration and split for one entry, called like its first. Tasks that
    share these, or that read plain files, go by their own names in place of the data set's; so does a task that was
    scored with several numbers of examples, which its name then states.
    """
    scores = [score for score in report.scores if score.model == label]
    counts: dict[str, set[str]] = {}
    for score in scores:
        counts.setdefault(score.task, set()).add(shots(score))

    def name(score: Score) -> str:
        return score.task if len(counts[score.task]) == 1 else f"{score.task}, {shots(score)} shots"

    tasks: dict[tuple[str, ...], set[str]] = {}
    for score in scores:
        tasks.setdefault(_data_of(score), set()).add(name(score))
    alone = {data for data, of in tasks.items() if len(of) == 1 and data[0] not in FORMATS}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.data["dataset"] if _data_of(score) in alone else name(score),
            dataset_name=name(score),
            dataset_config=score.data["config"],
            dataset_split=score.data["split"],
            dataset_args={"num_few_shot": score.num_fewshot},
            metric_type=score.metric,
            metric_name=f"{score.metric} ({score.filter})" if score.filter != "none" else score.metric,
            metric_value=score.value,
            metric_args={"stderr": score.stderr, "items": score.items, "limit": report.run["limit"]},
            source_name=f"lm-eval {report.run['versions']['lm_eval']}",
            source_url=LM_EVAL,
        )
        for score in scores
    ]


def _data_of(score: Score) -> tuple[str, ...]:
    return tuple(str(score.data[name]) for name in ("dataset", "config", "split"))


def shown(score: Score, value: float, form: str = "") -> str:
    """A value in the unit of its metric: per cent of items, or as it is."""
    return format(100 * value, f"{form}.2f") if score.metric in SHARES else format(value, f"{form}.4f")


def table(report: ZeroShotReport, task: str) -> Table:
    """A task's table."""
    scores = [score for score in report.scores if score.task == task]
    others = any(score.difference and score.baseline != report.model(score.model).original for score in scores)
    titles = ["model", *CHOICES, "shots", "metric", "score", *(["difference", "to"] if others else [TO_ORIGINAL])]
    titles += ["95 %", "p"]
    rows = [
        [
            *(score.model, *report.model(score.model).choices),
            *(shots(score), metric_cell(score), value_cell(score), difference_cell(score)),
            *([score.baseline if score.difference and score.baseline else ""] if others else []),
            *_significance(score),
        ]
        for score in scores
    ]
    if any(score.paper for score in scores):
        titles += ["paper", "paper, to SMoE of the same routing"]
        rows = [[*row, *_paper(score.paper)] for row, score in zip(rows, scores, strict=True)]
    return Table(titles, rows)


def metric_cell(score: Score) -> str:
    return score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"


def value_cell(score: Score) -> str:
    return shown(score, score.value) + ("" if score.stderr is None else f" ± {shown(score, score.stderr)}")


def difference_cell(score: Score) -> str:
    paired = score.difference
    return "" if paired is None else f"{shown(score, paired.mean, '+')} ± {shown(score, paired.stderr)}"


def shots(score: Score) -> str:
    return "mixed" if score.num_fewshot is None else str(score.num_fewshot)


def _significance(score: Score) -> list[str]:
    paired = score.difference
    if paired is None:
        return ["", ""]
    return [f"{shown(score, paired.low, '+')} to {shown(score, paired.high, '+')}", p_value(paired.p)]


def _paper(paper: PaperScore | None) -> list[str]:
    return ["", ""] if paper is None else [f"{paper.value:.2f}", f"{paper.value - paper.original:+.2f}"]


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def sentence(score: Score) -> str | None:
    """What a comparison says, in words; nothing where there is none."""
    paired = score.difference
    if paired is None:
        return None
    unit = " points" if score.metric in SHARES else ""
    examples = "" if score.num_fewshot == 0 else f", {shots(score)} shots"
    what = f"{score.model}, {score.metric}{examples}: {shown(score, paired.mean, '+')}{unit} to {score.baseline}"
    if paired.higher == paired.lower == 0:
        return f"{what}; the two score alike on each of {score.items} items."
    better, worse = (paired.higher, paired.lower) if score.higher_is_better else (paired.lower, paired.higher)
    sign = "p " if paired.p < 0.001 else "p = "
    basis = f"on {score.items} items ({better} better, {worse} worse; {sign}{p_value(paired.p)})"
    if paired.is_noise:
        return f"{what} is within the noise: no difference is shown {basis}."
    verdict = "better" if (paired.mean > 0) == score.higher_is_better else "worse"
    return f"{what} is more than noise: {verdict} {basis}."


def markdown(report: ZeroShotReport) -> str:
    """``report.md``."""
    tasks: dict[str, list[Score]] = {}
    for score in report.scores:
        tasks.setdefault(score.task, []).append(score)
    models = [[m.label, m.name, m.commit or "none (local)", _fields(m.recipe)] for m in report.models]
    return rendered(
        "zero_shot.md",
        run=report.run,
        tasks=tasks,
        table=partial(table, report),
        sentence=sentence,
        models=Table(["model", "from", "commit", "recipe"], models),
    )


def _fields(recipe: Mapping[str, Any] | None) -> str:
    if recipe is None:
        return "none"
    return ", ".join(f"{name}: {value}" for name, value in recipe.items() if value is not None)
