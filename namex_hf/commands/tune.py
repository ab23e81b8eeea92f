"""``namex tune``: fine-tune a model on chats, with TRL."""

import sys
import warnings
from collections.abc import Sequence

from ..errors import MissingExtraError
from ..version import __version__
from .common import ended, loading

DESCRIPTION = """\
Fine-tune a merged Mixture-of-Experts model on chats, with TRL.

With nothing but --out it works offline: the packaged model `tiny` on the packaged chats, NAMEx-Full beside the
original and EP-CAMEx at equal steps and seeds. A run that was killed is continued by the same command.

    namex tune --out out/tuned
    namex tune out/patched --out out/sft \\
        --dataset_name HuggingFaceTB/smoltalk --dataset_config all --use_peft --train_kinds experts router base

docs/training.md has the commands for sharded training, what trains and what it costs. Every option of TRL's SFTConfig
is there too, below ours.
"""
GOES_ON = "stopped; the same command goes on from the last checkpoint"


def main(arguments: Sequence[str] | None = None, prog: str = "namex tune") -> int:
    """Entry point of ``namex tune``, and of ``finetune/sft_smoltalk.py``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"namex_hf {__version__}")
        raise SystemExit(0)
    answered = (ValueError, ImportError)  # by transformers and TRL, of arguments and of libraries that these need
    return ended(prog, lambda: _tune(words, prog), GOES_ON, answered)


def _tune(words: Sequence[str], prog: str) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl")
    with loading():
        try:
            from transformers.utils import logging

            from ..training.arguments import read
            from ..training.run import run
        except ImportError as missing:
            raise MissingExtraError(f"fine-tuning ({missing})", "train") from missing
    logging.set_verbosity_error()
    run(*read(words, prog, DESCRIPTION))
