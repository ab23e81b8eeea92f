"""Scores on the Hub's benchmark data sets, as files ``.eval_results/*.yaml`` of a model's repository.

The Hub shows such a score on the model's page and on the leaderboard of the data set. The form is that of
https://huggingface.co/docs/hub/eval-results.
"""

from dataclasses import dataclass

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from ..evaluation.zero_shot_report import LM_EVAL, ZeroShotReport, shots
from ..report.card_metadata import as_yaml


@dataclass(frozen=True)
class Benchmark:
    """What a task of lm-eval must give to be a score of a benchmark."""

    dataset: str
    """Hub id of the data set."""
    task_id: str
    """In the data set's ``eval.yaml``."""
    metric: str
    filter: str
    items: int
    """Of the whole test set. A score on fewer items, or on another set of the same name, is not the benchmark's."""


GSM8K = Benchmark("openai/gsm8k", "gsm8k", "exact_match", "strict-match", 1319)
GPQA = Benchmark("Idavidrein/gpqa", "gpqa_diamond", "acc", "none", 198)
BENCHMARKS = {
    "gsm8k": GSM8K,
    "gsm8k_cot": GSM8K,
    "gpqa_diamond_zeroshot": GPQA,
    "gpqa_diamond_n_shot": GPQA,
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match", "custom-extract", 12032),
}
"""By the task's name in lm-eval: the data sets that the Hub's documentation names as benchmarks, where lm-eval has a
task for them."""


def benchmark_files(evaluation: ZeroShotReport, label: str) -> dict[str, str]:
    """The content of each file, by its name in the repository; a file for each task and number of examples."""
    files = {}
    for score in evaluation.scores:
        benchmark = BENCHMARKS.get(score.task)
        if benchmark is None or score.model != label:
            continue
        scored = Benchmark(score.data["dataset"], benchmark.task_id, score.metric, score.filter, score.items)
        if scored != benchmark:
            continue
        entry = EvalResultEntry(
            benchmark.dataset,
            benchmark.task_id,
            round(100 * score.value, 2),
            source_url=LM_EVAL,
            source_name=f"lm-eval {evaluation.run['versions']['lm_eval']}",
            notes=f"{score.task}, {shots(score)}-shot, {score.metric} ({score.filter})",
        )
        name = f"{EVAL_RESULTS_FOLDER}/{score.task}-{shots(score)}shot.yaml"
        files[name] = as_yaml(eval_result_entries_to_yaml([entry])) + "\n"
    return files
