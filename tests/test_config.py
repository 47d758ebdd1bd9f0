"""Configurations: to JSON and back, nested, and refused in words when a field is wrong."""

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

import scfm
from scfm._config import Config


@dataclass(frozen=True, kw_only=True)
class Wheel(Config):
    size: int = 26
    spokes: tuple[int, ...] = (16, 16)


@dataclass(frozen=True, kw_only=True)
class Bicycle(Config):
    color: Literal["red", "green"]
    weight: float = 10.0
    wheel: Wheel = Wheel()
    basket: Wheel | None = None
    used: bool = False


BICYCLE = Bicycle(color="red", wheel=Wheel(size=28), basket=Wheel(spokes=()))


def test_survives_json():
    assert Bicycle.from_dict(json.loads(json.dumps(BICYCLE.to_dict()))) == BICYCLE


def test_nested_fields_are_replaced_by_name():
    changed = BICYCLE.replace(weight=9.5, wheel={"size": 24})
    assert (changed.weight, changed.wheel.size, changed.wheel.spokes) == (9.5, 24, (16, 16))
    assert BICYCLE.replace(wheel=Wheel()).wheel == Wheel()
    assert BICYCLE.wheel.size == 28


@pytest.mark.parametrize(
    "change",
    [lambda: BICYCLE.replace(colour="green"), lambda: Bicycle.from_dict({"colour": "green"})],
)
def test_a_misspelt_field_is_named_with_its_likely_spelling(change):
    with pytest.raises(ValueError, match=r"Bicycle has no field 'colour'. Did you mean 'color'"):
        change()


def test_a_misspelt_nested_field_too():
    with pytest.raises(ValueError, match=r"Wheel has no field 'sise'. Did you mean 'size'"):
        Bicycle.from_dict({"color": "red", "wheel": {"sise": 3}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "needs a value for color"),
        ({"color": "blue"}, "Bicycle.color is 'blue'; it must be 'red' or 'green'"),
        ({"color": "red", "weight": "10"}, "weight is '10'; it must be float"),
        ({"color": "red", "weight": True}, "weight is True; it must be float"),
        ({"color": "red", "used": 1}, "used is 1; it must be bool"),
        ({"color": "red", "wheel": 3}, "wheel is 3; it must be Wheel"),
        ({"color": "red", "basket": [3]}, "it must be Wheel or None"),
        ({"color": "red", "wheel": {"size": 2.5}}, "Wheel.size is 2.5; it must be int"),
        ({"color": "red", "wheel": {"spokes": ["16"]}}, "Wheel.spokes is"),
        ([1, 2], "needs a mapping"),
    ],
)
def test_wrong_content_is_refused_with_the_field_and_the_value(content, message):
    with pytest.raises(ValueError, match=message):
        Bicycle.from_dict(content)


def test_numbers_of_numpy_become_plain():
    wheel = Wheel.from_dict({"size": np.int64(3)})
    assert type(wheel.size) is int
    assert json.dumps(wheel.to_dict())


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("rank", "n_bins", 7),
        ("continuous", "n_bins", 7),
        ("rank", "log1p", True),
        ("bucket", "log1p", False),
        ("continuous", "log1p", False),
        ("rank", "target_depth", 1e4),
        ("bin", "target_depth", 1e4),
    ],
)
def test_settings_that_a_kind_of_encoding_does_not_read_are_refused(kind, field, value):
    with pytest.raises(ValueError, match=f"`{field}` is {value}; for kind '{kind}' it (has no effect|is always)"):
        scfm.EncodingConfig(kind=kind, **{field: value})
    assert scfm.EncodingConfig.from_dict(scfm.EncodingConfig(kind=kind).to_dict()) == scfm.EncodingConfig(kind=kind)


@pytest.mark.parametrize("trainable", ["nonsense", "lora", "last:", "all:3", "lora:x"])
def test_weights_to_train_are_checked_at_once(trainable):
    with pytest.raises(ValueError, match="`trainable`"):
        scfm.FitConfig(trainable=trainable)


@pytest.mark.parametrize(("n_cells", "n_steps"), [(1, 30), (225, 30), (700, 52), (1_000_000, 2000), (10**8, 4000)])
def test_steps_grow_with_the_square_root_of_the_cells(n_cells, n_steps):
    assert scfm.FitConfig.for_cells(n_cells).n_steps == n_steps
