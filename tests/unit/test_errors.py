"""Every exception survives pickling, and says what it knows."""

from __future__ import annotations

import errno
import inspect
import pickle

import pytest

from kvmhost import errors

SAMPLES = {
    "CapabilityError": errors.CapabilityError("kvm", "a device", "nothing", "load the module"),
    "ControlError": errors.ControlError(404, "no such page"),
    "GuestError": errors.GuestError("ended"),
    "GuestTimeout": errors.GuestTimeout(1.5),
    "ImageError": errors.ImageError("a.elf", "Phdr", "truncated", 64),
    "HostError": errors.HostError("/tmp/out", errno.ENOSPC),
    "IoctlError": errors.IoctlError("KVM_RUN", errno.EFAULT, {"vcpu": 255}),
    "KvmHostError": errors.KvmHostError("said"),
    "LayoutError": errors.LayoutError("overlap at 0x1000"),
    "NameInUseError": errors.NameInUseError("vm0 runs already"),
    "PauseTimeout": errors.PauseTimeout([0, 2], 1.5),
    "PagerError": errors.PagerError("store is full"),
    "LostPageError": errors.LostPageError([0x400, 0x401], "its checksum does not fit"),
    "UnexpectedExit": errors.UnexpectedExit(3, "triple fault", "rip=0x10"),
    "VmGoneError": errors.VmGoneError("vm0", "no socket"),
}


def test_there_is_a_sample_of_each() -> None:
    assert set(SAMPLES) == set(errors.__all__)
    defined = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert {name for name in defined if issubclass(getattr(errors, name), Exception)} == set(
        errors.__all__
    )


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
