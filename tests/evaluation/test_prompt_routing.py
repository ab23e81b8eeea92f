"""``routing_span: prompt``: what is scored is routed by its context alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, patch_checkpoint
from namex_hf.evaluation.language_model import NamexLM
from namex_hf.evaluation.prompt_routing import prompt_log_probabilities

CONTEXT = "Question: Anna has 12 apples and gives 3 to each of 2 friends. How many apples does Anna have left?\nAnswer:"
REST = " The friends get 2*3 = <<2*3=6>>6 apples.\nAnna has 12-6 = <<12-6=6>>6 apples left."


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prompt") / "model"
    patch_checkpoint("tiny", out, Recipe.from_dict({"merge": "soft", "routing_span": "prompt", "segment": 8}))
    return out


@pytest.fixture(scope="module")
def model(patched: Path):
    return AutoModelForCausalLM.from_pretrained(patched, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens(patched: Path) -> tuple[list[int], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(patched)
    return tokenizer(CONTEXT).input_ids, tokenizer(REST).input_ids


@torch.no_grad()
def by_hand(model, context: list[int], rest: list[int]) -> float:
    """The context as one pass, then a token at a time, as the model generates."""
    state = model(input_ids=torch.tensor([context]), use_cache=True)
    total = 0.0
    for token in rest:
        total += float(state.logits[0, -1].log_softmax(-1)[token])
        state = model(input_ids=torch.tensor([[token]]), past_key_values=state.past_key_values, use_cache=True)
    return total


def scored(model, *requests: tuple[list[int], list[int]]) -> list[float]:
    found = prompt_log_probabilities(model, [(None, *one) for one in requests], 1024, torch.device("cpu"))
    return [log_probability for log_probability, _ in found]


def test_it_is_what_generation_gives(model, tokens) -> None:
    context, rest = tokens
    requests = [(context, rest), (context[:7], rest[:5]), (context, rest[:1]), (context[3:], rest[2:])]
    # Of other lengths and with shared contexts in one batch.
    assert scored(model, *requests) == pytest.approx([by_hand(model, *one) for one in requests], abs=2e-3)


@torch.no_grad()
def test_the_continuation_does_not_route_itself(model, tokens) -> None:
    context, rest = tokens
    together = model(input_ids=torch.tensor([context + rest])).logits[0].log_softmax(-1)
    start = len(context) - 1
    under_all = sum(float(together[start + i, token]) for i, token in enumerate(rest))
    assert abs(scored(model, (context, rest))[0] - under_all) > 0.01


def test_later_tokens_do_not_matter(model, tokens) -> None:
    context, rest = tokens
    short, prefix = scored(model, (context, rest[:10])), scored(model, (context, rest[:9]))
    other = [*rest[:9], (rest[9] + 1) % 4096]
    assert scored(model, (context, other[:9])) == pytest.approx(prefix, abs=1e-6)
    # The tenth token's own probability is all that the longer score adds.
    assert short[0] < prefix[0]
    assert by_hand(model, context, rest[:10]) - by_hand(model, context, rest[:9]) == pytest.approx(
        short[0] - prefix[0], abs=2e-3
    )


def test_a_context_that_is_too_long_loses_its_beginning(model, tokens) -> None:
    context, rest = tokens
    found = prompt_log_probabilities(model, [(None, context, rest[:4])], 20, torch.device("cpu"))
    assert found[0][0] == pytest.approx(by_hand(model, context[-17:], rest[:4]), abs=2e-3)


def test_the_harness_takes_this_way(patched: Path, model, tokens) -> None:
    asked = NamexLM(str(patched), device="cpu", dtype="float32", batch_size=2)
    assert asked.routes_by_prompt
    requests = [(("a", "b"), *tokens), (("a", "c"), tokens[0], tokens[1][:1])]
    found = asked._loglikelihood_tokens(requests)
    assert [one for one, _ in found] == pytest.approx(scored(model, tokens, (tokens[0], tokens[1][:1])), abs=1e-3)
