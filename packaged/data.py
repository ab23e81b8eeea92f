"""Corpora to token streams: the tokenizer, the chat template, the batches."""

import random
from collections.abc import Iterator
from pathlib import Path

import corpora
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{- message['content'] + '<|im_end|>' -}}{% endgeneration %}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# Shares of a training batch. Arithmetic and its chats are over-sampled: it is what generation is scored on.
SHARES = {"prose": 0.17, "dictionary": 0.17, "code": 0.16, "manual": 0.16, "arithmetic": 0.20, "chat": 0.14}
HELD_OUT_BYTES, DOCUMENT_BYTES = 130_000, 13_000


def build_tokenizer(folder: Path, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over an equal share of every domain's training text; digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(folder, 2_000_000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[TURN, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _sample(folder: Path, characters: int) -> Iterator[str]:
    for read in corpora.DOMAINS.values():
        texts = [text for text, held_out in read(folder) if not held_out]
        random.Random(0).shuffle(texts)
        left = characters
        for text in texts:
            if left > 0:
                yield text[:left]
                left -= len(text)


def streams(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """One long row of token ids a domain, documents in a fixed random order, each closed by the end token."""
    texts = {name: [t for t, held_out in read(folder) if not held_out] for name, read in corpora.DOMAINS.items()}
    texts["chat"] = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in corpora.conversations(folder)]
    rows = {}
    for name, documents in texts.items():
        random.Random(0).shuffle(documents)
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([text + END for text in documents])
        rows[name] = torch.from_numpy(np.concatenate([np.asarray(e.ids, dtype=np.int32) for e in encoded]))
    return rows


def batch(rows: dict[str, torch.Tensor], step: int, size: int, length: int, seed: int) -> torch.Tensor:
    """The ``[size, length]`` ids of one step: a function of the step alone, so that a killed run goes on exactly."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    names = list(SHARES)
    kinds = torch.multinomial(torch.tensor([SHARES[n] for n in names]), size, replacement=True, generator=draw)
    windows = []
    for kind in kinds.tolist():
        row = rows[names[kind]]
        start = int(torch.randint(0, len(row) - length, (), generator=draw))
        windows.append(row[start : start + length])
    return torch.stack(windows).long()


def openings(documents: list[str], size: int) -> str:
    """The openings of whole documents in a fixed random order, a blank line between them, at most ``size`` bytes."""
    random.Random(0).shuffle(documents)
    chosen, held = [], 0
    for document in documents:
        opening = document[:DOCUMENT_BYTES].rstrip()
        if held + len(opening.encode()) <= size:
            chosen.append(opening)
            held += len(opening.encode()) + 2
    return "\n\n".join(chosen) + "\n"


def held_out(folder: Path) -> dict[str, str]:
    """Held-out text of every domain, at most ``HELD_OUT_BYTES`` each."""
    return {
        name: openings([text for text, is_held_out in read(folder) if is_held_out], HELD_OUT_BYTES)
        for name, read in corpora.DOMAINS.items()
    }
