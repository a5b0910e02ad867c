"""Options: units, files with their lines, flags, and writing them back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import DEADLINE_S

from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.settings import lines
from kvmhost.reclaim.settings.config import budget_of, load, options, read_flag, to_toml
from kvmhost.units import Bytes, Mark, Seconds, Share

GOOD = """\
# how this host is run
[daemon]
vms = ["web*", "db"]
interval = "500ms"

[pressure]
psi_target = "0.1%"

[defaults]
budget = "96M"
high = "90%"
low = "40M"

[vm.db]
budget = "1GiB"
weight = 2
high = "1000M"
policy_options = { min_ttl_ms = 500 }

[vm."web*"]
fraction = "1/8"
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "reclaimd.toml"
        path.write_text(text)
        return path

    return write


def test_a_file_is_read(file):
    config = load(file(GOOD))
    assert config.daemon.vms == ["web*", "db"]
    assert config.daemon.interval == 0.5
    assert config.pressure.psi_target == 0.001
    assert config.defaults.budget.size == 96 << 20
    assert (config.of_vm("db").budget.size, config.of_vm("db").weight) == (1 << 30, 2.0)
    # What a table does not say is as in [defaults].
    assert config.of_vm("db").low == Mark(size=Bytes(40 << 20))
    assert config.of_vm("web7").fraction == 0.125
    assert config.of_vm("web7").budget.size == 96 << 20
    assert config.of_vm("other") == config.defaults


def test_flags_go_on_top(file):
    flags = {"daemon": {"interval": Seconds(2)}, "defaults": {"low": Mark(share=Share(0.5))}}
    config = load(file(GOOD), flags | {"vm": {"db": {"weight": 3.0}, "x": {"seed": 1}}})
    assert config.daemon.interval == 2
    assert config.of_vm("web1").low == Mark(share=Share(0.5))
    assert (config.of_vm("db").weight, config.of_vm("x").seed) == (3.0, 1)
    assert config.of_vm("db").budget.size == 1 << 30


@pytest.mark.parametrize("text", [GOOD, '[defaults]\nbudget = "1M"\n'])
def test_what_is_written_reads_as_the_same(file, text):
    config = load(file(text))
    assert load(file(to_toml(config))) == config


