"""Let three models bargain over whose answer is given: ``python examples/choose_response.py``.

Every model answers the same prompt. Its answer has three gains, each from 0 to 1:

  quality     how sure the model is of its answer: the geometric mean of its tokens' probabilities
  latency     the share of the time limit that the answer left over
  agreement   how likely the other models find the answer: the same mean under each of them, averaged

Gains count from the disagreement value, which is what a model has without an answer: 0 of each. A model over its time
limit is at its disagreement value, so it has no stake in the game and no vote.

The models are the players, and tau_i is the vector of model i's three gains. They bargain over a direction Delta, a
trade-off between the three gains that serves all: K a = 1 / a, K_ij = tau_i . tau_j, Delta = sum a_i tau_i. It is the
equation by which experts bargain over a base expert, and the same solver. The answer with the largest utility
tau_i . Delta is chosen. The scale of a model's gains does not change the direction. Two models with the same gains
share one vote in it.

examples:
  python examples/choose_response.py
  python examples/choose_response.py --prompt "Question: Tom has 3 bags with 4 pears each. How many pears has Tom?
  Answer:" --limit 2
  python examples/choose_response.py --models tiny out/half out/tuned     # any folders that transformers opens

"latency" is measured, so a busy machine can change the choice. "quality" is what the models think of themselves: put
your own judge in the place of `likelihood` where you have one.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from namex_hf import nash_bargaining, patch_checkpoint
from namex_hf.bargaining import AGREEMENT
from namex_hf.checkpoint.resolve import resolve
from namex_hf.checkpoint.tokenizer import open_tokenizer
from namex_hf.commands.common import Parser, ended
from namex_hf.errors import NamexError
from namex_hf.evaluation.loading import load, without_balance_loss

GAINS = ("quality", "latency", "agreement")
PROMPT = (
    "Question: Sam shares 27 pencils equally among 3 children. Each child already had 37 pencils. "
    "How many pencils does each child have now?\nAnswer:"
)


def latency_gain(seconds: float, limit: float) -> float:
    """The share of the time limit that is left over; 0 at the limit and beyond it."""
    return max(0.0, 1.0 - seconds / limit)


def agreement_gain(own: int, likelihoods: torch.Tensor) -> float:
    """The mean of what the other models think of an answer.

    Args:
        own: the model that gave it.
        likelihoods: ``[models]``, the answer's likelihood under each; see `likelihood`.
    """
    others = [float(value) for model, value in enumerate(likelihoods) if model != own]
    return sum(others) / len(others)


def gains(likelihoods: torch.Tensor, seconds: Sequence[float], limit: float) -> torch.Tensor:
    """Gains over the disagreement value, float64 ``[models, 3]``, in the order of `GAINS`.

    A model over its time limit is at its disagreement value: a row of zeros.

    Args:
        likelihoods: ``[models, models]``, of every model's answer (row) under every model (column), from 0 to 1.
        seconds: that each answer took.
    """
    found = torch.zeros(len(seconds), len(GAINS), dtype=torch.float64)
    for model, (row, taken) in enumerate(zip(likelihoods, seconds, strict=True)):
        if taken < limit:
            values = float(row[model]), latency_gain(taken, limit), agreement_gain(model, row)
            found[model] = torch.tensor(values, dtype=torch.float64)
    return found


def bargain(tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and utilities of the Nash bargaining solution between models (the paper's eq. 6), both ``[models]``.

    Args:
        tau: gains, ``[models, 3]``.

    Raises:
        NamexError: no model has anything to gain.
    """
    gram = tau @ tau.T
    solution = nash_bargaining(gram)
    if solution.status != AGREEMENT:
        raise NamexError("no model answered within --limit; accepted: a longer limit")
    return solution.weights, gram @ solution.weights


def likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """The geometric mean of the probabilities of an answer's tokens after a prompt, from 0 to 1.

    0 for an answer without tokens. An answer is tokenized together with its prompt, by the model's own tokenizer.
    """
    start = len(tokenizer(prompt).input_ids)
    ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
    if ids.shape[1] <= start:
        return 0.0
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
    return float(logits.log_softmax(-1).gather(-1, ids[0, start:, None]).mean().exp())


