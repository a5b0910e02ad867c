"""Every exception survives pickling, and says what it knows."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import pickle
import pkgutil

import pytest

from kvmhost import errors
from kvmhost.control.caller import _error_of
from kvmhost.control.handler import Problem
from kvmhost.control.routes import problem_of
from kvmhost.control.schema import ErrorReply, SchemaError, decode, encode
from kvmhost.reclaim import errors as reclaim_errors
from kvmhost.reclaim.record.writer import RecordInUseError

SAMPLES = {
    "CapabilityError": errors.CapabilityError("kvm", "a device", "nothing", "load the module"),
    "ControlError": errors.ControlError(404, "no such page"),
    "GuestError": errors.GuestError("ended"),
    "GuestTimeout": errors.GuestTimeout(1.5),
    "ImageError": errors.ImageError("a.elf", "Phdr", "truncated", 64),
    "HostError": errors.HostError("/tmp/out", errno.ENOSPC),
    "IoctlError": errors.IoctlError("KVM_RUN", errno.EFAULT, {"vcpu": 255}),
    "KvmHostError": errors.KvmHostError("said"),
    "LabError": errors.LabError("amd64-6.1", "ended", "Kernel panic"),
    "LabTimeout": errors.LabTimeout("amd64-6.1", 1.5, "its last line"),
    "LayoutError": errors.LayoutError("overlap at 0x1000"),
    "NameInUseError": errors.NameInUseError("vm0 runs already"),
    "PauseTimeout": errors.PauseTimeout([0, 2], 1.5),
    "PagerError": errors.PagerError("store is full"),
    "LostPageError": errors.LostPageError([0x400, 0x401], "its checksum does not fit"),
    "TableError": errors.TableError("points nowhere", 0x123, 2, 0xDEAD, 7),
    "InUseError": errors.InUseError("tracker guestpt", "is in use by record", "force it"),
    "StateError": errors.StateError("machine 'a'", "is not started", "call start() first"),
    "UnexpectedExit": errors.UnexpectedExit(3, "triple fault", "rip=0x10"),
    "VmGoneError": errors.VmGoneError("vm0", "no socket"),
}


def test_there_is_a_sample_of_each() -> None:
    assert set(SAMPLES) == set(errors.__all__) - {"BY_KIND", "fields_of", "from_fields"}
    defined = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert {name for name in defined if issubclass(getattr(errors, name), Exception)} == set(
        SAMPLES
    )


def exceptions_of(package: str) -> dict[str, type[Exception]]:
    """Return the exceptions that the modules of a package define, by dotted name."""
    found = {}
    root = importlib.import_module(package)
    for info in pkgutil.walk_packages(root.__path__, f"{package}."):
        if info.name.endswith((".__main__", "._core.build")):
            continue
        for name, kind in vars(importlib.import_module(info.name)).items():
            is_error = inspect.isclass(kind) and issubclass(kind, Exception)
            if is_error and kind.__module__ == info.name and not name.startswith("_"):
                found[f"{info.name}.{name}"] = kind
    return found


def test_every_exception_of_the_packages_is_in_the_tree() -> None:
    found = exceptions_of("kvmhost")
    assert {f"kvmhost.errors.{name}" for name in SAMPLES} <= set(found)
    assert {
        "kvmhost.control.schema.SchemaError",
        "kvmhost.guests.build.GuestBuildError",
        "kvmhost.reclaim.errors.RecordError",
    } <= set(found)
    assert [name for name, kind in found.items() if not issubclass(kind, errors.KvmHostError)] == []


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_pickling_keeps_type_text_and_fields(name: str) -> None:
    error = SAMPLES[name]
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
    assert isinstance(back, errors.KvmHostError)


def test_ioctl_error_is_an_os_error_with_its_arguments_in_hex() -> None:
    error = SAMPLES["IoctlError"]
    assert isinstance(error, OSError)
    assert error.errno == errno.EFAULT
    assert str(error) == "KVM_RUN(vcpu=0xff): Bad address (errno 14)"


def test_builtin_bases() -> None:
    assert issubclass(errors.LayoutError, ValueError)
    assert issubclass(errors.ImageError, ValueError)


OTHERS = [
    errors.LayoutError("a gfn of no region", field="gfns[3]"),
    reclaim_errors.ReclaimError("said"),
    reclaim_errors.KernelFileError("/sys/x", errno.EACCES, "1"),
    reclaim_errors.RecordError("vm.young/c/0", "chunk", "is missing", 64),
    reclaim_errors.ConfigError("reclaimd.toml", 3, "daemon.interval", "is negative"),
    RecordInUseError("vm.young"),
]


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_the_errors_of_reclaim_are_in_the_tree_and_survive_pickling(error: Exception) -> None:
    assert isinstance(error, errors.KvmHostError)
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


def test_what_is_no_host_error_survives_pickling_too() -> None:
    for error in (SchemaError("wrong", "gfns[0]"), Problem(404, "no such path", "vm", "GET")):
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


def test_a_damaged_record_is_no_image() -> None:
    assert not issubclass(reclaim_errors.RecordError, errors.ImageError)


def over_the_socket(error: Exception) -> errors.KvmHostError:
    """Return what a client raises where a machine raised this."""
    reply = encode(ErrorReply(problem_of(error).info()))
    return _error_of(decode(reply, ErrorReply).error)


@pytest.mark.parametrize("name", sorted(errors.BY_KIND))
def test_a_client_raises_what_the_machine_raised(name: str) -> None:
    error = SAMPLES[name]
    back = over_the_socket(error)
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))


def test_the_wrong_argument_keeps_its_name_over_the_socket() -> None:
    back = over_the_socket(errors.LayoutError("is in no region", field="gfns[3]"))
    assert isinstance(back, errors.LayoutError)
    assert (str(back), back.field) == ("is in no region", "gfns[3]")
    back = over_the_socket(SchemaError("Expected `int`", "gfns[3]"))
    assert isinstance(back, errors.LayoutError)
    assert (str(back), back.field) == ("gfns[3]: Expected `int`", "gfns[3]")


def test_what_only_a_socket_refuses_is_a_control_error() -> None:
    for error in (Problem(404, "no such path"), Problem(423, "locked"), KeyError("a defect")):
        back = over_the_socket(error)
        assert type(back) is errors.ControlError
        assert back.status in (404, 423, 500)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("LostPageError", ["x", 1]), ("HostError", ["file", "x", ""]), ("Exception", []),
     ("PauseTimeout", [1]), ("CapabilityError", ["a", "b", None, "c"])],
)  # fmt: skip
def test_a_kind_that_does_not_fit_is_a_control_error(kind: str, arguments: list[object]) -> None:
    raw = {"error": {"status": 500, "message": "said", "kind": kind, "arguments": arguments}}
    back = _error_of(decode(json.dumps(raw).encode(), ErrorReply).error)
    assert (type(back), str(back)) == (errors.ControlError, "said")
