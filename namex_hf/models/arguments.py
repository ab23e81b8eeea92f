"""Arguments of a forward by name, under the names of the installed version of transformers.

The file travels as remote code, which cannot be corrected on the Hub: it relies on annotations, not on names.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import Cache


class Arguments(NamedTuple):
    """The names of a forward's arguments."""

    names: tuple[str, ...]
    """All names, in the order of the positions."""
    cache: str
    """Name of the argument for a `Cache`: ``past_key_values`` up to transformers 5.23, ``cache`` from 5.24 on."""

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> "Arguments":
        """The arguments of a method, without `self`."""
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        caches = [parameter.name for parameter in parameters if "Cache" in str(parameter.annotation)]
        return cls(tuple(parameter.name for parameter in parameters), caches[0] if caches else "cache")

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, all by keyword. A cache under any name gets the name that the method uses."""
        by_name = dict(zip(self.names, args, strict=False)) | kwargs
        cache = cache_in(by_name)
        if cache is not None:
            by_name = {name: value for name, value in by_name.items() if value is not cache}
            by_name[self.cache] = cache
        return by_name


def cache_in(arguments: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a call, under any name."""
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)
