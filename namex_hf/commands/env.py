"""``namex env``: versions and devices, for a bug report."""

import argparse
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from ..version import __version__
from .common import Parser, command_parser, loading, print_json, run

REQUIREMENT = re.compile(r"""(?P<name>[\w.-]+).*?(?:;.*extra == ["'](?P<extra>[\w-]+)["'])?""", re.DOTALL)
NOT_INSTALLED = "not installed"


def main(arguments: Sequence[str] | None = None, prog: str = "namex-env") -> int:
    """Entry point of ``namex env``."""
    return run(parser_of(prog), arguments, _env)


def parser_of(prog: str = "namex env") -> Parser:
    parser = command_parser(prog, "Print versions and devices: what a bug report needs.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def environment() -> dict[str, Any]:
    """Versions, by name, of the package, of Python and of what the package and its extras require; devices."""
    with loading():
        import torch

    return {
        "namex_hf": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **required(),
        "torch": torch.__version__,  # with its build, which metadata may lack
        "devices": [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)", *_accelerators(torch)],
    }


def required() -> dict[str, Any]:
    """Installed versions of what the package requires, and under ``extras`` of what its extras do.

    They are those of the installed package's metadata; a folder on ``PYTHONPATH`` has none.
    """
    try:
        requirements = metadata.requires("namex-hf") or []
    except metadata.PackageNotFoundError:
        return {"requirements": "unknown: namex-hf is not installed"}
    packages: dict[str, str] = {}
    extras: dict[str, dict[str, str]] = {}
    for requirement in requirements:
        match = REQUIREMENT.fullmatch(requirement)
        if match is None or match["name"] == "namex-hf" or match["extra"] in ("all", "dev", "docs"):
            continue
        group = extras.setdefault(match["extra"], {}) if match["extra"] else packages
        group[match["name"]] = _version(match["name"])
    return {**packages, "extras": extras}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _accelerators(torch: Any) -> list[str]:
    cuda = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = [f"cuda:{number} ({one.name}, {one.total_memory >> 30} GiB)" for number, one in enumerate(cuda)]
    return names + (["mps"] if torch.backends.mps.is_available() else [])


def _env(options: argparse.Namespace) -> int:
    facts = environment()
    if options.json:
        print_json(facts)
        return 0
    devices, extras = facts.pop("devices"), facts.pop("extras", {})
    lines = {**facts, **{f"extra {name}": ", ".join(map(" ".join, group.items())) for name, group in extras.items()}}
    for name, value in [*lines.items(), *(("device", device) for device in devices)]:
        print(f"{name:<18}{value}")
    return 0
