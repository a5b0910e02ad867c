"""``kvmhost reclaimd``: keep VMs under a memory budget by evicting cold pages."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import typing
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from kvmhost import __version__
from kvmhost.control.paths import NameLock
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.control.metrics import Metrics
from kvmhost.reclaim.control.paths import lock_daemon, socket_of, sweep
from kvmhost.reclaim.control.server import DaemonServer, MetricsServer
from kvmhost.reclaim.daemon import Daemon
from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.policy.registry import BUILT_IN
from kvmhost.reclaim.sdnotify import SdNotifier
from kvmhost.reclaim.settings.config import Option, load, options, read_flag, to_toml
from kvmhost.reclaim.settings.options import Config, VmOptions
from kvmhost.tools.ending import EXIT_MISSING
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.reclaimlog import open_event_log
from kvmhost.tools.vocabulary import OPTIONS
from kvmhost.units import Bytes, Mark, MaxShare, Seconds, Share

__all__ = ["main", "parser"]

_EXIT_FAILED, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130

#: Options without a flag: the VMs are the positional arguments.
_POSITIONAL = ("daemon", "vms")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    known = parser()
    args = known.parse_args(argv)
    flags = _flags(args)
    config = load(args.config, flags)
    if args.print_config:
        print(to_toml(config), end="")
        return 0
    if not config.daemon.vms:
        known.error("name a VM, or a pattern such as '*' for those that run and will run")
    sweep()
    name = config.daemon.name or f"pid-{os.getpid()}"
    lock = lock_daemon(name)
    try:
        return _serve(config, args.config, flags, lock)
    finally:
        lock.release()


def _serve(config: Config, path: str | None, flags: dict[str, Any], lock: NameLock) -> int:
    context = DaemonContext.of(config, socket=str(socket_of(lock.name)))
    with contextlib.closing(context), contextlib.ExitStack() as stack:
        log = stack.enter_context(open_event_log(config.daemon))
        daemon = Daemon(
            context,
            log.tell,
            reread=None if path is None else lambda: load(path, flags),
            notifier=SdNotifier(),
        )
        metrics = Metrics(daemon)
        server = stack.enter_context(DaemonServer(daemon, metrics, lock))
        if config.daemon.metrics_port:
            stack.enter_context(_tcp(metrics, config.daemon.metrics_port))
        if sys.stderr.isatty():
            log.message("info", f"daemon socket: {server.path}")
        return _run(daemon)


def _run(daemon: Daemon) -> int:
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            daemon.reload()
            return
        received.append(number)
        daemon.stop()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        good = daemon.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in received:
        return _EXIT_INTERRUPTED
    if good or received:
        return 0
    return EXIT_MISSING if daemon.lacks_capability else _EXIT_FAILED


@contextlib.contextmanager
def _tcp(metrics: Metrics, port: int) -> Iterator[None]:
    """Serve the metrics on a port of the loopback interface too."""
    try:
        server = MetricsServer(metrics, port).start()
    except OSError as error:
        raise ConfigError(
            "flags", 0, "daemon.metrics_port", f"port {port}: {error.strerror}"
        ) from error
    with contextlib.closing(server):
        yield


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost reclaimd",
        description="Harvest accessed bits of running VMs, age their pages, and evict the "
        "coldest pages while a VM is above its budget, or proactively. Guest data stays in "
        "the VMs: the daemon may be killed and restarted at any time, and a VM keeps its "
        "limit.",
        epilog="Ends by SIGTERM (exit code 0), SIGINT (130), after --passes, or when all VMs "
        "have ended (0; 1 if one could not be managed, 126 if that is for a capability that its "
        "host lacks). SIGHUP reloads --config.",
    )
    parser.add_argument(
        "vm", nargs="*", metavar="VM", help="name of a VM, path of its socket, or a pattern: '*'"
    )
    parser.add_argument("-V", "--version", action="version", version=f"reclaimd {__version__}")
    parser.add_argument("--config", metavar="FILE", help="options in TOML; flags go on top")
    parser.add_argument(
        "--print-config", action="store_true", help="print the options in force as TOML, and end"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="vm.PATTERN.KEY=VALUE",
        help="an option of [defaults] for VMs of a name only; may be repeated",
    )
    groups: dict[str, Any] = {}
    for option in options():
        if (option.section, option.key) == _POSITIONAL:
            continue
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(f"[{option.section}]")
        _add_flag(groups[option.section], option)
    return parser


def _add_flag(group: Any, option: Option) -> None:
    flag, dest = "--" + option.key.replace("_", "-"), f"{option.section}.{option.key}"
    about = option.about
    if (option.section, option.key) == ("defaults", "policy"):
        about = f"which pages are evicted: {', '.join(BUILT_IN)}, or the name of a plug-in"
    about = about.replace("%", "%%")
    if isinstance(option.default, bool):
        group.add_argument(
            flag, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=about
        )
        return
    default = str(option.default).replace("%", "%%")
    shown = f" (default: {default})" if option.default not in ("", {}) else ""
    group.add_argument(
        flag, dest=dest, type=_reader(option), metavar=_metavar(option), help=about + shown
    )


def _metavar(option: Option) -> str:
    """Return the form of an option's value, as in :mod:`kvmhost.tools.vocabulary`."""
    shared = OPTIONS.get("--" + option.key.replace("_", "-"), {})
    kind = typing.get_args(option.kind)[0]
    return str(shared.get("metavar") or _KINDS.get(kind) or _FORMS.get(option.key, "NUMBER"))


#: Forms of options by the type of their value.
_KINDS: dict[type, str] = {
    Bytes: "SIZE",
    Seconds: "TIME",
    Share: "SHARE",
    MaxShare: "SHARE|off",
    Mark: "SIZE|SHARE",
    int: "N",
}
#: Forms of options that are text.
_FORMS = {
    "name": "NAME",
    "psi": "SOURCE",
    "psi_trigger": "TRIGGER",
    "cgroup": "PATH",
    "decisions_file": "FILE",
    "log_file": "FILE",
    "policy_options": "KEY=VALUE,...",
}


def _reader(option: Option) -> Any:
    def read(text: str) -> Any:
        try:
            return read_flag(option, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options given as flags, by section and key."""
    flags: dict[str, Any] = {}
    for option in options():
        value = getattr(args, f"{option.section}.{option.key}", None)
        if value is not None:
            flags.setdefault(option.section, {})[option.key] = value
    if args.vm:
        flags.setdefault("daemon", {})["vms"] = args.vm
    known = {option.key: option for option in options() if option.section == "defaults"}
    for given in args.set:
        where, equals, text = given.partition("=")
        table, _, rest = where.partition(".")
        pattern, _, key = rest.rpartition(".")
        if not equals or table != "vm" or not pattern or key not in known:
            keys = ", ".join(VmOptions.__struct_fields__)
            raise ConfigError(
                "flags", 0, "--set", f"{given!r}: write vm.PATTERN.KEY=VALUE, of {keys}"
            )
        try:
            value = read_flag(known[key], text)
        except ValueError as error:
            raise ConfigError("flags", 0, where, str(error)) from None
        flags.setdefault("vm", {}).setdefault(pattern, {})[key] = value
    return flags
