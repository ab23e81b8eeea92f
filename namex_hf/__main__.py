"""``python -m namex_hf`` is ``namex``."""

import sys

from .commands.namex import main

if __name__ == "__main__":
    sys.exit(main())
