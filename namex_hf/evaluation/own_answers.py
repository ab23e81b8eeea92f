"""A model's own answers in the chats of a set, as calibration text: what it says, not what others say in its place."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibration.chats import Turns
from ..errors import OutputError
from ..families.family import context_of
from ..files import LARGEST_TEXT, parse_json, read_bytes, write_bytes
from ..progress import ProgressCallback, ProgressEvent, no_progress
from .generation import as_chat, generated_answers


@dataclass(frozen=True)
class AnswerChoices:
    """What determines the answers, beside the machine."""

    model: str
    """Fingerprint of the checkpoint."""
    chats: str
    """Hash of the set."""
    answer_tokens: int
    temperature: float | None
    """None: greedy."""
    seed: int
    batch: int
    """Chats that are answered together."""

    @property
    def mark(self) -> str:
        """Of every line of a file of answers."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def hash_of(chats: Sequence[Turns]) -> str:
    return hashlib.sha256(json.dumps(chats).encode()).hexdigest()


@dataclass
class AnswerFile:
    """A ``.jsonl`` file with a chat a line, which `calibration_data` takes; it grows with every batch."""

    path: Path
    choices: AnswerChoices

    def read(self, total: int) -> list[Turns]:
        """The chats so far: whole batches, without what a kill has cut, which is taken away.

        Args:
            total: chats of the set.

        Raises:
            OutputError: the file is of another model, set or choice.
        """
        if not self.path.exists():
            return []
        lines, records = self._records()
        if any(not isinstance(one, dict) or one.get("choices") != self.choices.mark for one in records):
            raise OutputError(
                f"{self.path} is of another model, other chats or other choices; accepted: a new file, or --overwrite"
            )
        whole = len(lines) if len(lines) == total else len(lines) // self.choices.batch * self.choices.batch
        write_bytes(self.path, b"".join(line + b"\n" for line in lines[:whole]))
        return [one["messages"] for one in records[:whole]]

    def begin_anew(self) -> None:
        """Remove the file.

        Raises:
            OutputError: it is no file of answers.
        """
        if not self.path.exists():
            return
        if any(not isinstance(one, dict) or "choices" not in one for one in self._records()[1]):
            raise OutputError(
                f"{self.path} is no file of namex answers, so it is not overwritten; accepted: a new file"
            )
        self.path.unlink()

    def _records(self) -> tuple[list[bytes], list[Any]]:
        """Whole lines, and what they hold; the last one may have been cut."""
        lines = read_bytes(self.path, OutputError, LARGEST_TEXT).split(b"\n")[:-1]
        return lines, [parse_json(line, f"{self.path}, line {n}", OutputError) for n, line in enumerate(lines, 1)]

    def add(self, chats: Sequence[Turns]) -> None:
        lines = (json.dumps({"messages": chat, "choices": self.choices.mark}, ensure_ascii=False) for chat in chats)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


def write_answers(
    model: Any,
    tokenizer: Any,
    chats: Sequence[Turns],
    file: AnswerFile,
    tokens: int,
    progress: ProgressCallback = no_progress,
) -> int:
    """Answer chats until the file holds enough tokens, or the set is at its end; returns how many tokens it holds.

    A file that was begun is continued: batches are the same then, and so are the answers.

    Args:
        model: of transformers, on its device.
        tokens: of the chats as the tokenizer's template writes them.

    Raises:
        OutputError: the file is of another model, set or choice.
        CheckpointError: the chat template fails.
    """
    done = file.read(len(chats))
    count = sum(_length(chat, tokenizer) for chat in done)
    progress(ProgressEvent("answers", done=min(count, tokens), total=tokens, resumed=True))
    for start in range(len(done), len(chats), file.choices.batch):
        if count >= tokens:
            break
        answered = own_answers(model, tokenizer, chats[start : start + file.choices.batch], file.choices, start)
        file.add(answered)
        count += sum(_length(chat, tokenizer) for chat in answered)
        progress(ProgressEvent("answers", done=min(count, tokens), total=tokens))
    return count


def own_answers(
    model: Any, tokenizer: Any, chats: Sequence[Turns], choices: AnswerChoices, start: int = 0
) -> list[Turns]:
    """The chats with the model's own answers in the place of the assistant's, turn after turn. A chat ends where the
    model's context has no room for another answer.

    Args:
        start: the number of the first chat, for the seed of what is drawn.
    """
    torch.manual_seed(choices.seed + start)
    found: list[Turns] = [[] for _ in chats]
    going, longest = list(zip(chats, found, strict=True)), context_of(model.config.to_dict())
    for place in range(max(map(len, chats))):
        waits = []
        for chat, own in list(going):
            if place >= len(chat):
                continue
            if chat[place]["role"] != "assistant":
                own.append(chat[place])
            elif longest is None or _length(own, tokenizer) + choices.answer_tokens <= longest:
                waits.append(own)
            else:
                going.remove((chat, own))
        prompts = [as_chat(tokenizer, [(turn["role"], turn["content"]) for turn in own]) for own in waits]
        answers = generated_answers(
            model, tokenizer, prompts, choices.answer_tokens, choices.batch, chat=True, temperature=choices.temperature
        )
        for own, answer in zip(waits, answers, strict=True):
            own.append({"role": "assistant", "content": answer.text})
    return found


def _length(chat: Turns, tokenizer: Any) -> int:
    text = as_chat(tokenizer, [(turn["role"], turn["content"]) for turn in chat])
    return len(tokenizer(text, add_special_tokens=False).input_ids)
