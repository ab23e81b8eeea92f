"""What all commands share: how a program begins and ends, its parser, sizes in bytes.

Bad input, too little memory and Ctrl-C are answered in one line.

Imported before anything that takes its time: from its import on Ctrl-C ends a program of ours at once, until `ended`
runs the program itself.
"""

import argparse
import errno
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ..errors import NamexError
from ..printable import did_you_mean, printable
from ..resources import packaged_models
from ..version import __version__

PROGRAMS = re.compile(
    r".*/(?:namex(?:-(?:patch|inspect|push|report|compare))?|namex_hf/__main__\.py"
    r"|finetune/(?:sft_smoltalk|pretrain|memory)\.py|eval/(?:zero_shot|make_local_gsm8k)\.py)"
)
MEMORY = re.compile(
    r"can(?:not|'t) allocate memory|not enough memory|out of memory|failed to map segment|std::bad_alloc", re.IGNORECASE
)
"""How the system and the libraries say that there was none."""
SPINS = "10000"
"""On a machine with three times as many processes as cores 50 s in place of over 158 (docs/benchmarks.md)."""
INTERRUPTED = 128 + signal.SIGINT
GOES_ON = "stopped; the same command goes on from here"
MODEL_HELP = f"a local folder, a packaged model ({', '.join(packaged_models())}), or a Hub id USER/NAME"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every error here, and names the option that was probably meant."""

    brief: dict[str, str | None]
    """What ``--help`` shows: destinations of options with their help there, None for the whole help. Empty: all."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.brief = {}
        super().__init__(*arguments, **settings)

    @property
    def options(self) -> dict[str, argparse.Action]:
        """By flag, such as ``--out``."""
        return self._option_string_actions

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            hint = did_you_mean(rest[0].partition("=")[0], self.options)
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for text in sys.argv[1:] if args is None else args:
            if "\0" in text:
                self.error(f"argument {text}: it has a NUL in it")
            try:
                text.encode()
            except UnicodeEncodeError:
                self.error(f"argument {text}: it is not UTF-8")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {printable(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def format_help(self, everything: bool = False) -> str:
        if everything or not self.brief:
            return super().format_help()
        whole = [(action, action.help) for action in self._actions]
        for action, text in whole:
            action.help = self.brief.get(action.dest, argparse.SUPPRESS) or text
        try:
            return super().format_help()
        finally:
            for action, text in whole:
                action.help = text


class HelpAll(argparse.Action):
    """Print every option and end, as ``--help`` does with the common ones."""

    def __call__(self, parser: Any, *_: object) -> None:
        print(parser.format_help(everything=True), end="")
        parser.exit()


def command_parser(
    prog: str, description: str, examples: Sequence[str] = (), usage: str | None = None, brief: Sequence[str] = ()
) -> Parser:
    """A parser with what all commands have.

    Args:
        examples: arguments after the program's name.
        usage: the same, in place of a list of all options.
        brief: destinations of the options that ``--help`` shows (default: all).
    """
    parser = Parser(
        prog=prog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
        usage=usage and f"{prog} {usage}",
        epilog="\n".join(["examples:", *(f"  {prog} {example}" for example in examples)]) if examples else None,
    )
    parser.add_argument("--version", action="version", version=f"namex_hf {__version__}")
    if brief:
        parser.brief = dict.fromkeys(("help", "help_all", "version", *brief))
        parser.add_argument("--help-all", action=HelpAll, nargs=0, help="show every option and exit")
    return parser


def print_json(value: Any) -> None:
    """Print plain values, and dataclasses of these, for another program."""
    print(json.dumps(value, indent=1, default=asdict))


def run(parser: Parser, arguments: Sequence[str] | None, command: Callable[[argparse.Namespace], int]) -> int:
    """Parse and carry a command out; returns the exit status."""
    options = parser.parse_args(arguments)
    return ended(parser.prog, lambda: command(options))


def ended(
    prog: str,
    command: Callable[[], int | None],
    goes_on: str = GOES_ON,
    more: type[Exception] | tuple[type[Exception], ...] = OSError,
) -> int:
    """Run a program; returns its exit status.

    Args:
        prog: its name, before what is printed.
        command: returns the status; None counts as 0.
        goes_on: printed after Ctrl-C or SIGTERM.
        more: other kinds of errors that have their reason in what was given.
    """
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.excepthook is _unexpected:
        sys.excepthook = sys.__excepthook__
    if _ours():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends before it kills
    try:
        return command() or 0
    except KeyboardInterrupt:
        print(f"{prog}: {goes_on}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        text = of_memory(error) or (message(error) if isinstance(error, (NamexError, OSError, more)) else None)
        if text is None:
            raise
        print(f"{prog}: error: {text}", file=sys.stderr)
        return 2


def message(error: Exception) -> str:
    """What went wrong, in one line; of the system's errors the file and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return printable(f"{error.filename}: {error.strerror}")
    return printable(error)


def of_memory(error: BaseException) -> str | None:
    """The line for an error that means too little memory; None for all others."""
    text = " ".join(str(error).split())
    none_left = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not none_left and not (isinstance(error, (RuntimeError, ImportError, OSError)) and MEMORY.search(text)):
        return None
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return printable(f"too little memory, or too little address space (ulimit -v): {what}", 500)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{_name()}: stopped\n".encode())
    os._exit(INTERRUPTED)  # nothing has begun; an exception would go through the imports of others


def _name() -> str:
    return Path(sys.argv[0]).name if sys.argv else ""


def _unexpected(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    text = of_memory(error)
    if text is None:
        sys.__excepthook__(kind, error, trace)
        return
    os.write(2, f"{_name()}: error: {text}\n".encode())
    os._exit(2)


def _begin() -> None:
    """Answer Ctrl-C and too little memory while the libraries are imported, which takes seconds."""
    if not _ours():
        return
    sys.excepthook = _unexpected
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _ours() -> bool:
    """Whether this is the main thread of one of our programs."""
    path = str(Path(sys.argv[0]).absolute()) if sys.argv else ""
    process = sys.modules.get("multiprocessing.process")  # which every child of a program has imported
    child = process is not None and process.parent_process() is not None
    main = threading.current_thread() is threading.main_thread()
    return PROGRAMS.fullmatch(path) is not None and not child and main


@contextmanager
def loading() -> Iterator[None]:
    """Within `ended`: while a command imports its libraries, Ctrl-C and too little memory end the program at once.

    Threads of torch wait for each other for a short time only, unless the environment says otherwise: on a busy machine
    they would take the processor from those that they wait for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    ours = _ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        import torch  # noqa: F401  (the first: where there is too little memory, others abort the process)

        yield
    except Exception as error:
        if ours and of_memory(error):
            _unexpected(type(error), error, None)  # which ends the process; half a library aborts in an ordinary end
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


_begin()
