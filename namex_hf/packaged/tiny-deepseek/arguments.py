"""What a forward is called with, by name, whatever names this version of transformers has for it.

The file travels as remote code, which nobody can mend on the Hub: it relies on annotations, not on names.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import Cache


class Arguments(NamedTuple):
    """The arguments of a forward."""

    names: tuple[str, ...]
    """In the order in which they may be passed by position."""
    cache: str
    """Of the one that takes a `Cache`: ``past_key_values`` up to transformers 5.23, ``cache`` from 5.24 on."""

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> "Arguments":
        """Those of a method, `self` aside."""
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        caches = [one.name for one in parameters if "Cache" in str(one.annotation)]
        return cls(tuple(one.name for one in parameters), caches[0] if caches else "cache")

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments, all by keyword; a cache arrives under any name and leaves under that of the method."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        found = cache_in(given)
        if found is not None:
            given = {name: value for name, value in given.items() if value is not found}
            given[self.cache] = found
        return given


def cache_in(given: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a call, under whichever name."""
    return next((value for value in given.values() if isinstance(value, Cache)), None)


__all__ = ["Arguments", "cache_in"]
