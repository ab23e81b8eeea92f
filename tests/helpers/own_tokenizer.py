"""A tokenizer whose class comes as code with the model, in two files; both leave a mark where they are run."""

import json
from pathlib import Path

from tests.helpers.toy_models import VOCAB

MARK = "RAN_FOREIGN_CODE"
"""Environment variable: path of the file that the code makes when it is run."""
RUN = f"import os, pathlib\npathlib.Path(os.environ[{MARK!r}]).touch()\n"
CODE = (
    RUN
    + """
from transformers import PreTrainedTokenizer
from .pieces_own import read_pieces


class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "vocab.txt"}

    def __init__(self, vocab_file, **options):
        self.pieces = read_pieces(vocab_file)
        super().__init__(unk_token="w0", **options)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return dict(self.pieces)

    def _tokenize(self, text, **options):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.pieces.get(token, 0)

    def _convert_id_to_token(self, index):
        return f"w{index}"
"""
)
PIECES = (
    RUN
    + """
def read_pieces(path):
    with open(path, encoding="utf-8") as file:
        return {line.strip(): number for number, line in enumerate(file)}
"""
)
FILES = ("tokenization_own.py", "pieces_own.py")


def add_own_tokenizer(folder: Path) -> Path:
    """Of the words ``w0`` ...; returns the folder."""
    (folder / "vocab.txt").write_text("".join(f"w{number}\n" for number in range(VOCAB)))
    for name, text in zip(FILES, (CODE, PIECES), strict=True):
        (folder / name).write_text(text)
    settings = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
