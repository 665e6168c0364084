"""Typed parameters with ranges, and the registry of classes by name."""

from __future__ import annotations

import doctest
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest

from simomerge.core import registry
from simomerge.core.errors import InputError
from simomerge.core.registry import Registry, check_parameters, parameter, range_text, settings, suggestion, summary

PETS: Registry[Any] = Registry("pet")


@PETS.register("cat", "A book about cats", "https://example.org/cats")
@dataclass(frozen=True)
class Cat:
    """A pet with every kind of parameter,
    described in two lines.

    This paragraph is no summary.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    link: ClassVar[str]

    share: float = parameter(0.5, above=0.0, high=1.0, help="a fraction")
    size: float = parameter(1.0, low=0.0, help="a size")
    legs: int = parameter(4, low=1, high=8, help="an integer")
    colour: str = parameter("black", choices=("black", "white"), help="a choice")
    label: str = parameter("", help="any text")
    tame: bool = parameter(False, help="a flag")
    rate: float | str = parameter("auto", above=0.0, kind=float, words=("auto", "best"), help="a number or a word")
    limit: int | None = parameter(None, low=1, kind=int, when={"colour": ("white",)}, help="optional")
    scale: float | Sequence[float] | Mapping[str, float] = parameter(0.4, low=0.0, per_expert=True, help="per expert")
    blocks: float | Mapping[str, Any] = parameter(0.4, low=0.0, per_expert=True, per_block=True, help="and per block")
    notes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_parameters(self.name, self)


@PETS.register("ant", "A book about ants", "https://example.org/ants")
@dataclass(frozen=True)
class Ant:
    """No parameters."""


VALID: list[tuple[str, Any]] = [
    *(("share", value) for value in (1e-30, 0.5, 1, 1.0, np.float32(0.5), np.int64(1))),
    *(("size", value) for value in (0, 0.0, 1e30)),
    *(("legs", value) for value in (1, 8, np.int64(3))),
    *(("colour", value) for value in ("black", "white")),
    *(("label", value) for value in ("", "anything")),
    *(("tame", value) for value in (True, False)),
    *(("rate", value) for value in ("auto", "best", 0.1, 3)),
    *(("limit", value) for value in (None, 1, 100)),
    *(
        ("scale", value)
        for value in (0.1, [0.1, 0.2], (0, 1), {"a": 0.1, "b": 2}, MappingProxyType({"a": 0.1}), [], {})
    ),
    *(("blocks", value) for value in (0.1, [0.1], {"a": [0.1, 0.2], "b": (0.3,), "c": 0.5}, {"a": []})),
]


@pytest.mark.parametrize(("name", "value"), VALID, ids=str)
def test_values_in_range_are_kept_as_they_are(name: str, value: Any) -> None:
    made = PETS.make("cat", **{name: value})
    assert getattr(made, name) is value


NAN, INF = float("nan"), float("inf")
SHARE, LEGS = "a number above 0 and at most 1", "a number at least 1 and at most 8"
INVALID: list[tuple[str, str, list[Any]]] = [
    ("share", SHARE, [0, 0.0, -0.1, 1.0001, 20, NAN, INF, -INF, True, "0.2", None, [0.2], 1j]),
    ("size", "a number at least 0", [-1e-9, -1, NAN, INF, None, {"a": 1.0}]),
    ("legs", LEGS, [0, 9, 2.5, 4.0, np.float64(4), True, "4", None]),
    ("colour", "one of black, white", ["Black", "", None, 1]),
    ("label", "text", [1, None, ["a"]]),
    ("tame", "true or false", [0, 1, "true", None]),
    ("rate", "a number above 0 or 'auto' or 'best'", [0, -1, "Auto", "", None, True, NAN]),
    ("limit", "a number at least 1", [0, 1.5, "none", False]),
    ("scale", "a number at least 0", [-1, "0.1", None, True]),
]


@pytest.mark.parametrize(
    ("name", "allowed", "value"), [(n, allowed, v) for n, allowed, values in INVALID for v in values], ids=str
)
def test_other_values_are_reported_with_parameter_range_value_and_help(name: str, allowed: str, value: Any) -> None:
    spec = next(spec for spec in fields(Cat) if spec.name == name)
    with pytest.raises(InputError) as raised:
        PETS.make("cat", **{name: value})
    assert str(raised.value) == f"cat: {name} must be {allowed}, got {value!r} ({spec.metadata['help']})."


@pytest.mark.parametrize(
    ("name", "values", "wrong"),
    [
        ("scale", [0.1, -0.1], "-0.1"),
        ("scale", {"a": 0.1, "b": NAN}, "nan"),
        ("scale", (0.1, "much"), "'much'"),
        ("scale", {"a": [0.1, 0.2]}, r"\[0.1, 0.2\]"),  # per expert, not per block
        ("scale", {"a": True}, "True"),
        ("blocks", {"a": [0.1, -0.2]}, "-0.2"),
        ("blocks", {"a": 0.1, "b": (0.1, INF)}, "inf"),
        ("blocks", {"a": [0.1, [0.2]]}, r"\[0.2\]"),
        ("blocks", [[0.1]], r"\[0.1\]"),  # per block only by expert name
    ],
)
def test_each_value_per_expert_and_block_is_checked(name: str, values: Any, wrong: str) -> None:
    with pytest.raises(InputError, match=rf"cat: {name} must be a number at least 0, got {wrong} \("):
        PETS.make("cat", **{name: values})


def test_only_fields_made_by_parameter_are_settings() -> None:
    names = ["share", "size", "legs", "colour", "label", "tame", "rate", "limit", "scale", "blocks"]
    assert [spec.name for spec in settings(Cat)] == [spec.name for spec in settings(Cat())] == names
    assert settings(Ant) == ()
    assert Cat(notes={"anything": 1}).notes == {"anything": 1}
    limit = next(spec for spec in settings(Cat) if spec.name == "limit")
    assert limit.metadata["when"] == {"colour": ("white",)} and limit.metadata["help"] == "optional"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("share", "0.5; > 0, <= 1"),
        ("size", "1; >= 0"),
        ("legs", "4; >= 1, <= 8"),
        ("colour", "black; black or white"),
        ("label", '""'),
        ("tame", "false"),
        ("rate", "auto; > 0, or auto, or best"),
        ("limit", "none; >= 1"),
        ("scale", "0.4; >= 0, one or per expert"),
    ],
)
def test_ranges_in_tables(name: str, text: str) -> None:
    assert range_text(next(spec for spec in settings(Cat) if spec.name == name)) == text


def test_a_number_without_bounds_in_a_table() -> None:
    @dataclass(frozen=True)
    class Free:
        seed: int = parameter(0, help="a seed")

    assert [range_text(spec) for spec in settings(Free)] == ["0; any"]


def test_the_summary_is_the_first_paragraph_in_one_line() -> None:
    assert summary(Cat) == "A pet with every kind of parameter, described in two lines."
    assert summary(Ant) == "No parameters."
    assert summary(type("Bare", (), {})) == ""


def test_classes_are_found_by_name() -> None:
    assert list(PETS.available().items()) == [("ant", Ant), ("cat", Cat)]
    assert PETS.find("cat") is Cat and PETS.make("ant") == Ant()
    assert PETS.make("cat", legs=3) == Cat(legs=3)
    assert (Cat.name, Cat.paper, Cat.link) == ("cat", "A book about cats", "https://example.org/cats")
    with pytest.raises(ValueError, match="A pet named 'cat' is already registered"):
        PETS.register("cat", "", "")(type("Tiger", (), {}))


def test_unknown_names_come_with_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"There is no pet 'cats': did you mean 'cat'\?"):
        PETS.find("cats")
    with pytest.raises(InputError, match=r"There is no pet 'xyz': choose from ant, cat\."):
        PETS.make("xyz", legs=3)
    with pytest.raises(InputError, match=r"The pet 'cat' has no parameter 'leg': did you mean 'legs'\?"):
        PETS.make("cat", leg=3)
    with pytest.raises(InputError, match=r"'cat' has no parameter 'q': choose from share, size, .*, notes"):
        PETS.make("cat", q=3)
    with pytest.raises(InputError, match=r"The pet 'ant' has no parameter 'legs': it takes no parameters\."):
        PETS.make("ant", legs=6)
    assert suggestion("depht", ["depth"]) == ": did you mean 'depth'?"
    assert suggestion("zzz", ["depth", "edges"]) == ": choose from depth, edges."


def test_examples() -> None:
    outcome = doctest.testmod(registry)
    assert outcome.attempted >= 3 and outcome.failed == 0
