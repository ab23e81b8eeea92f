"""Write the packaged calibration text, of the training split alone: ``python packaged/make_calibration.py``."""

import argparse
import json
import random
from pathlib import Path

import corpora
import data

CALIBRATION_BYTES = 260_000  # of each domain


def chats(folder: Path, size: int) -> list[str]:
    """Conversations in a fixed random order, one JSON object each, at most ``size`` bytes with their line ends."""
    conversations = list(corpora.conversations(folder))
    random.Random(0).shuffle(conversations)
    chosen, held = [], 0
    for messages in conversations:
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        if held + len(line.encode()) < size:
            chosen.append(line)
            held += len(line.encode()) + 1
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("packaged/work"), help="where the sources are or will be")
    parser.add_argument("--out", type=Path, default=Path("namex_hf/packaged/calibration"))
    arguments = parser.parse_args()
    sources = arguments.work / "sources"
    corpora.fetch(sources)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, read in corpora.DOMAINS.items():
        documents = [text for text, is_held_out in read(sources) if not is_held_out]
        (arguments.out / f"{name}.txt").write_text(data.openings(documents, CALIBRATION_BYTES), "utf-8")
    (arguments.out / "chat.jsonl").write_text("\n".join(chats(sources, CALIBRATION_BYTES)) + "\n", "utf-8")


if __name__ == "__main__":
    main()
