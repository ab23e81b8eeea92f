"""Runs commands in one process whose environment says where the Hub is: a JSON list of arguments a line, answers alike.

The libraries read that environment when they are imported, so a test cannot change it in its own process.
"""

import gc
import json
import os
import sys
import tempfile

import torch
from huggingface_hub import get_token, snapshot_download
from transformers import AutoModelForCausalLM

from namex_hf.commands import inspect, patch, push
from namex_hf.errors import NamexError


def token(arguments: tuple[str, ...]) -> int:
    """Be somebody else from here on: nobody without a token."""
    os.environ.pop("HF_TOKEN", None)
    if arguments:
        os.environ["HF_TOKEN"] = arguments[0]
    assert get_token() == (arguments[0] if arguments else None)
    return 0


def same(arguments: tuple[str, ...]) -> int:
    """Whether a repository, fetched anew, gives the logits of a folder, bit for bit."""
    repository, folder, *revision = arguments
    fetched = snapshot_download(repository, revision=revision[0] if revision else None)
    ids = torch.arange(200)[None]
    models = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) for place in (fetched, folder)]
    with torch.no_grad():
        return int(not torch.equal(*(model(input_ids=ids).logits for model in models)))


def scored(arguments: tuple[str, ...]) -> int:
    """Print the files of what ``eval/zero_shot.py`` would score."""
    from namex_hf.evaluation.candidates import resolve_model

    try:
        folder = resolve_model(*arguments).folder
    except NamexError as error:
        print(f"zero_shot.py: error: {error}", file=sys.stderr)
        return 2
    print(*sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), sep="\n")
    return 0


COMMANDS = {
    "namex-patch": patch.main,
    "namex-inspect": inspect.main,
    "namex-push": push.main,
    "token": token,
    "same": same,
    "scored": scored,
}


def answer(name: str, *arguments: str) -> dict[str, object]:
    """Run a command with its output, down to the file descriptors, in two temporary files."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            status = COMMANDS[name](arguments)
        except SystemExit as ended:
            status = ended.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
        out.seek(0), err.seek(0)
        return {"status": status, "out": out.read(), "err": err.read()}


gc.freeze()  # what has been imported is not searched for garbage again
for line in sys.stdin:
    print(json.dumps(answer(*json.loads(line))), flush=True)
