"""The calibration text of a recipe, in the words of a model's tokenizer."""

from typing import Any

from transformers import AutoTokenizer

from ..calibration.sources import check_source
from ..calibration.text import CalibrationText, calibration_text
from ..checkpoint.companions import has_tokenizer
from ..checkpoint.source import Checkpoint
from ..errors import CalibrationError
from ..families import Config
from ..recipe import Grouped, Recipe

LENGTH = 512  # tokens of a sequence, where the model reads so many
ACCEPTED = "this recipe reads calibration text; accepted: a checkpoint with its tokenizer, or a recipe without text"


def measures(recipe: Recipe) -> bool:
    """Whether some of the text is held out, to choose or to measure on."""
    return isinstance(recipe.merge, Grouped) or recipe.routing.kind == "stable"


def check_text(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """What can be said without reading: that there is a text, and a tokenizer.

    Raises:
        CalibrationError: there is none.
    """
    check_source(recipe.calibration.data)
    if not has_tokenizer(checkpoint.folder):  # transformers may make an empty one up
        raise CalibrationError(f"{checkpoint.name} has no tokenizer, and {ACCEPTED}")


def text_of(recipe: Recipe, checkpoint: Checkpoint) -> CalibrationText:
    """Read the text that a recipe names. No code of others is run for the tokenizer.

    Raises:
        CalibrationError: the model has no tokenizer, or the text cannot be had.
    """
    check_text(recipe, checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # whatever a foreign tokenizer raises
        raise CalibrationError(
            f"{checkpoint.name} has no tokenizer that transformers can open ({type(error).__name__}), and {ACCEPTED}"
        ) from error
    return text_for(recipe, checkpoint.config, tokenizer)


def text_for(recipe: Recipe, config: Config, tokenizer: Any) -> CalibrationText:
    """`text_of`, with the tokenizer at hand.

    Raises:
        CalibrationError: the text cannot be had, or is too short for some of it to be held back.
    """
    longest = config.get("max_position_embeddings")
    tokens = recipe.calibration.tokens
    length = min(LENGTH, longest if isinstance(longest, int) else LENGTH, tokens)
    text = calibration_text(recipe.calibration.data, tokenizer, tokens, length, recipe.seed)
    if measures(recipe):
        _ = text.held_out  # complains now, not when a fit asks for it
    return text
