"""Packages of another suite or architecture, by apt's own client.

The client gets lists, caches and sources of its own in a temporary folder; the system's stay
as they are. The mirror is the one that the system's sources name, and the signatures of its
lists are checked with the distribution's keyring.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kvmhost.errors import CapabilityError
from kvmhost.lab.pins import Pin
from kvmhost.lab.scratch import scratch_folder

__all__ = ["Apt", "opened_apt", "probe_apt", "system_mirror"]

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SOURCES = """\
Types: deb
URIs: {mirror}
Suites: {suite}
Components: main
Signed-By: {keyring}
"""
_OPTIONS = {
    "Dir::Etc::SourceList": "/dev/null",
    "Dir::Etc::Preferences": "/dev/null",
    "Dir::Etc::PreferencesParts": "/dev/null",
    "APT::Update::Error-Mode": "any",
    "APT::Sandbox::User": "",
    "Acquire::Languages": "none",
    "Acquire::PDiffs": "false",
    "Acquire::Retries": "2",
    "Acquire::http::Timeout": "30",
}


def probe_apt() -> str | None:
    """Return why packages cannot be fetched here, or None."""
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(program) is None:
            return f"no {program}"
    if not _KEYRING.exists():
        return f"no {_KEYRING}"
    return None if system_mirror() else "no Debian mirror in apt's sources"


def system_mirror() -> str | None:
    """Return the URI of the mirror that the system's sources name, or None.

    Mirrors of security updates do not count: they lack the suites themselves.
    """
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    for line in found.stdout.splitlines():
        uri, _, release = line.partition(" ")
        if "security" not in release and "security" not in uri:
            return uri
    return None


@contextlib.contextmanager
def opened_apt(suite: str, architecture: str) -> Iterator[Apt]:
    """Download the package lists of a suite into a temporary folder, and remove it at the end.

    :raises CapabilityError: if there is no apt, no mirror, or no such suite on it
    """
    problem, mirror = probe_apt(), system_mirror()
    if problem or mirror is None:
        raise _missing(suite, architecture, problem or "none")
    with scratch_folder() as folder:
        apt = Apt(folder, suite, architecture)
        apt.update(mirror)
        yield apt


class Apt:
    """apt's client for one suite and architecture, with its state in ``folder``."""

    def __init__(self, folder: Path, suite: str, architecture: str) -> None:
        self.folder, self.suite, self.architecture = folder, suite, architecture
        for name in ("sources", "state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        own = {
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "Dir::Etc::SourceParts": str(folder / "sources"),
            "Dir::State": str(folder / "state"),
            "Dir::State::status": str(folder / "status"),
            "Dir::Cache": str(folder / "cache"),
        }
        self._options = [f"-o{name}={value}" for name, value in {**_OPTIONS, **own}.items()]

    def update(self, mirror: str) -> None:
        """Download the lists.

        :raises CapabilityError: if the mirror does not answer, or lacks the suite
        """
        text = _SOURCES.format(mirror=mirror, suite=self.suite, keyring=_KEYRING)
        (self.folder / "sources" / "lab.sources").write_text(text)
        self._run("apt-get", "-qq", "update")

    def download(self, pin: Pin, folder: Path) -> Path:
        """Download one version of a package into an empty folder and return the archive's path.

        :raises CapabilityError: if the mirror does not have it
        """
        wanted = f"{pin.name}={pin.version}"
        try:
            self._run("apt-get", "-qq", "download", wanted, cwd=folder)
        except CapabilityError as error:
            if "not found" not in error.found and "Unable to locate" not in error.found:
                raise
            raise CapabilityError(
                "kvmhost lab", f"{wanted} of {self.suite}", f"{error.found} on the mirror",
                "take what the mirror has now: kvmhost lab fetch --latest",
            ) from None  # fmt: skip
        (archive,) = folder.glob("*.deb")
        return archive

    def newest(self, name: str) -> Pin:
        """Return the newest version of a package.

        :raises CapabilityError: if the suite lacks it
        """
        text = self._run("apt-cache", "show", "--no-all-versions", name)
        fields = dict(re.findall(r"^(\S+): (.*)$", text, re.MULTILINE))
        return Pin(self.suite, name, fields["Version"], fields["SHA256"])

    def dependencies(self, name: str) -> list[str]:
        """Return the names of the packages that one depends on."""
        text = self._run("apt-cache", "depends", "--no-recommends", "--no-suggests", name)
        return re.findall(r"^\s*\|?Depends: (\S+)$", text, re.MULTILINE)

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        command = [program, *self._options, *arguments]
        environment = {**os.environ, "LC_ALL": "C"}
        found = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        if found.returncode:
            raise _missing(self.suite, self.architecture, _first_error(found.stderr))
        return found.stdout


def _first_error(text: str) -> str:
    lines = [line[2:].strip() for line in text.splitlines() if line.startswith("E:")]
    return lines[0] if lines else text.strip().replace("\n", " ") or "no message of apt"


def _missing(suite: str, architecture: str, found: str) -> CapabilityError:
    return CapabilityError(
        "kvmhost lab", f"apt and a Debian mirror with {suite} for {architecture}", found,
        "check apt's sources and the network, then fetch again",
    )  # fmt: skip
