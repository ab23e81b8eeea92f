"""Runs commands in one process whose environment says where the Hub is: a JSON list of arguments a line, answers alike.

The libraries read that environment when they are imported, so a test cannot change it in its own process.
"""

import json
import os
import sys
import tempfile

from namex_hf import cli

COMMANDS = {"namex-patch": cli.patch, "namex-inspect": cli.inspect}


def answer(name: str, *arguments: str) -> dict[str, object]:
    """Run a command with its output, down to the file descriptors, in two temporary files."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            status = COMMANDS[name](arguments)
        except SystemExit as ended:
            status = ended.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
        out.seek(0), err.seek(0)
        return {"status": status, "out": out.read(), "err": err.read()}


for line in sys.stdin:
    print(json.dumps(answer(*json.loads(line))), flush=True)
