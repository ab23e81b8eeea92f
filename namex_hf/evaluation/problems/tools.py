"""A request and four tools: the call that meets it, as JSON."""

import json
import random
from collections.abc import Callable
from typing import Any

from .problem import Problem, generated
from .templates import ITEMS, NAMES

NEW_TOKENS, ONE_LINE = 96, False
OFFERED = 4
CITIES = ["Athens", "Berlin", "Cairo", "Dublin", "Kyoto", "Lima", "Madrid", "Oslo", "Quito", "Rome"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ASKED = """\
You have these tools:
{tools}
Answer with one JSON object and nothing else: {{"name": the tool, "arguments": {{its arguments}}}}.

{request}"""
Arguments = dict[str, Any]


def _weather(draw: random.Random) -> tuple[str, Arguments]:
    city, day = draw.choice(CITIES), draw.choice(DAYS)
    return f"What will the weather be in {city} on {day}?", {"city": city, "day": day}


def _order(draw: random.Random) -> tuple[str, Arguments]:
    item, count = draw.choice(ITEMS.split()), draw.randint(2, 99)
    return f"Please order {count} {item}.", {"item": item, "count": count}


def _message(draw: random.Random) -> tuple[str, Arguments]:
    to, city, hour = draw.choice(NAMES.split()), draw.choice(CITIES), draw.randint(1, 12)
    return f'Write "The train from {city} arrives at {hour}" to {to}.', {
        "to": to,
        "text": f"The train from {city} arrives at {hour}",
    }


def _convert(draw: random.Random) -> tuple[str, Arguments]:
    source, target = draw.sample(("EUR", "USD", "JPY", "CHF", "SEK"), 2)
    amount = draw.randint(2, 5000)
    return f"How much is {amount} {source} in {target}?", {"amount": amount, "from": source, "to": target}


def _timer(draw: random.Random) -> tuple[str, Arguments]:
    minutes, name = draw.randint(1, 90), draw.choice(ITEMS.split())
    return f"Set a timer of {minutes} minutes for the {name}.", {"minutes": minutes, "label": name}


def _route(draw: random.Random) -> tuple[str, Arguments]:
    start, end = draw.sample(CITIES, 2)
    by = draw.choice(("train", "car", "plane"))
    return f"How do I get from {start} to {end} by {by}?", {"start": start, "end": end, "by": by}


TOOLS: dict[str, tuple[Callable[[random.Random], tuple[str, Arguments]], dict[str, str]]] = {
    "get_weather": (_weather, {"city": "string", "day": "string"}),
    "place_order": (_order, {"item": "string", "count": "integer"}),
    "send_message": (_message, {"to": "string", "text": "string"}),
    "convert_currency": (_convert, {"amount": "integer", "from": "string", "to": "string"}),
    "set_timer": (_timer, {"minutes": "integer", "label": "string"}),
    "find_route": (_route, {"start": "string", "end": "string", "by": "train, car or plane"}),
}


def make(seed: int, count: int) -> list[Problem]:
    """As of `Kind`."""
    return generated(_one, seed, count)


def _one(draw: random.Random) -> Problem:
    offered = draw.sample(list(TOOLS), OFFERED)
    name = draw.choice(offered)
    request, arguments = TOOLS[name][0](draw)
    tools = "\n".join(json.dumps({"name": tool, "arguments": TOOLS[tool][1]}) for tool in offered)
    prompt = ASKED.format(tools=tools, request=request)
    return Problem(prompt, json.dumps({"name": name, "arguments": arguments}), (("user", prompt),))


def check(answer: str, problem: Problem) -> bool:
    """Whether the first JSON object of the answer is the call: the same tool, the same arguments, no others."""
    try:
        call, _ = json.JSONDecoder().raw_decode(answer, answer.index("{"))
    except (ValueError, RecursionError):
        return False
    found = {name: call.get(name) for name in ("name", "arguments")}
    return json.dumps(found, sort_keys=True) == json.dumps(json.loads(problem.answer), sort_keys=True)
