"""Tests that boot emulated hosts: ``make lab-test``, and ``make lab-test-slow`` for all.

What a host needs is fetched first, from the cache if it is there. A host that cannot be had is
a skip with the remedy; ``TEST_DEMAND=lab`` turns it into a failure.
"""

from __future__ import annotations

import os

import pytest

from kvmhost.errors import CapabilityError
from kvmhost.lab.fetching import fetch
from kvmhost.lab.hosts import find_host
from kvmhost.lab.inside import prepare
from kvmhost.lab.qemu import probe_qemu


@pytest.fixture
def lab_host():
    def prepared(name):
        host = find_host(name)
        try:
            probe_qemu(host)
            fetch(host, print)
            prepare(host, print)
        except CapabilityError as error:
            if "lab" in os.environ.get("TEST_DEMAND", "").split(","):
                pytest.fail(str(error))
            pytest.skip(str(error))
        return host

    return prepared
