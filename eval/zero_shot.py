"""Zero-shot scores of models and recipes, side by side: what ``namex score`` does. ``python eval/zero_shot.py --help``.

The tasks are lm-eval's and those of ``eval/tasks``; a folder of your own tasks is scored with lm-eval's command
(docs/evaluation.md). The parts are in `namex_hf/commands/score_screen.py`: `candidates` for the models, `load_tasks`
for the tasks, `ZeroShotRun` for the scores.
"""

import sys

from namex_hf.commands import score


def main() -> int:
    return score.main(sys.argv[1:], "zero_shot.py")


if __name__ == "__main__":
    sys.exit(main())
