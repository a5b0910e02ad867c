"""Kernel trees, load orders, and the archives of the initial file system."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmhost.errors import ImageError
from kvmhost.lab.cpio import cpio_archive
from kvmhost.lab.initrd import Job, job_archive
from kvmhost.lab.kernel import KernelTree


def module(depends: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    modules = tmp_path / "usr/lib/modules/6.0-test"
    (modules / "kernel/fs").mkdir(parents=True)
    (modules / "kernel/fs/9p.ko.xz").write_bytes(lzma.compress(module("9pnet,netfs")))
    (modules / "kernel/fs/netfs.ko").write_bytes(module(""))
    (modules / "kernel/9pnet.ko.xz").write_bytes(lzma.compress(module("")))
    (modules / "kernel/kvm-amd.ko").write_bytes(module("kvm,9pnet"))
    (modules / "kernel/kvm.ko").write_bytes(module(""))
    (modules / "vmlinuz").write_bytes(b"image")
    (modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    return tmp_path


def test_modules_come_after_those_that_they_need(root: Path) -> None:
    tree = KernelTree(root)
    assert tree.release == "6.0-test"
    assert tree.image.read_bytes() == b"image"
    order = tree.load_order(["virtio_pci", "9p", "kvm-amd"])
    assert order == ["9pnet", "netfs", "9p", "kvm", "kvm_amd"]
    assert tree.read("9p") == module("9pnet,netfs")


def test_a_module_that_the_kernel_lacks_is_named(root: Path) -> None:
    with pytest.raises(ImageError, match="no zram"):
        KernelTree(root).load_order(["zram"])
    (root / "usr/lib/modules/6.0-test/modules.builtin").unlink()
    assert KernelTree(root).load_order(["zram", "kvm"]) == ["kvm"]


def test_a_tree_without_a_kernel_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "usr/lib/modules/6.0-test/vmlinuz").unlink()
    with pytest.raises(ImageError, match=r"no image of 6\.0-test"):
        KernelTree(root)
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-6.0-test").write_bytes(b"older place")
    assert KernelTree(root).image.read_bytes() == b"older place"
    with pytest.raises(ImageError, match="0 kernels"):
        KernelTree(root / "boot")


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio; apt-get install cpio")
def test_cpio_unpacks_the_archives(tmp_path: Path) -> None:
    """By another implementation of the format."""
    first = cpio_archive({"bin/tool": b"\0" * 5, "deep/er/x": b""}, ("dev",))
    for archive in (first, cpio_archive({"job.sh": b"x\n"})):
        assert len(archive) % 4 == 0
        subprocess.run(["cpio", "-i", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "bin/tool").read_bytes() == b"\0" * 5
    assert (tmp_path / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "deep/er/x").read_bytes() == b""
    assert (tmp_path / "dev").is_dir()
    assert (tmp_path / "job.sh").read_bytes() == b"x\n"


def test_the_job_is_quoted_for_the_shell(tmp_path: Path) -> None:
    words = ["printf", "%s|", "a b", "it's", "$PATH", "*", "", "line\nbreak"]
    job = Job(words, tmp_path, {"PATH": "/usr/bin:/bin", "SAY": "a 'b'"})
    raw = job_archive(job, {})
    start = raw.index(b"export ")
    script = raw[start : raw.index(b"break'", start) + 7]
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True)
    assert done.stdout.decode() == "".join(f"{word}|" for word in words[2:])
