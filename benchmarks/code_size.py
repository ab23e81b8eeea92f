"""Lines of Python code without comments, docstrings and blank lines: ``python benchmarks/code_size.py [CHECKOUT]``.

A line of a string that goes over several lines counts. The package is listed by room, the rest by top folder.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


def code_lines(source: str) -> int:
    """Lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1])
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, check=True, capture_output=True, text=True).stdout
    count: Counter[str] = Counter()
    for file in map(Path, listed.split()):
        lines = code_lines((root / file).read_text("utf-8"))
        if file.parts[0] == "namex_hf":
            count["package"] += lines
            count["  " + (f"namex_hf/{file.parts[1]}/" if len(file.parts) > 2 else "namex_hf/*.py")] += lines
        else:
            count[f"{file.parts[0]}/"] += lines
        count["all outside tests/"] += lines if file.parts[0] != "tests" else 0
    for name, lines in sorted(count.items(), key=lambda pair: (not pair[0].startswith(" "), pair[0])):
        print(f"{name:26}{lines:7,}")


if __name__ == "__main__":
    main()