def answered(model: Any, tokenizer: Any, prompt: str, tokens: int, limit: float) -> tuple[str, float]:
    """A model's greedy answer, and the seconds that it took; generation stops soon after the limit."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with without_balance_loss(model):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)  # the first call is slow
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, max_time=limit)
        seconds = time.perf_counter() - start
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True), seconds


def three_models(given: Sequence[str] | None, out: Path) -> dict[str, Path]:
    """Folders by name: those given, or the two packaged models and a patched `tiny`, which is made in `out`."""
    if given is None:
        patched = out / "tiny-namex-full"
        patch_checkpoint("tiny", patched)  # a finished folder stays as it is
        given = ["tiny", "tiny-deepseek", str(patched)]
    return {name: resolve(name).folder for name in given}


def tokenizer_of(model: Any, name: str, folder: Path) -> Any:
    """The folder's own, with no token that the model lacks."""
    return open_tokenizer(folder, name, model.get_input_embeddings().num_embeddings)


def why(names: Sequence[str], tau: torch.Tensor, utilities: torch.Tensor, limit: float) -> str:
    """The choice in words: the largest utility, what it is best at, and who had no vote."""
    ranks = utilities.argsort(descending=True).tolist()
    chosen = ranks[0]
    best = [gain for gain, column in zip(GAINS, tau.T, strict=True) if 0 < column[chosen] == column.max()]
    lines = [f"chosen: {names[chosen]}, whose gains have the largest utility under the agreed trade-off"]
    if len(ranks) > 1 and utilities[ranks[1]] > 0:
        ratio = float(utilities[chosen] / utilities[ranks[1]])
        lines[0] += f": {ratio:.3f} times that of {names[ranks[1]]}"
    lines.append(f"it is the best in: {', '.join(best) or 'none of the gains alone, but in all of them together'}")
    late = [name for name, row in zip(names, tau, strict=True) if not row.any()]
    if late:
        lines.append(f"over the limit of {limit:g} s, so at its disagreement value, without a vote: {', '.join(late)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Ask the models, let them bargain, print the choice and why."""
    parser = Parser("choose_response.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="folders or packaged names (default: tiny, tiny-deepseek, patched)")
    parser.add_argument("--prompt", default=PROMPT, help="what all models continue (default: a word problem)")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds a model may take (default: %(default)g)")
    parser.add_argument("--tokens", type=int, default=60, help="most tokens of an answer (default: %(default)s)")
    home = Path("out/choose-response")
    parser.add_argument("--output_dir", type=Path, default=home, help="for the patched model (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.models is not None and not 1 < len(options.models) == len(set(options.models)):
        parser.error(f"argument --models: found {' '.join(options.models)}; accepted: two or more, each once")
    if not options.limit > 0 or options.tokens < 1 or not options.prompt:
        parser.error(
            f"found --limit {options.limit:g}, --tokens {options.tokens}, a prompt of {len(options.prompt)} characters;"
            " accepted: above 0"
        )
    choose(options)


def choose(options: argparse.Namespace) -> None:
    """The game itself; options as `main` has them."""
    folders = three_models(options.models, options.output_dir)
    names = list(folders)
    models = [load(folder) for folder in folders.values()]
    asked = [(model, tokenizer_of(model, name, folders[name])) for name, model in zip(names, models, strict=True)]
    replies = [answered(model, tokenizer, options.prompt, options.tokens, options.limit) for model, tokenizer in asked]
    likelihoods = [[likelihood(*judge, options.prompt, answer) for judge in asked] for answer, _ in replies]
    seconds = [taken for _, taken in replies]
    tau = gains(torch.tensor(likelihoods, dtype=torch.float64), seconds, options.limit)
    weights, utilities = bargain(tau)
    print(f"prompt: {options.prompt}")
    for name, (answer, taken) in zip(names, replies, strict=True):
        print(f"\n--- {name}, {taken:.2f} s\n{answer.strip()}")
    width = max(map(len, names))
    print(f"\n{'':{width}} {'quality':>9} {'latency':>9} {'agreement':>9} {'weight':>9} {'utility':>9}")
    for row, name in enumerate(names):
        cells = (*tau[row].tolist(), float(weights[row]), float(utilities[row]))
        print(f"{name:{width}} " + " ".join(f"{cell:9.3f}" for cell in cells))
    print(f"\n{why(names, tau, utilities, options.limit)}")


if __name__ == "__main__":
    sys.exit(ended("choose_response.py", main))
