"""Bring packaged models into the form in which they are published: ``python packaged/save.py`` (or folders).

    python packaged/save.py namex_hf/packaged/tiny namex_hf/packaged/tiny-deepseek

No number changes. Embedding and head become two tensors, an index is written, the configuration states the rotary
embedding in both forms and the number of experts under the name that the Hub's models have, and a DeepSeek-MoE gets the
code that opens it, as the published DeepSeek-MoE has. To be called
again whenever that code changes: `tests/packaged/test_published.py` compares.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from namex_hf.checkpoint.header import read_header
from namex_hf.checkpoint.resolve import PACKAGED, packaged_models
from namex_hf.checkpoint.shard import write_index
from namex_hf.families import family_of
from namex_hf.files import CONFIG, SINGLE, read_json, write_text
from namex_hf.patching.live import fit_for_others


def publish(model: PreTrainedModel, out: Path) -> None:
    """Save a model; transformers adds the code of a class that is not its own."""
    family = family_of(model.config.to_dict())
    fit_for_others(model, family)
    model.save_pretrained(out)
    config = read_json(out / CONFIG)
    named = dict.fromkeys(family.names(family.experts_field), family.experts_field)
    write_text(out / CONFIG, json.dumps({named.get(name, name): config[name] for name in config}, indent=2) + "\n")
    (out / SINGLE).chmod(0o644)  # the library leaves it to the owner alone, and a wheel takes that along
    spans = read_header(out / SINGLE)
    write_index(out, dict.fromkeys(spans, SINGLE), sum(span.size for span in spans.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [PACKAGED / name for name in packaged_models()]
    parser.add_argument("folders", nargs="*", type=Path, default=everything, help="default: all packaged models")
    for folder in parser.parse_args().folders:
        publish(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), folder)


if __name__ == "__main__":
    main()
