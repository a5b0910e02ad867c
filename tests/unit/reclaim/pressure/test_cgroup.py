"""Memory cgroups on a fake tree of kernel files, both versions."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from kvmhost.errors import CapabilityError
from kvmhost.reclaim.errors import KernelFileError, ReclaimError
from kvmhost.reclaim.pressure.cgroup import CgroupLimit, MemoryCgroup, Parent, find_parent
from kvmhost.reclaim.pressure.kernelfiles import KernelFiles

V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2_MOUNT = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
OTHERS = "30 1 0:5 / /proc rw - proc proc rw\n33 31 0:30 / /x rw - cgroup cgroup rw,cpu,cpuacct\n"
V1_FILES = {
    "memory.limit_in_bytes": "9223372036854771712\n",
    "memory.memsw.limit_in_bytes": "9223372036854771712\n",
    "memory.usage_in_bytes": "4096\n",
    "memory.max_usage_in_bytes": "8192\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    "cgroup.procs": "",
}
V2_FILES = {
    "memory.max": "max\n",
    "memory.swap.max": "max\n",
    "memory.current": "4096\n",
    "memory.events": "low 0\nhigh 0\nmax 5\noom 2\noom_kill 2\n",
    "cgroup.procs": "",
}


class FakeKernel(KernelFiles):
    """A directory in which cgroups appear with their files and go without them."""

    def __init__(self, root, mounts, own, child_files):
        super().__init__(root)
        self.child_files, self.writes, self.refuse = child_files, [], {}
        self.put("/proc/self/mountinfo", mounts)
        self.put("/proc/self/cgroup", own)

    def put(self, path, text):
        (self.root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path.lstrip("/")).write_text(text)

    def write(self, path, value):
        for part, number in self.refuse.items():
            if part in path:
                raise KernelFileError(path, number, value)
        super().write(path, value)
        self.writes.append((path.rpartition("/")[2], value))

    def mkdir(self, path):
        for part, number in self.refuse.items():
            if path.startswith(part):
                raise KernelFileError(path, number)
        super().mkdir(path)
        for name, text in self.child_files.items():
            self.put(f"{path}/{name}", text)

    def rmdir(self, path):
        if self.exists(f"{path}/cgroup.procs") and self.read(f"{path}/cgroup.procs"):
            raise KernelFileError(path, errno.EBUSY)
        for name in self.child_files:
            (self.root / path.lstrip("/") / name).unlink(missing_ok=True)
        super().rmdir(path)


@pytest.fixture
def v1(tmp_path):
    kernel = FakeKernel(tmp_path, OTHERS + V1_MOUNT, "4:memory:/user/me\n0::/\n", V1_FILES)
    kernel.put("/sys/fs/cgroup/memory/user/me/cgroup.procs", "")
    return kernel


@pytest.fixture
def v2(tmp_path):
    kernel = FakeKernel(tmp_path, OTHERS + V2_MOUNT, "0::/user/me\n", V2_FILES)
    for group in ("", "/user", "/user/me"):
        kernel.put(f"/sys/fs/cgroup{group}/cgroup.controllers", "cpu memory pids\n")
        kernel.put(f"/sys/fs/cgroup{group}/cgroup.subtree_control", "memory\n")
    return kernel


def test_v1(v1):
    assert find_parent(v1) == Parent(1, "/sys/fs/cgroup/memory")
    with MemoryCgroup.create("t", limit_bytes=1 << 20, files=v1) as group:
        assert group.path == f"/sys/fs/cgroup/memory/kvmhost-t-{os.getpid()}"
        # The limit of memory and swap together is out of the way first, then follows.
        assert v1.writes == [
            ("memory.memsw.limit_in_bytes", "-1"),
            ("memory.limit_in_bytes", "1048576"),
            ("memory.memsw.limit_in_bytes", "1048576"),
        ]
        assert group.usage_bytes() == 4096
        assert group.peak_bytes() == 8192
        assert group.oom_kills() == 3
        assert group.pids() == []
    assert not v1.exists(group.path)
    group.close()


def test_v2(v2):
    assert find_parent(v2) == Parent(2, "/sys/fs/cgroup")
    with MemoryCgroup.create("t", limit_bytes=1 << 20, files=v2) as group:
        assert v2.writes == [("memory.max", "1048576"), ("memory.swap.max", "0")]
        assert group.usage_bytes() == 4096
        assert group.peak_bytes() is None
        assert group.oom_kills() == 2
        group.add_pid(0)
        assert v2.writes[-1] == ("cgroup.procs", "0")
        v2.put(f"{group.path}/cgroup.procs", "")
    assert not v2.exists(group.path)


def test_no_limit_at_first(v1):
    with MemoryCgroup.create("t", files=v1) as group:
        assert v1.writes == []
        assert group.limit_bytes() is None
        group.set_limit(1 << 20)
        v1.put(f"{group.path}/memory.limit_in_bytes", "1048576\n")
        assert group.limit_bytes() == 1 << 20


def test_v2_turns_the_controller_on(v2):
    v2.put("/sys/fs/cgroup/cgroup.subtree_control", "cpu\n")
    assert find_parent(v2).path == "/sys/fs/cgroup"
    assert v2.writes == [("cgroup.subtree_control", "+memory")]


def test_v2_without_a_memory_controller_at_the_root_tries_its_own_group(v2):
    v2.refuse = {"/sys/fs/cgroup/kvmhost": errno.EACCES}
    assert find_parent(v2).path == "/sys/fs/cgroup/user/me"
    v2.refuse["/sys/fs/cgroup/user/me"] = errno.EACCES
    assert find_parent(v2).path == "/sys/fs/cgroup/user"


def test_nothing_works_and_all_reasons_are_told(v1, tmp_path):
    v1.refuse = {"/sys": errno.EROFS}
    v1.put("/proc/self/mountinfo", V1_MOUNT + V2_MOUNT)
    v1.put("/sys/fs/cgroup/cgroup.controllers", "hugetlb\n")
    v1.put("/sys/fs/cgroup/cgroup.subtree_control", "\n")
    with pytest.raises(CapabilityError) as caught:
        find_parent(v1)
    text = str(caught.value)
    assert "v1 /sys/fs/cgroup/memory: " in text
    assert "Read-only file system" in text
    assert "v2 /sys/fs/cgroup: " in text
    assert "no memory controller" in text
    assert "Delegate=yes" in text


def test_no_memory_cgroup_mounted(tmp_path):
    kernel = FakeKernel(tmp_path, OTHERS, "3:cpu:/\n", {})
    with pytest.raises(CapabilityError, match="no memory cgroup is mounted"):
        find_parent(kernel)


def test_a_refused_limit_leaves_no_cgroup_behind(v1):
    v1.refuse = {"memory.limit_in_bytes": errno.EINVAL}
    with pytest.raises(KernelFileError, match=r"writing '1'.*Invalid argument"):
        MemoryCgroup.create("t", limit_bytes=1, files=v1)
    left = (v1.root / "sys/fs/cgroup/memory").glob("kvmhost-*")
    assert list(left) == []


def test_a_cgroup_with_a_process_is_not_removed(v1):
    group = MemoryCgroup.create("t", files=v1)
    v1.put(f"{group.path}/cgroup.procs", "77\n")
    with pytest.raises(KernelFileError) as caught:
        group.close()
    assert caught.value.errno == errno.EBUSY
    v1.put(f"{group.path}/cgroup.procs", "")
    group.close()
    assert not v1.exists(group.path)


def test_a_cgroup_that_someone_removed_is_closed(v1):
    group = MemoryCgroup.create("t", files=v1)
    v1.rmdir(group.path)
    group.close()
    with pytest.raises(KernelFileError):
        group.usage_bytes()


def test_errors_pickle_and_are_both_kinds():
    error = pickle.loads(pickle.dumps(KernelFileError("/x/memory.max", errno.EBUSY, "5")))
    assert isinstance(error, ReclaimError)
    assert isinstance(error, OSError)
    assert (error.interface, error.errno, error.value) == ("/x/memory.max", errno.EBUSY, "5")
    assert str(error) == "/x/memory.max (writing '5'): Device or resource busy"


NO_LIMIT_V1 = "9223372036854771712\n"


def levels(kernel, mount, names, **values):
    """Put a chain of cgroups below a mount: by file, one text per level."""
    path = mount
    for number, name in enumerate(["", *names]):
        path = f"{path}/{name}" if name else path
        for file, texts in values.items():
            if texts[number] is not None:
                kernel.put(f"{path}/memory.{file}", texts[number])
    return path


def test_v1_takes_the_tightest_limit_up_the_hierarchy(v1):
    stat = "total_inactive_file 10\nhierarchical_memory_limit 400\n"
    path = levels(
        v1, "/sys/fs/cgroup/memory", ["top", "vm"],
        limit_in_bytes=[NO_LIMIT_V1, "400\n", NO_LIMIT_V1],
        usage_in_bytes=["9000\n", "390\n", "50\n"], stat=[None, stat, stat],
        use_hierarchy=["1\n", "1\n", "1\n"],
    )  # fmt: skip
    limit = MemoryCgroup.at(path, v1).tightest()
    above = "/sys/fs/cgroup/memory/top"
    assert limit == CgroupLimit(above, "memory.limit_in_bytes", 400, 380)
    assert limit.excess_bytes(0.9) == 20
    # Levels that do not share a hierarchy do not limit each other.
    v1.put(f"{above}/memory.use_hierarchy", "0\n")
    v1.put(f"{path}/memory.stat", "total_inactive_file 10\n")
    assert MemoryCgroup.at(path, v1).tightest() is None


def test_v1_a_limit_above_what_a_container_sees(v1):
    """The mount's root is a cgroup inside the host's hierarchy, of which only stat tells."""
    path = levels(
        v1, "/sys/fs/cgroup/memory", ["vm"], limit_in_bytes=[NO_LIMIT_V1, "900\n"],
        usage_in_bytes=["700\n", "50\n"], stat=[None, "hierarchical_memory_limit 600\n"],
    )  # fmt: skip
    limit = MemoryCgroup.at(path, v1).tightest()
    assert (limit.path, limit.limit_bytes) == ("/sys/fs/cgroup/memory", 600)
    assert (limit.needed_bytes, "hierarchical" in limit.file) == (700, True)


def test_v2_high_and_max_of_every_level_count(v2):
    path = levels(
        v2, "/sys/fs/cgroup", ["a", "b"], max=[None, "1000\n", "max\n"],
        high=[None, "max\n", "60\n"], current=[None, "900\n", "50\n"],
    )  # fmt: skip
    group = MemoryCgroup.at(path, v2)
    assert group.tightest() == CgroupLimit(path, "memory.high", 60, 50)
    v2.put(f"{path}/memory.high", "max\n")
    assert group.tightest() == CgroupLimit("/sys/fs/cgroup/a", "memory.max", 1000, 900)
    v2.put("/sys/fs/cgroup/a/memory.max", "max\n")
    assert group.tightest() is None
