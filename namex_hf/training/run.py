"""A command line of fine-tuning, carried out: what is trained, on what, and beside what."""

from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoint.layout import left_out_line
from ..errors import UsageError
from ..evaluation.statistics import MEASURES, difference, value
from ..evaluation.table import Table
from ..printable import marked
from ..recipe import Recipe
from ..resources import recipe_path
from .arguments import COMPARED, NamexArguments, TrainingArguments, set_length
from .chats import check_template, load_chats
from .plan import Choice, measures_for
from .rivals import left_out, rival
from .scores import verdict
from .start import Start, dtype_of, start_from
from .tune import scores_of, tune


def run(asked: NamexArguments, training: TrainingArguments) -> None:
    """Train the model and what is compared with it, each into its folder, and print the scores."""
    assert asked.model_name_or_path is not None, "`read` refuses arguments without a model"
    assert training.output_dir is not None, "`read` refuses arguments without a folder"
    console = Console(stderr=True, quiet=training.process_index != 0)
    recipe = Recipe.from_yaml(recipe_path(asked.recipe)) if asked.recipe else None
    start = start_from(asked.model_name_or_path, asked.model_revision, recipe)
    if line := left_out_line(start.left_out):
        console.print(line, soft_wrap=True, markup=False)
    method = start.recipe.merge.method
    _check_compared(asked, start)
    set_length(training, start.context)
    if training.chat_template_path is None:
        check_template(start.tokenizer(), start.checkpoint.name)
    splits = asked.dataset_train_split, asked.dataset_test_split
    seed = training.seed if training.data_seed is None else training.data_seed
    chats = load_chats(asked.dataset_name, asked.dataset_config, splits, asked.held_out, seed)
    choice = choice_of(asked, training, start)

    out = Path(training.output_dir)
    runs = {str(method): (start, out)}
    for name in asked.compare:
        other = rival(start.recipe, COMPARED[name])
        runs[name] = start_from(asked.model_name_or_path, asked.model_revision, other), out / "compare" / name
        console.print(rival_line(name, start.recipe, other), soft_wrap=True, markup=False)
    for name, (one, folder) in runs.items():
        console.rule(marked(f"{name}: {folder}"))
        tune(one, chats, training, choice, folder, console, asked.overwrite)
    if training.process_index == 0:
        tell(Console(), {name: folder for name, (_, folder) in runs.items()}, choice.measures)


def _check_compared(asked: NamexArguments, start: Start) -> None:
    """Raises:
    UsageError: a run that nothing can stand beside.
    """
    if asked.compare and start.patched:
        raise UsageError(f"--compare begins with a stock checkpoint; {start.checkpoint.name} is patched already")
    method = start.recipe.merge.method
    if method in [COMPARED[name] for name in asked.compare]:
        raise UsageError(f"--compare {' '.join(asked.compare)}: the recipe's method is {method} itself")


def choice_of(asked: NamexArguments, training: TrainingArguments, start: Start) -> Choice:
    """What trains, how, and what is measured."""
    lora = {"rank": asked.lora_r, "alpha": asked.lora_alpha, "dropout": asked.lora_dropout}
    adapter = lora if asked.use_peft else None
    options: dict[str, Any] = {"dtype": dtype_of(asked.dtype), **(training.model_init_kwargs or {})}  # type: ignore[dict-item]
    if asked.attn_implementation:
        options["attn_implementation"] = asked.attn_implementation
    measures = measures_for(start.checkpoint.size, asked.scores)
    live, stage_one = asked.propagation == "live", asked.stable_stage == 1
    return Choice(tuple(asked.train_kinds), adapter, asked.bargain_every, measures, options, live, stage_one)


def rival_line(name: str, recipe: Recipe, other: Recipe) -> str:
    """What a rival's recipe has in common with the trained one, and what it lacks."""
    merge, routing = other.merge, other.routing
    sharp = f", temperature {routing.temperature}" if routing.temperature else ""
    gone = ", ".join(f"{field}: {value}" for field, value in left_out(recipe, other).items())
    without = f"; without {gone}, which it does not have" if gone else ""
    return f"{name}: method {merge.method}, merge {merge.kind}, routing {routing.kind}{sharp}{without}"


def tell(console: Console, folders: dict[str, Path], measures: tuple[str, ...]) -> None:
    """Scores before and after, and a sentence on every comparison."""
    items = {name: scores_of(folder) for name, folder in folders.items()}
    if not all(items.values()):
        return
    table = Table(["", *("problems, %" if name == "problems" else f"{name}, perplexity" for name in measures)], [])
    for name, found in items.items():
        cells = [" -> ".join(f"{value(m, found[when][m]):.2f}" for when in ("before", "after")) for m in measures]
        table.rows.append([name, *cells])
    console.print(table.screen("before -> after"))
    for name in measures:
        console.print(f"{name}: {MEASURES[name]}", soft_wrap=True)
    main_run, *rivals = items
    for one in rivals:
        after, other = items[main_run]["after"], items[one]["after"]
        apart = {name: difference(name, after[name], other[name]) for name in measures}
        console.print(verdict(main_run, one, apart), soft_wrap=True)
    console.print(f"the model: {marked(folders[main_run])}", soft_wrap=True)
