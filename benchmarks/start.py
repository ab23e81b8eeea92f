"""How fast a command answers what needs no model: in seconds, and beside Python's own start with argparse and json.

``python benchmarks/start.py`` runs every command in turn, round by round, and prints the median of each. The bar is 12
times ``python -c "import argparse, json"``, and half a second.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time

BASE = "argparse, json"
BAR = 12
NAMEX = [sys.executable, "-m", "namex_hf"]
COMMANDS = {
    BASE: [sys.executable, "-c", "import argparse, json"],
    "namex --help": [*NAMEX, "--help"],
    "namex --version": [*NAMEX, "--version"],
    "namex patch --help": [*NAMEX, "patch", "--help"],
    "namex patch, a wrong option": [*NAMEX, "patch", "tiny", "--out", "out", "--metod", "namex"],
    "namex patch, a wrong value": [*NAMEX, "patch", "tiny", "--out", "out", "--method", "nash"],
    "namex recipes": [*NAMEX, "recipes"],
    "import namex_hf": [sys.executable, "-c", "import namex_hf"],
}
OTHER = "lm_eval --help"


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default: 15; three of lm_eval")
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, command in COMMANDS.items():
            taken = seconds(command)
            if number:  # the first round fills the caches
                times[name].append(taken)
    if lm_eval := shutil.which("lm_eval", path=str(sys.prefix) + "/bin") or shutil.which("lm_eval"):
        times[OTHER] = [seconds([lm_eval, "--help"]) for _ in range(3)]
    base = statistics.median(times[BASE])
    print(f"{'':<30}{'seconds':>8}{'ratio':>8}")
    for name, taken_by in times.items():
        median = statistics.median(taken_by)
        over = "" if name == OTHER or (median <= BAR * base and median < 0.5) else f"  above {BAR} or 0.5 s"
        print(f"{name:<30}{median:>8.3f}{median / base:>8.1f}{over}")


if __name__ == "__main__":
    main()