@pytest.mark.parametrize(
    ("line", "key", "text", "problem"),
    [
        (4, "daemon.interval", GOOD.replace('"500ms"', "true"), "invalid time"),
        (4, "daemon.interval", GOOD.replace('"500ms"', '"5M"'), "invalid time"),
        (4, "daemon.interval", GOOD.replace('"500ms"', '"0s"'), "more than 0s"),
        (4, "daemon.intervall", GOOD.replace("interval", "intervall"), "unknown field"),
        (7, "pressure.psi_target", GOOD.replace('"0.1%"', "10"), "at most 1, which is 100%"),
        (7, "pressure.psi_target", GOOD.replace('"0.1%"', '"101%"'), "more than 100%"),
        (10, "defaults.budget", GOOD.replace('"96M"', '"96s"'), "invalid size or share"),
        (11, "defaults.high", GOOD.replace('"90%"', '"0%"'), "above 0"),
        (9, "defaults", GOOD.replace('"40M"', '"95M"'), "need 0 < low <= high"),
        (16, "vm.db.weight", GOOD.replace("weight = 2", "weight = 0"), "> 0"),
        (16, "vm.db.weigth", GOOD.replace("weight", "weigth"), "unknown field"),
        (21, "vm.web*.fraction", GOOD.replace('"1/8"', '"1/0"'), "invalid share"),
        (21, "vm.web*.fraction", GOOD.replace('"1/8"', '"0%"'), "from 1/65536"),
        (21, "vm.web*.sample", GOOD.replace("fraction", "sample"), "unknown field"),
        (3, "daemon.vms", GOOD.replace('"db"]', "7]"), "Expected `str`"),
        (3, "daemon.vms", GOOD.replace('["web*", "db"]', '[\n"a",\n7]'), "Expected `str`"),
        (6, "presure", GOOD.replace("[pressure]", "[presure]"), "did you mean 'pressure'"),
        (4, "", GOOD.replace('"500ms"', "500ms"), "at line 4"),
        (1, "daemon", "daemon = 3\n", "is a section"),
        (2, "pressure.psi_trigger", '[pressure]\npsi_trigger = "some 1s in 100ms"', "window"),
        (2, "pressure.psi_trigger", '[pressure]\npsi_trigger = "150ms"', "is no trigger"),
        (0, "", "[daemon]\n", "nothing to do"),
        (3, "defaults.policy", '[defaults]\nbudget = "1M"\npolicy = "nope"', "there are: lru_gen"),
        (
            18,
            "vm.db.policy_options",
            GOOD.replace("min_ttl_ms", "min_ttl"),
            "did you mean 'min_ttl_ms'",
        ),
        (
            18,
            "vm.db.policy_options",
            GOOD.replace("min_ttl_ms = 500", "caps = 15"),
            "0x4 (non-leaf young) has no effect",
        ),
        (
            18,
            "vm.db.policy_options",
            GOOD.replace("min_ttl_ms = 500", "caps = 3"),
            "0x8 (spte walk) cannot be off",
        ),
        (
            18,
            "vm.db.policy_options",
            GOOD.replace("min_ttl_ms = 500", 'caps = "all"'),
            "caps: need a number",
        ),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_key(file, line, key, text, problem):
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    error = caught.value
    assert (error.file, error.line, error.key) == (str(path), line, key)
    assert problem in error.problem
    assert str(error).startswith(f"{path}:{line}: " if line else f"{path}: ")


DIGITS = "9" * 400


@pytest.mark.parametrize(
    ("line", "key", "text", "problem"),
    [
        (2, "defaults.budget", f'[defaults]\nbudget = "{DIGITS}"', "invalid size"),
        (2, "defaults.budget", '[defaults]\nbudget = "4097T"', "at most 4096T"),
        (2, "defaults.budget", f"[defaults]\nbudget = {1 << 60}", "at most 4096T"),
        (2, "", f"[defaults]\nbudget = {'9' * 5000}", "too many digits"),
        (2, "daemon.interval", f'[daemon]\ninterval = "{DIGITS}h"', "invalid time"),
        (2, "daemon.interval", '[daemon]\ninterval = "25h"', "at most 24h"),
        (3, "daemon.interval", '[defaults]\nbudget = "1M"\ndaemon.interval = "9h"', None),
        (4, "daemon.interval", '[defaults]\nbudget="1M"\n[daemon]\ninterval="9h"', "at most 8h"),
        (2, "pressure.psi_target", f'[pressure]\npsi_target = "{DIGITS}/1"', "invalid share"),
        (2, "pressure.psi_target", '[pressure]\npsi_target = "99999999/1"', "too large"),
        (2, "pressure.psi_trigger", f'[pressure]\npsi_trigger="some {DIGITS}ms in 2s"', "time"),
        (2, "pressure.cgroup", '[pressure]\ncgroup = "a\\u0000b"', "NUL"),
        (0, "", "a = " + "[" * 100_000, "nested too deeply"),
        (1, "", "[" + ".".join("a" * 2000) + "]", "more than 64 dots"),
    ],
)
def test_amounts_and_shapes_are_bounded(file, line, key, text, problem):
    if problem is None:  # A dotted key in another table is one of that table.
        key, problem = "defaults.daemon", "unknown field"
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert (caught.value.line, caught.value.key) == (line, key)
    assert problem in caught.value.problem
    assert len(str(caught.value)) < 400


def test_the_line_of_an_error_costs_time_in_proportion_to_the_file(file, monkeypatch):
    text = "\n".join(f'[vm.a{i}]\nbudget = "1M"' for i in range(3000)) + "\n[vm.z]\nbudgett = 1\n"
    path = file(text)
    read = []
    loads = lines.tomllib.loads
    monkeypatch.setattr(lines.tomllib, "loads", lambda part: read.append(len(part)) or loads(part))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert (caught.value.line, caught.value.key) == (6002, "vm.z.budgett")
    # The file once to read it, and once more, in parts, to find the line.
    assert sum(read) <= 2 * len(text)


_KEYS = st.sampled_from(["a", "b", "c d", "e.f", '"', "#", "[x]"])
_VALUES = st.recursive(
    st.integers(-5, 5) | st.booleans() | st.sampled_from(["", "x = 1", "[a]", "a\n[b]\n#", '"""']),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(_KEYS, inside, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, min_size=1, max_size=4), st.booleans())
def test_the_line_of_any_key_is_found(raw, long_texts):
    text = tomli_w.dumps(raw, multiline_strings=long_texts)
    split = text.splitlines()
    for key in raw:
        line = lines.line_of(text, [key])
        assert line, text
        # The file up to before that line does not have the key yet, or not all of its value.
        before = tomllib.loads("\n".join(split[: line - 1]))
        assert key not in before
    assert lines.line_of(text, ["absent"]) == 0


def test_a_pipe_is_no_configuration(tmp_path):
    path = tmp_path / "reclaimd.toml"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        load(path)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "x.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="no UTF-8 at byte 5"):
        load(tmp_path / "x.toml")


def test_every_option_is_a_flag_and_is_described():
    run = subprocess.run(
        [sys.executable, "-m", "kvmhost", "reclaimd", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    for option in options():
        assert option.about
        if (option.section, option.key) != ("daemon", "vms"):
            assert re.search(rf"--{option.key.replace('_', '-')}\b", run.stdout), option


def test_keys_are_unique_so_that_flags_are():
    keys = [option.key for option in options()]
    assert len(keys) == len(set(keys))


def test_a_flag_is_an_amount_or_a_table():
    interval = next(o for o in options() if o.key == "interval")
    assert read_flag(interval, "0.05") == 0.05
    with pytest.raises(ValueError, match="invalid time"):
        read_flag(interval, "5M")
    extra = next(o for o in options() if o.key == "policy_options")
    assert read_flag(extra, 'min_ttl_ms = 500, x = "y"') == {"min_ttl_ms": 500, "x": "y"}
    with pytest.raises(ValueError, match="write for example"):
        read_flag(extra, "tiers")


def test_a_budget_is_a_size_or_a_share_of_the_memory_of_the_vm():
    config = load(None, {"defaults": {"budget": Mark.parse("50%")}})
    found = budget_of(config.defaults, 1 << 30)
    assert found is not None
    assert (found.max_bytes, found.high_bytes) == (512 << 20, int((512 << 20) * 0.95))
    assert budget_of(load(None, {"daemon": {}, "pressure": {"cgroup": "/x"}}).defaults, 1) is None
    (option,) = (o for o in options() if (o.section, o.key) == ("defaults", "budget"))
    for text in ("60%", "50%", "96M"):
        assert str(read_flag(option, text)) == text
    with pytest.raises(ValueError, match="up to 100%"):
        read_flag(option, "150%")
