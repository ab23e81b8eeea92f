"""``namex-patch`` and ``namex-compare`` with the game over losses.

    python experiments/loss_game/run.py patch MODEL --out DIR --recipe FILE ...
    python experiments/loss_game/run.py compare MODEL --out DIR --recipes FILE ...

The options are those of the two commands.
"""

import sys

from game import register

from namex_hf.commands.compare import main as compare
from namex_hf.commands.patch import main as patch

COMMANDS = {"patch": patch, "compare": compare}

register()  # also in the processes that `compare` starts, which import this file

if __name__ == "__main__":
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is None:
        print(f"{sys.argv[0]}: error: the first argument is patch or compare", file=sys.stderr)
        sys.exit(2)
    sys.exit(command(sys.argv[2:]))
