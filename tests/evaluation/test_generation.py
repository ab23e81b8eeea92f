"""What is measured of an answer beside whether it is right."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from namex_hf.evaluation.generation import REPEATED, as_chat, generated_answers, has_loop


class Writes(torch.nn.Module):
    """A model that writes given answers, as `generate` returns them: ended rows are filled up."""

    device = torch.device("cpu")

    def __init__(self, rows: list[list[int]], ends: Any) -> None:
        super().__init__()
        self.rows, self.generation_config = rows, SimpleNamespace(eos_token_id=ends)

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, pad_token_id: int, **_: Any) -> torch.Tensor:
        width = max(map(len, self.rows))
        assert width <= max_new_tokens
        rows = [row + [pad_token_id] * (width - len(row)) for row in self.rows]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("several", [True, False])
def test_lengths_and_what_the_limit_cut(tokenizer: Any, several: bool):
    """One ends with its end token, one is cut; of a one-line answer only the line counts."""
    end = tokenizer.eos_token_id
    rows = [[*ids(tokenizer, "abc"), end], ids(tokenizer, "de\nfgh")]
    model = Writes(rows, [end, 7000] if several else end)
    ended, cut = generated_answers(model, tokenizer, ["a?", "b?"], len(rows[1]))
    assert (ended.text, ended.tokens, ended.cut) == ("abc", len(rows[0]) - 1, False)
    assert (cut.text, cut.tokens, cut.cut) == ("de\nfgh", len(rows[1]), True)
    ended, line = generated_answers(model, tokenizer, ["a?", "b?"], len(rows[1]), one_line=True)
    assert (ended.text, ended.tokens, ended.cut) == ("abc", len(rows[0]) - 1, False)
    assert (line.text, line.tokens, line.cut) == ("de", len(ids(tokenizer, "de")), False)


def test_a_line_ends_generation(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    """A real model stops where every answer has its line; without that it goes on to the limit."""
    (newline,) = ids(tokenizer, "\n")
    bias = torch.zeros(model.config.vocab_size)
    bias[newline] = 1e9
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits + bias)
    try:
        (short,) = generated_answers(model, tokenizer, ["abc"], 30, one_line=True)
        (long,) = generated_answers(model, tokenizer, ["abc"], 30)
    finally:
        hook.remove()
    assert (short.text, short.tokens, short.cut, short.loops) == ("", 0, False, False)
    assert (long.text, long.tokens, long.cut, long.loops) == ("\n" * 30, 30, True, True)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([5] * REPEATED, True),
        ([1, 2, 3, *[5] * REPEATED], True),
        ([5] * (REPEATED - 1), False),
        ([*[5] * REPEATED, 1], False),
        ([1, 2] * (REPEATED // 2), True),
        ([9, *[*range(10)] * 3], True),
        ([*range(10)] * 2 + [*range(9)], False),
        ([*range(40)] * 2, False),
        ([*range(200)], False),
        ([], False),
    ],
)
def test_loops(tokens: list[int], loops: bool):
    assert has_loop(tokens) is loops


def test_a_chat_ends_where_the_answer_begins(tokenizer: Any):
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert as_chat(tokenizer, [("system", "s"), ("user", "u")]) == "<system>s<user>u<assistant>"
