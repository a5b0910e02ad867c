"""Names that choose something: one type each, from which everything else takes its list."""

from __future__ import annotations

import typing

import pytest

from kvmhost.boot.loaders import load_image
from kvmhost.engine import choose
from kvmhost.errors import LayoutError
from kvmhost.guests import image_path
from kvmhost.pager.options import StoreOptions
from kvmhost.process.foreign import METHODS
from kvmhost.tools.bench.mmuways import FORMATS
from kvmhost.trackers import registry
from kvmhost.vm import names
from kvmhost.vm.harvest import HarvestRequest


def test_the_lists_are_those_of_the_types() -> None:
    for listed, kind in (
        (names.ACTUATORS, names.Actuator),
        (names.CODECS, names.CodecName),
        (names.ENGINES, names.EngineName),
        (names.LOADERS, names.LoaderName),
        (names.METHODS, names.MethodName),
        (names.REARM, names.Rearm),
        (names.TABLE_FORMATS, names.TableFormat),
        (names.TRACKERS, names.TrackerName),
    ):
        assert listed == typing.get_args(kind)


def test_what_is_registered_by_name_has_the_names_of_its_type() -> None:
    assert ("auto", *registry.NAMES) == names.TRACKERS
    assert ("auto", *METHODS) == names.METHODS
    assert set(FORMATS) < set(names.TABLE_FORMATS)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("engine", lambda: choose("kmv")),  # type: ignore[arg-type]
        ("loader", lambda: load_image(image_path("hello"), "flat15")),  # type: ignore[arg-type]
        ("codec", lambda: StoreOptions(codec="lz5")),  # type: ignore[arg-type]
        ("rearm", lambda: HarvestRequest(rearm="yuong")),  # type: ignore[arg-type]
        ("table_format", lambda: HarvestRequest(table_format="stage3")),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_name_is_refused_with_the_closest_one(
    field: str, call: typing.Callable[[], object]
) -> None:
    with pytest.raises(
        LayoutError, match=f"unknown {field.replace('_', ' ')} .*did you mean"
    ) as no:
        call()
    assert no.value.field == field
