"""What a part of a recipe is: frozen fields, stated by flat names, checked where the part is made.

Three things are refused, each with a `RecipeError`: a value that a field does not accept; a field that is stated where
nothing uses it ("'x' belongs to ...", made from the structure); and values that mean nothing together (`Rule`).
"""

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..errors import RecipeError
from ..printable import did_you_mean
from .choices import load_offered

FLAGS = {"false": False, "true": True}
LARGEST = 1e6
"""Of factors."""


class Range(NamedTuple):
    """What a field accepts beyond its type."""

    holds: Callable[[Any], bool]
    says: str


FACTOR = Range(lambda number: 0 < number <= LARGEST, f"a number above 0, up to {LARGEST:g}")


def count_to(most: int) -> Range:
    """The range of a count. Args: most, more than any model, text or patience has."""
    return Range(lambda number: 1 <= number <= most, f"a whole number from 1 to {most}")


class Spec(NamedTuple):
    """What `leaf` states."""

    help: str
    name: str | None
    within: Range | None
    registry: Mapping[str, Any] | None
    belongs: str
    shown: tuple[str, ...]


def leaf(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    within: Range | None = None,
    registry: Mapping[str, Any] | None = None,
    belongs: str = "",
    shown: tuple[str, ...] = (),
) -> Any:
    """A field of a part.

    Args:
        default: None where other fields imply the value, see `Part.imply`.
        name: the flat name, where it is not the attribute's.
        registry: its keys are the values that are accepted.
        belongs: what follows the field's name in the message where it is stated and not used; else the part's.
        shown: flat names of the fields whose values that message ends with; else the part's.
    """
    return field(default=default, metadata={"leaf": Spec(help, name, within, registry, belongs, shown)})


class Leaf(NamedTuple):
    """A field of a part, as `leaf` and its annotation state it."""

    name: str  # flat
    attribute: str
    owner: type["Part"]
    default: Any
    kind: type
    literals: tuple[str, ...]
    spec: Spec

    @property
    def help(self) -> str:
        return self.spec.help

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that are accepted, where they can be listed."""
        return self.literals if self.spec.registry is None else tuple(self.spec.registry)

    def clean(self, value: Any, registered: bool = True) -> Any:
        """The value as it is stored.

        Args:
            registered: False accepts a name that is not in the registry.

        Raises:
            RecipeError: a value that the field does not accept.
        """
        if value is None and self.default is None:
            return None
        if self.spec.registry is not None and value not in self.choices:
            load_offered()
        if self.choices and (registered or self.literals):
            if value not in self.choices:
                raise self._refusal(value, ", ".join(self.choices))
            return value
        if self.kind is bool:
            if not isinstance(value, bool):
                raise self._refusal(value, "true, false")
            return value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.name == "beta" and number:  # YAML reads 0.9 as a number
            return str(value)
        known = number and isinstance(value, (int, self.kind)) if self.kind is not str else isinstance(value, str)
        if not known or (self.kind is float and not abs(value) <= sys.float_info.max):
            raise self._refusal(value, f"a finite {self.kind.__name__}")
        if self.spec.within is not None and not self.spec.within.holds(value):
            raise self._refusal(value, self.spec.within.says)
        return float(value) if self.kind is float else value  # 1 and 1.0 are stored alike

    def parse(self, text: str) -> Any:
        """The value that a word of the command line states.

        Raises:
            RecipeError: a word for a value of another kind.
        """
        if self.kind is bool:
            return FLAGS.get(text, text)  # `clean` refuses another word
        try:
            return self.kind(text)
        except ValueError as error:
            raise self._refusal(text, self.kind.__name__) from error

    def _refusal(self, value: Any, accepted: str) -> RecipeError:
        hint = did_you_mean(value, self.choices)
        return RecipeError(f"recipe field '{self.name}' is {value!r}; accepted: {accepted}{hint}")

    def refusal_of_unused(self, belongs: str = "", shown: tuple[str, ...] = ()) -> "Rule":
        """What is said where it is stated and not used. Args: in the place of the part's."""
        message = f"'{self.name}' {self.spec.belongs or belongs or self.owner.belongs}"
        return Rule(lambda part: True, message, (*(self.spec.shown or shown or self.owner.shown), self.name))


