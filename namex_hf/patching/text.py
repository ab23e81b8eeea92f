"""The calibration text of a recipe, in the words of a model's tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..calibration.sources import Texts, check_source, check_texts, is_token_ids
from ..calibration.text import CalibrationText, calibration_text
from ..calibration.token_ids import open_ids, text_of_ids
from ..checkpoint.source import Checkpoint
from ..checkpoint.tokenizer_code import lack_of_tokenizer
from ..errors import CalibrationError, RecipeError
from ..families import Config
from ..families.family import context_of
from ..recipe import Narrow, Recipe

LENGTH = 512  # tokens of a sequence, where the model reads so many
ACCEPTED = (
    "this recipe reads calibration text; accepted: a checkpoint with its tokenizer, a recipe without text, or token "
    "ids in place of text (--calibration-data ids.npy)"
)


def measures(recipe: Recipe) -> bool:
    """Whether some of the text is held out, to choose or to measure on."""
    merge = recipe.merge
    fits = merge.fit.kind != "none" if isinstance(merge, Narrow) else merge.rewrites
    return fits or recipe.routing.kind == "stable"


def check_own(recipe: Recipe, texts: Texts | None) -> None:
    """Raises:
    RecipeError: there are texts, and the recipe reads none, or names others.
    """
    if texts is None:
        return
    if not recipe.needs_text:
        raise RecipeError("this recipe reads no text; accepted with texts: one that does, such as Recipe(keep=0.5)")
    if (data := recipe.calibration.data) != "packaged":
        raise RecipeError(f"recipe field 'calibration_data' is {data!r}; accepted beside texts: no value")


def check_text(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """What can be said without reading: that there is a text, and a tokenizer; of token ids what their header says.

    Raises:
        CalibrationError: there is none.
    """
    check_source(recipe.calibration.data)
    if is_token_ids(recipe.calibration.data):
        open_ids(Path(recipe.calibration.data), recipe.calibration.tokens)
    elif lack := lack_of_tokenizer(checkpoint.folder):  # transformers may make an empty one up
        raise CalibrationError(f"{checkpoint.name} has {lack}, and {ACCEPTED}")


def text_of(recipe: Recipe, checkpoint: Checkpoint, texts: Texts | None = None) -> CalibrationText:
    """Read the text that a recipe names, or texts in its place.

    No code of others is run for the tokenizer, which token ids do not need.

    Raises:
        CalibrationError: the model has no tokenizer, or the text cannot be had.
    """
    check_text(recipe, checkpoint)
    if is_token_ids(recipe.calibration.data):
        return text_for(recipe, checkpoint.config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # whatever a foreign tokenizer raises
        raise CalibrationError(
            f"{checkpoint.name} has no tokenizer that transformers can open ({type(error).__name__}), and {ACCEPTED}"
        ) from error
    return text_for(recipe, checkpoint.config, tokenizer, texts)


def text_for(recipe: Recipe, config: Config, tokenizer: Any = None, texts: Texts | None = None) -> CalibrationText:
    """`text_of`, with the tokenizer at hand; None where the recipe names token ids.

    Raises:
        CalibrationError: the text cannot be had, or is too short for some of it to be held back.
    """
    tokens = recipe.calibration.tokens
    length = min(LENGTH, context_of(config) or LENGTH, tokens)
    data, seed = recipe.calibration.data, recipe.seed
    if is_token_ids(data):
        text = text_of_ids(Path(data), _vocabulary(config), tokens, length, seed)
    elif tokenizer is None:
        needs = "tokenizer=, or a recipe with token ids in place of text (calibration_data: ids.npy)"
        raise CalibrationError(f"this recipe reads calibration text: patch_model needs {needs}")
    else:
        source = data if texts is None else check_texts(texts)
        text = calibration_text(source, tokenizer, tokens, length, seed)
    if measures(recipe):
        _ = text.held_out  # complains now, not when a fit asks for it
    return text


def _vocabulary(config: Config) -> int:
    size = config.get("vocab_size")
    if not isinstance(size, int):
        raise CalibrationError(f"config.json: vocab_size is {size!r}; token ids need the number of the model's tokens")
    return size
