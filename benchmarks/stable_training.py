"""StableMoE's two stages on a packaged model: ``python benchmarks/stable_training.py [--steps 200]``.

The model is patched with routing: stable alone (method: smoe), trained on the packaged calibration text in both stages,
and measured on the packaged held-out text: perplexity and word problems answered exactly after each step of the way,
beside a control that routes linearly and trains for as many steps, and how far the experts assigned by token id are
those that the router would choose, on held-out contexts of ids that stage 1 has seen and on ids that it has not. So
that there are enough of the latter, stage 1 may hear less text than there is (``--tokens``).
"""

import argparse
import copy
import tempfile
import time
from typing import Any

import torch
from agreement import agreement, hear
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from namex_hf.calibration.text import calibration_text
from namex_hf.checkpoint.resolve import local_folder
from namex_hf.evaluation.arithmetic import exact_answers, held_out_problems
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import held_out_texts, perplexities
from namex_hf.evaluation.table import Table
from namex_hf.merging.routers import assignment
from namex_hf.merging.routing import TokenRouting
from namex_hf.models.convert import patch_classes
from namex_hf.training.stable_moe import StageOne, freeze
from namex_hf.training.stable_moe.routing_hooks import stable_routers

LENGTH = 256


class StageOneTrainer(StageOne, Trainer):
    """The mixin, on the stock trainer."""


def train(kind: type, model: Any, rows: torch.Tensor, options: argparse.Namespace, **more: Any) -> Any:
    """`options.steps` steps on sequences drawn at random, and the trainer that made them."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            use_cpu=True,
            seed=options.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            log_level="error",
        )
        data = [{"input_ids": ids, "labels": ids} for ids in rows]
        trainer = kind(model=model, args=arguments, train_dataset=data, **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def held_out_rows(tokenizer: Any, texts: dict[str, str], tokens: int) -> torch.Tensor:
    """The first tokens of every held-out text, ``[sequences, LENGTH]``."""
    rows = []
    for text in texts.values():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0, :tokens]
        rows.append(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))
    return torch.cat(rows)


def tables(model: Any) -> torch.Tensor:
    """Every layer's assignments, ``[layers, vocabulary, top_k]``."""
    return torch.stack([router.assignment for router in stable_routers(model)])


def count(model: Any, rows: torch.Tensor) -> None:
    """Fill the tables of a linearly routing model with what a router chose most often for each id, without descent."""
    for router, heard in zip(stable_routers(model), hear(model, rows, 8), strict=True):
        value = heard.logits.softmax(-1).gather(-1, heard.linear)
        vocabulary, experts = len(router.assignment), heard.logits.shape[1]
        router.assignment.copy_(assignment(heard.ids, TokenRouting(heard.linear, value), experts, vocabulary))


def show(title: str, found: list[dict[str, Any]]) -> None:
    """What `agreement` says, a layer a row.

    ``seen``: share of tokens whose id has been; then the overlap with the router's top-k and with its first expert, of
    these tokens, of the student's choice for the others, and of all with the fall-back; and the entropies of the load.
    """
    groups = ("seen", "unseen", "all")
    columns = [f"{group}, {what}" for group in groups for what in ("k", "1")]
    table = Table(["layer", "seen", *columns, "load, linear", "load"], [])
    for layer, row in enumerate(found):
        cells = [f"{row['assigned']:.4f}"]
        for name in groups:
            one = row[name]
            cells += ["", ""] if one is None else [f"{one['agreement']:.3f}", f"{one['agreement_first']:.3f}"]
        cells += [f"{row['all']['load_entropy_linear']:.3f}", f"{row['all']['load_entropy']:.3f}"]
        table.rows.append([str(layer), *cells])
    print("", title, "", *table.markdown(numbers=True), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=["tiny", "tiny-deepseek"])
    parser.add_argument("--steps", type=int, default=200, help="of the optimiser, in either stage")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} tokens a step")
    parser.add_argument("--tokens", type=int, default=262144, help="of calibration text that is trained on")
    parser.add_argument("--held-out", type=int, default=8192, help="tokens of each held-out text")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--student-learning-rate", type=float, default=0.01)
    parser.add_argument("--width", type=int, default=50)
    parser.add_argument("--balance", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    folder = local_folder(options.model)
    assert folder is not None
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    patch_classes(model, {"merge": "residual", "method": "smoe", "routing": "stable"})
    texts = held_out_texts()
    held_out = held_out_rows(tokenizer, texts, options.held_out)
    rows = calibration_text("packaged", tokenizer, options.tokens, LENGTH, options.seed).ids

    scores = Table(["", *texts, "mean", "exact"], [])

    def score(name: str, model: Any = model) -> None:
        found = perplexities(model, tokenizer, texts, options.held_out)
        right = sum(exact_answers(model, tokenizer, held_out_problems()))
        scores.rows.append([name, *(f"{found[domain]:.2f}" for domain in (*texts, "mean")), str(right)])

    score("before, linear")
    control = copy.deepcopy(model)
    for stage in (1, 2):
        train(Trainer, control, rows, options)
        score(f"control, linear, {stage * options.steps} steps", control)
    terms = {"width": options.width, "balance": options.balance}
    rate = options.student_learning_rate
    train(StageOneTrainer, model, rows, options, student_learning_rate=rate, student=terms)
    score("after stage 1, linear")
    losses = {name: round(float(loss), 3) for name, loss in model.stable_student.losses.items()}
    count(model, rows)
    score("frozen by counting instead")
    counted = agreement(model, held_out)
    student = freeze(model)
    score("frozen")
    before = agreement(model, held_out, student)
    frozen = tables(model)
    train(Trainer, model, rows, options)
    score("after stage 2")
    after = agreement(model, held_out, student)

    print("", f"{options.model}: perplexity", "", *scores.markdown(numbers=True), sep="\n")
    print(f"losses of stage 1 at its end: {losses}; seen: {int(student.seen.sum())} of {len(student.seen)} ids")
    show("held-out text, frozen by counting instead", counted)
    show("held-out text, frozen", before)
    show("held-out text, after stage 2", after)
    same = torch.equal(frozen, tables(model))
    print(f"assignments changed in stage 2: {'none' if same else int((frozen != tables(model)).sum())}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
