"""The daemon's configuration: a TOML file, overridden by command-line flags.

.. code-block:: toml

    [daemon]
    vms = ["web*", "db"]

    [defaults]          # options of every VM
    budget = "96M"

    [vm.db]             # options of VMs whose name matches; the first matching table applies
    budget = "1G"
    weight = 2

An option that is unknown or of the wrong type is refused with file, line
and key; :mod:`kvmhost.reclaim.settings.options` lists all options.
"""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from kvmhost.control.schema import SchemaError, convert
from kvmhost.errors import LayoutError
from kvmhost.files import read_regular
from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.pressure.budget import Budget
from kvmhost.reclaim.settings.lines import line_of, outside_strings
from kvmhost.reclaim.settings.options import Config, VmOptions
from kvmhost.suggest import unknown_name
from kvmhost.units import MAX_SECONDS, read_amount, write_amount

__all__ = ["Flags", "Option", "budget_of", "load", "options", "read_flag", "to_toml"]

T = TypeVar("T", bound=msgspec.Struct)

#: Values of flags: by section, then key.
Flags = Mapping[str, Mapping[str, Any]]

_SECTIONS: dict[str, type[msgspec.Struct]] = {
    field.name: type(field.default)
    for field in msgspec.structs.fields(Config)
    if field.name != "vm"
}


class Option(NamedTuple):
    """One option: ``[section] key``."""

    section: str
    key: str
    kind: Any
    default: Any
    about: str


def options() -> Iterator[Option]:
    """Yield every option of every section."""
    for section, struct in _SECTIONS.items():
        hints = typing.get_type_hints(struct, include_extras=True)
        for field in msgspec.structs.fields(struct):
            kind = hints[field.name]
            default = field.default
            if default is msgspec.NODEFAULT:
                default = field.default_factory()
            yield Option(section, field.name, kind, default, kind.__metadata__[0].description)


def read_flag(option: Option, text: str) -> Any:
    """Parse an option's value from the command line; amounts read as in the file.

    :raises ValueError: if the syntax is invalid
    """
    given: Any = text
    try:
        if typing.get_origin(typing.get_args(option.kind)[0]) is dict:
            given = tomllib.loads(f"it = {{ {text} }}")["it"]
        return msgspec.convert(
            given,
            option.kind,
            strict=False,
            dec_hook=read_amount,
        )
    except tomllib.TOMLDecodeError:
        raise ValueError(f"{text!r}: write for example 'tiers = 2, order = \"gfn\"'") from None
    except msgspec.ValidationError as error:
        problem = str(error)
        raise ValueError(problem if repr(text) in problem else f"{text!r}: {problem}") from None


def load(path: str | Path | None, flags: Flags | None = None) -> Config:
    """Read a file (None: no file), apply flags over it, and check the result.

    :raises ConfigError: naming file, line and key
    """
    text, raw = _read(path) if path is not None else ("", {})
    where = _Where(str(path) if path is not None else "flags", text)
    known = set(_SECTIONS) | {"vm"}
    for name, table in raw.items():
        if name not in known:
            raise where.error((name,), unknown_name("section", name, sorted(known)))
        if not isinstance(table, dict):
            raise where.error((name,), "is a section; write [" + name + "]")
    sections = {
        name: _section(raw.get(name, {}), kind, (name,), where, (flags or {}).get(name, {}))
        for name, kind in _SECTIONS.items()
    }
    defaults = typing.cast(VmOptions, sections["defaults"])
    tables, given = raw.get("vm", {}), (flags or {}).get("vm", {})
    vm = {
        name: _section(
            tables.get(name, {}), VmOptions, ("vm", name), where, given.get(name, {}), defaults
        )
        for name in (*tables, *(name for name in given if name not in tables))
    }
    config = Config(**sections, vm=vm)  # type: ignore[arg-type]
    _check(config, where)
    return config


def budget_of(options: VmOptions, memory_bytes: int) -> Budget | None:
    """Return a VM's budget with its marks, or None if the VM has no separate budget.

    :param memory_bytes: memory size of the VM, of which the budget may be a share
    :raises LayoutError: if the marks are out of order
    """
    size = options.budget.of(memory_bytes)
    return Budget.of(size, options.high.of(size), options.low.of(size)) if size else None


def to_toml(config: Config) -> str:
    """Format a configuration so that :func:`load` reads it back unchanged."""
    import tomli_w

    raw = msgspec.to_builtins(config, enc_hook=write_amount)
    raw["vm"] = {
        pattern: {key: value for key, value in table.items() if value != raw["defaults"][key]}
        for pattern, table in raw["vm"].items()
    }
    if not raw["vm"]:
        del raw["vm"]
    return tomli_w.dumps(raw)


#: The memory size of a VM is unknown when its options are checked. If the budget is a share,
#: only marks that are shares can be checked, against this size; a session limits the other
#: marks to the budget.
_ANY_MEMORY_BYTES = 1 << 52


#: A file with several thousand tables [vm.NAME] is smaller than this.
_MAX_FILE_BYTES = 1 << 20
_MAX_PARTS = 64
_LONG_NUMBER = re.compile(r"[0-9_]{400}")


class _Where:
    """Finds the line of a key, for error messages."""

    def __init__(self, file: str, text: str) -> None:
        self._file, self._text = file, text

    def error(self, keys: tuple[str, ...], problem: str) -> ConfigError:
        """Return the error that names a key and its line."""
        return ConfigError(self._file, line_of(self._text, keys), ".".join(keys), problem)


