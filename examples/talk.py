"""Let a patched folder continue a prompt and answer a question: ``python examples/talk.py out/tiny``."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from namex_hf.evaluation.loading import without_balance_loss  # its package registers the patched model types

PROMPTS = (
    "It was in the beginning of the summer that Elizabeth",
    "Question: Anna has 14 apples. Anna buys 3 boxes with 6 apples in each box. How many apples does Anna have now?\n"
    "Answer:",
    'def read(self, path):\n    """',
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder, or a Hub id")
    parser.add_argument("--prompt", action="append", help="instead of the built-in ones; may be given several times")
    parser.add_argument("--tokens", type=int, default=60, help="most tokens to add (default: 60)")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    for prompt in arguments.prompt or PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with without_balance_loss(model):
            output = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False, repetition_penalty=1.1)
        print(f"\n--- {prompt}\n{tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
