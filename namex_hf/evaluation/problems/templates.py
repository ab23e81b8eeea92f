"""Word problems in the form of GSM8K, from templates of our own, with operands that are disjoint between splits.

GSM8K's form: a question, a worked answer with ``<<3*4=12>>`` calculator marks, and a last line ``#### 12``.
No sentence is taken from GSM8K.
"""

import random
import zlib
from collections.abc import Callable, Iterator

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olive Paul Rosa Sam Tina Walter"
ITEMS = "apples marbles stamps pencils cards books shells coins stickers buttons cookies flowers"
HELD_OUT_ONE_IN = 10

Problem = tuple[str, str]


def groups_added(name: str, item: str, a: int, b: int, c: int) -> Problem:
    total = a + b * c
    return (
        f"{name} has {a} {item}. {name} buys {b} boxes with {c} {item} in each box. "
        f"How many {item} does {name} have now?",
        f"The boxes hold {b}*{c} = <<{b}*{c}={b * c}>>{b * c} {item}.\n"
        f"{name} has {a}+{b * c} = <<{a}+{b * c}={total}>>{total} {item}.\n#### {total}",
    )


def groups_given(name: str, item: str, a: int, b: int, c: int) -> Problem:
    start = a + b * c
    return (
        f"{name} has {start} {item} and gives {c} {item} to each of {b} friends. "
        f"How many {item} does {name} have left?",
        f"The friends get {b}*{c} = <<{b}*{c}={b * c}>>{b * c} {item}.\n"
        f"{name} has {start}-{b * c} = <<{start}-{b * c}={a}>>{a} {item} left.\n#### {a}",
    )


def more_than(name: str, item: str, a: int, b: int, c: int) -> Problem:
    friend = NAMES.split()[(NAMES.split().index(name) + c) % 20]
    total = a + a + b
    return (
        f"{name} has {a} {item}. {friend} has {b} more {item} than {name}. How many {item} do they have together?",
        f"{friend} has {a}+{b} = <<{a}+{b}={a + b}>>{a + b} {item}.\n"
        f"Together they have {a}+{a + b} = <<{a}+{a + b}={total}>>{total} {item}.\n#### {total}",
    )


def change(name: str, item: str, a: int, b: int, c: int) -> Problem:
    paid = a + b * c
    return (
        f"{name} buys {b} {item} for ${c} each and pays with ${paid}. How much change does {name} get?",
        f"The {item} cost {b}*{c} = $<<{b}*{c}={b * c}>>{b * c}.\n"
        f"{name} gets {paid}-{b * c} = $<<{paid}-{b * c}={a}>>{a} back.\n#### {a}",
    )


def wages(name: str, item: str, a: int, b: int, c: int) -> Problem:
    total = b * c + a
    return (
        f"{name} earns ${c} an hour and works {b} hours. {name} also gets ${a} for selling {item}. "
        f"How many dollars does {name} have?",
        f"The work pays {b}*{c} = $<<{b}*{c}={b * c}>>{b * c}.\n"
        f"In all that is {b * c}+{a} = $<<{b * c}+{a}={total}>>{total}.\n#### {total}",
    )


def shared_out(name: str, item: str, a: int, b: int, c: int) -> Problem:
    total = b * c
    return (
        f"{name} shares {total} {item} equally among {c} children. Each child already had {a} {item}. "
        f"How many {item} does each child have now?",
        f"Each child gets {total}/{c} = <<{total}/{c}={b}>>{b} {item}.\n"
        f"Each child has {a}+{b} = <<{a}+{b}={a + b}>>{a + b} {item}.\n#### {a + b}",
    )


def fence(name: str, item: str, a: int, b: int, c: int) -> Problem:
    half, total = a + b, 2 * (a + b)
    return (
        f"The garden of {name} is {a} feet long and {b} feet wide. How many feet of fence go around it?",
        f"One long and one short side are {a}+{b} = <<{a}+{b}={half}>>{half} feet.\n"
        f"The fence is 2*{half} = <<2*{half}={total}>>{total} feet.\n#### {total}",
    )


TEMPLATES: tuple[Callable[[str, str, int, int, int], Problem], ...] = (
    groups_added,
    groups_given,
    more_than,
    change,
    wages,
    shared_out,
    fence,
)


def is_held_out(a: int, b: int) -> bool:
    """Whether problems with these two operands belong to the held-out split, whatever the template."""
    return zlib.crc32(f"{a},{b}".encode()) % HELD_OUT_ONE_IN == 0


def problems(count: int, seed: int, held_out: bool) -> Iterator[Problem]:
    """Yield ``count`` (question, answer) pairs of one split."""
    draw = random.Random(seed)
    while count:
        operands = draw.randint(2, 60), draw.randint(2, 12), draw.randint(2, 9)
        if is_held_out(*operands[:2]) == held_out:
            count -= 1
            yield draw.choice(TEMPLATES)(draw.choice(NAMES.split()), draw.choice(ITEMS.split()), *operands)