def _read(path: str | Path) -> tuple[str, dict[str, Any]]:
    try:
        text = read_regular(path, _MAX_FILE_BYTES).decode()
    except OSError as error:
        raise ConfigError(str(path), 0, "", error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), 0, "", f"no UTF-8 at byte {error.start}") from None
    _check_shape(text, path)
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(str(path), int(line[1]) if line else 0, "", str(error)) from None
    except RecursionError:
        raise ConfigError(str(path), 0, "", "arrays or tables are nested too deeply") from None


def _check_shape(text: str, path: str | Path) -> None:
    """Refuse text that is not a configuration and takes a parser quadratic time."""
    for number, line in enumerate(outside_strings(text).splitlines(), 1):
        if line.count(".") > _MAX_PARTS:
            problem = f"a key or number with more than {_MAX_PARTS} dots"
            raise ConfigError(str(path), number, "", problem)
        if _LONG_NUMBER.search(line):
            raise ConfigError(str(path), number, "", "a number has too many digits")


def _section(
    raw: Any,
    kind: type[T],
    keys: tuple[str, ...],
    where: _Where,
    flags: Mapping[str, Any],
    base: T | None = None,
) -> T:
    if not isinstance(raw, dict):
        raise where.error(keys, "is a section")
    for key, value in raw.items():
        if any("\0" in text for text in _texts(value)):
            raise where.error((*keys, key), "has a NUL character")
    try:
        given = convert(raw, kind, read_amount)
    except SchemaError as error:
        inside = error.field.partition("[")[0]
        raise where.error((*keys, inside) if inside else keys, error.problem) from None
    values = {key: getattr(given, key) for key in raw} | dict(flags)
    return msgspec.structs.replace(base if base is not None else kind(), **values)


def _texts(value: object) -> Iterator[str]:
    """Yield the strings in an option's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (text for text in value if isinstance(text, str))


def _check(config: Config, where: _Where) -> None:
    """Refuse combinations of options that are valid separately but not together."""
    tables = {("defaults",): config.defaults} | {("vm", p): o for p, o in config.vm.items()}
    for keys, vm in tables.items():
        try:
            budget_of(vm, _ANY_MEMORY_BYTES)
        except LayoutError as error:
            raise where.error(keys, str(error)) from None
        _check_policy(vm, keys, where)
    pressure = config.pressure
    goals: float | str = pressure.total_budget or pressure.psi_target or pressure.promotion_target
    goals = goals or pressure.psi_trigger or pressure.cgroup
    if not goals and not any(vm.budget for vm in tables.values()):
        raise where.error(
            (),
            "nothing to do: give a budget, or one of total_budget, psi_target, psi_trigger, "
            "promotion_target and cgroup",
        )
    for mark in ("high", "low"):
        for keys, vm in tables.items():
            if getattr(vm, mark).share is None and not vm.budget:
                raise where.error((*keys, mark), "a size makes sense with a budget only")
    shares = ("psi_target", "proactive_step", "trigger_step", "cgroup_high", "promotion_target")
    for share in shares:
        if getattr(pressure, share) > 1:
            raise where.error(("pressure", share), "more than 100%")
    for keys, vm in tables.items():
        if not 1 / 65536 <= vm.fraction <= 1:
            raise where.error((*keys, "fraction"), "need a share from 1/65536 to 100%")
        if not vm.max_loss:
            problem = "need more than 0%: what is not cleared is never known; off: no bound"
            raise where.error((*keys, "max_loss"), problem)
    if config.daemon.interval <= 0:
        raise where.error(("daemon", "interval"), "need more than 0s")
    if 3 * config.daemon.interval > MAX_SECONDS:
        problem = "need at most 8h: a lease of three intervals is at most 24h"
        raise where.error(("daemon", "interval"), problem)
    if pressure.psi_trigger:
        from kvmhost.reclaim.pressure.psi import parse_trigger

        try:
            parse_trigger(pressure.psi_trigger)
        except ValueError as error:
            raise where.error(("pressure", "psi_trigger"), str(error)) from None


def _check_policy(vm: VmOptions, keys: tuple[str, ...], where: _Where) -> None:
    """Refuse an unknown policy, and options that the policy does not have."""
    from kvmhost.reclaim.policy.registry import options_of

    try:
        takes = options_of(vm.policy)
    except LayoutError as error:
        raise where.error((*keys, "policy"), str(error)) from None
    unknown = sorted(set(vm.policy_options) - set(takes))
    if unknown:
        text = f"policy {vm.policy}: {unknown_name('option', unknown[0], takes)}"
        raise where.error((*keys, "policy_options"), text)
    if vm.policy == "lru_gen" and "caps" in vm.policy_options:
        reason = _why_not_caps(vm.policy_options)
        if reason:
            raise where.error((*keys, "policy_options"), f"policy lru_gen: {reason}")


def _why_not_caps(options: Mapping[str, object]) -> str:
    """Return what is wrong with the capabilities of lru_gen; "" if nothing is."""
    from kvmhost.reclaim.policy.lru_gen import why_not

    caps = options["caps"]
    if not isinstance(caps, int) or isinstance(caps, bool):
        return "caps: need a number"
    return why_not(caps, bool(options.get("probes")))
