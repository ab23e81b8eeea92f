"""``namex score``: scores of models and recipes on lm-eval's tasks, side by side."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from .common import Parser, command_parser, loading, run

PACKAGED_TASKS = ("namex_definitions", "namex_sums", "namex_word_problems", "namex_text")

EXAMPLES = """\
examples:
  namex score
      the packaged model and three recipes on the packaged sets: offline, minutes on two cores
  namex score Qwen/Qwen1.5-MoE-A2.7B out/qwen --tasks mmlu,gsm8k,gsm8k:5,arc_challenge,arc_easy
      a model and a patched folder on lm-eval's own tasks, GSM8K without examples and with five
  namex score deepseek-ai/deepseek-moe-16b-base --tasks mmlu --recipes deepseek-moe-16b/namex-full
      a row of the paper's table: the recipe is applied below --out, then scored
  namex score --tasks gsm8k --data data --limit 200
      an official task on a local copy of its data set (data/openai/gsm8k, see eval/make_local_gsm8k.py)
  namex score --tasks none --texts book.txt
      perplexity of a text
  accelerate launch --multi_gpu --num_processes 4 eval/zero_shot.py out/qwen --tasks mmlu
      a copy of the model on each of four GPUs; --parallelize spreads one copy over all

The same command goes on where a run was stopped. docs/evaluation.md says what is measured and how.
"""


def parser_of(prog: str = "namex score") -> Parser:
    made = command_parser(
        prog,
        "Score models on lm-eval's tasks and on the packaged sets, compare each with the model it was\n"
        "made of on the same items, and put the paper's numbers beside.\n\n"
        '"Zero-shot" has two readings: no worked examples in the prompt, or no tuning. Nothing is tuned here. The\n'
        "number of examples is stated for each task: --tasks gsm8k:5,mmlu:0 (default: none).",
        usage="[MODEL ...] [options]",
    )
    made.epilog = EXAMPLES.replace("namex score", prog)
    models = made.add_argument_group("models")
    models.add_argument(
        "model",
        nargs="*",
        metavar="MODEL",
        help="folders, patched or not, Hub ids, tiny, tiny-deepseek, tiny-qwen3 (default: tiny)",
    )
    models.add_argument("--models", "--model", nargs="+", default=[], metavar="MODEL", help="the same, by an option")
    models.add_argument(
        "--recipes",
        "--recipe",
        nargs="*",
        metavar="FILE|NAME",
        help="recipes applied to every model, each a row more: YAML files, or names of 'namex recipes' "
        "(default: where no model is named, three for tiny)",
    )
    models.add_argument("--revision", help="branch, tag or commit of a Hub id; the report pins the commit")
    models.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with a model; the patched models of this package need none",
    )
    tasks = made.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        default=list(PACKAGED_TASKS),
        help="lm-eval's tasks and groups, arc for arc_challenge and arc_easy, or "
        f"{', '.join(PACKAGED_TASKS)} (default: these four); TASK:N with N worked "
        "examples in the prompt, such as gsm8k:5 mmlu:0; none: only --texts",
    )
    tasks.add_argument(
        "--texts",
        "--text",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="perplexity of text files as well",
    )
    tasks.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of local data sets under their Hub names, such as DIR/openai/gsm8k",
    )
    tasks.add_argument(
        "--num_fewshot",
        "--num-fewshot",
        type=_count(0),
        default=0,
        metavar="N",
        help="worked examples before each question of a task that states none with its name (default: 0)",
    )
    tasks.add_argument(
        "--apply_chat_template",
        "--apply-chat-template",
        action="store_true",
        help="ask in the model's chat format, worked examples as turns before the question",
    )
    tasks.add_argument("--limit", type=_count(1), metavar="N", help="only the first N items of every task")
    how = made.add_argument_group("how")
    how.add_argument(
        "--out",
        "--output_path",
        "--output-path",
        type=Path,
        default=Path("out/zero-shot"),
        metavar="DIR",
        help="results, samples, patched models and the report (default: out/zero-shot)",
    )
    how.add_argument("--overwrite", action="store_true", help="score again what another run has left there")
    how.add_argument("--device", help="such as cpu, cuda, cuda:1 (default: the accelerator if there is one)")
    how.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (default: auto, the model's own)",
    )
    how.add_argument(
        "--batch_size",
        "--batch-size",
        default="auto",
        type=_batch,
        metavar="N|auto",
        help="sequences at once (default: auto, found for each kind of request)",
    )
    how.add_argument("--parallelize", action="store_true", help="one model over all GPUs (device_map auto)")
    how.add_argument("--seed", type=_count(0, 2**32 - 1), default=1234, help="default: 1234, lm-eval's own")
    how.add_argument(
        "--stage",
        choices=("zero-shot", "fine-tuned"),
        default="zero-shot",
        help="which of the paper's columns stands beside: without tuning (zero-shot, whatever the examples in the "
        "prompt, of which the paper gives no number) or after training on SmolTalk",
    )
    how.add_argument("--quiet", action="store_true", help="no progress, no table")
    return made


def _count(least: int, most: int = 2**63 - 1) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 20 or not least <= int(text) <= most:
            upto = f" to {most}" if most < 2**63 - 1 else ""
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: a whole number from {least}{upto}")
        return int(text)

    return number


def _batch(text: str) -> str:
    return text if text == "auto" else str(_count(1)(text))


def main(arguments: Sequence[str] | None = None, prog: str = "namex score") -> int:
    """Entry point of ``namex score``, and of ``eval/zero_shot.py``."""
    return run(parser_of(prog), arguments, lambda options: _score(options, prog))


def _score(options: argparse.Namespace, prog: str) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars, a dozen a task; tqdm reads it when it is imported
    options.models = [*options.model, *options.models]
    with loading():
        try:
            import lm_eval  # noqa: F401  (the first: it says soonest that the extra is missing)

            from .score_screen import score
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"eval/{prog}" if prog.endswith(".py") else prog, "eval") from error
    return score(options)