class Rule(NamedTuple):
    """Values that mean nothing together."""

    broken: Callable[[Any], bool]  # of the part that states the rule
    message: str
    fields: tuple[str, ...]  # flat names of what to look at

    def error(self, values: Mapping[str, Any]) -> RecipeError:
        found = ", ".join(f"{name}={values[name]}" for name in self.fields if name in values)
        return RecipeError(f"{self.message}; found {found}", self.fields)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Fields of one subject.

    Raises:
        RecipeError: naming the field, the value found and what is accepted.
    """

    belongs: ClassVar[str] = ""
    """What follows a field's name in the message where it is stated and not used."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Flat names of the fields whose values that message ends with."""
    rules: ClassVar[tuple[Rule, ...]] = ()

    def __post_init__(self) -> None:
        for one in leaves_of(type(self)):
            self._set(one.attribute, one.clean(getattr(self, one.attribute), registered=False))
        self.imply()
        values, unused = self.flat(), set(self.unused())
        for one in all_leaves(type(self)):
            if one.name in unused and values[one.name] != one.default:
                raise one.refusal_of_unused().error(self._found())
        for rule in self.rules:
            if rule.broken(self):
                raise rule.error(self._found())

    def imply(self) -> None:
        """Give the fields that are not stated their values."""

    def unused(self) -> Iterator[str]:
        """Flat names of the fields, those of its parts included, that mean nothing beside the others' values."""
        yield from ()

    def _found(self) -> dict[str, Any]:
        """What a refusal may print."""
        return self.flat()

    def _set(self, attribute: str, value: Any) -> None:
        object.__setattr__(self, attribute, value)

    def filled(self, **values: Any) -> Self:
        """A copy in which fields that are None have these values."""
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    def _fill(self, **values: Any) -> None:
        """Set the fields that are None."""
        for attribute, value in values.items():
            if getattr(self, attribute) is None:
                self._set(attribute, value)

    @property
    def parts(self) -> Iterator["Part"]:
        """The parts of this part."""
        return (part for one in fields(self) if isinstance(part := getattr(self, one.name), Part))

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is read."""
        return any(part.needs_text for part in self.parts)

    def flat(self) -> dict[str, Any]:
        """All values by flat names, those of its parts included."""
        values = {one.name: getattr(self, one.attribute) for one in leaves_of(type(self))}
        for part in self.parts:
            values |= part.flat()
        return values


AnyPart = TypeVar("AnyPart", bound=Part)


def build(part: type[AnyPart], values: dict[str, Any]) -> AnyPart:
    """A part out of flat values, which are taken from ``values``: what is left there belongs to no field of it."""
    arguments: dict[str, Any] = {attribute: build(kind, values) for attribute, kind in parts_of(part).items()}
    stated = {one.attribute: values.pop(one.name, None) for one in leaves_of(part)}
    return part(**arguments, **{attribute: value for attribute, value in stated.items() if value is not None})


def leaves_of(part: type[Part]) -> tuple[Leaf, ...]:
    """The fields that a part states itself."""
    return _leaves_of(cast(Hashable, part))  # mypy takes the class of a frozen object for no key


@cache
def _leaves_of(part: Any) -> tuple[Leaf, ...]:
    hints = get_type_hints(part)
    return tuple(
        _leaf_of(part, one.name, hints[one.name], one.default, one.metadata["leaf"])
        for one in fields(part)
        if "leaf" in one.metadata
    )


def _leaf_of(part: type[Part], attribute: str, hint: Any, default: Any, spec: Spec) -> Leaf:
    if get_origin(hint) in (Union, UnionType):
        hint = next(one for one in get_args(hint) if one is not NoneType)
    literals = get_args(hint) if get_origin(hint) is Literal else ()
    owner = next(kind for kind in part.__mro__ if attribute in vars(kind).get("__annotations__", {}))
    kind = str if literals else hint
    return Leaf(spec.name or attribute, attribute, owner, None if default is MISSING else default, kind, literals, spec)


def parts_of(part: type[Part]) -> dict[str, type[Part]]:
    """The parts of a part by attribute, where their type is settled."""
    return _parts_of(cast(Hashable, part))


@cache
def _parts_of(part: Any) -> dict[str, type[Part]]:
    hints = get_type_hints(part)
    named = {one.name: hints[one.name] for one in fields(part)}
    return {name: hint for name, hint in named.items() if isinstance(hint, type) and issubclass(hint, Part)}


def all_leaves(part: type[Part]) -> tuple[Leaf, ...]:
    """The fields of a part and of its parts."""
    return leaves_of(part) + tuple(one for kind in parts_of(part).values() for one in all_leaves(kind))
