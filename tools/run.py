"""``kvmhost run``: boot a guest, show its output, and exit with its status."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from kvmhost.devices.console import Console, open_console
from kvmhost.engine.cpumodel import CPU_MODELS
from kvmhost.errors import LayoutError
from kvmhost.machine import make_machine
from kvmhost.machine.base import BaseMachine
from kvmhost.printable import printable
from kvmhost.tools.args import count, find_image, parse_fw_cfg, parse_modules, parse_params
from kvmhost.tools.ending import ENDING_SIGNALS, EXIT_FAILED
from kvmhost.tools.machineargs import add_machine_arguments, add_store_arguments, store_options
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.terminal import log_to_stderr
from kvmhost.tools.vocabulary import add_option
from kvmhost.vm.names import LOADERS

if typing.TYPE_CHECKING:
    from kvmhost.control.paths import NameLock
    from kvmhost.control.server import ControlServer
    from kvmhost.machine.pc import PcOptions

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(_join_append(argv))
    log_to_stderr("%(message)s", "kvmhost")
    # Blocked until everything that cleanup must remove has been registered. The
    # threads started meanwhile inherit the mask: only the main thread sees signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        return _run(args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _join_append(argv: Sequence[str]) -> list[str]:
    """Join ``--append TEXT`` into one word, since the text may begin with a dash."""
    words, rest = [], iter(argv)
    for word in rest:
        text = next(rest, None) if word == "--append" else None
        words.append(word if text is None else f"{word}={text}")
    return words


def _run(args: argparse.Namespace) -> int:
    if (args.image is None) == (args.restore is None):
        raise LayoutError("need one of IMAGE and --restore FILE")
    image = args.restore or find_image(args.image)
    if not args.name:
        return _boot(args, image, None)
    # Lock the name first, so that no VM is created if the name is in use.
    from kvmhost.control.paths import NameLock

    lock = NameLock(args.name)
    try:
        return _boot(args, image, lock)
    finally:
        lock.release()


def _boot(args: argparse.Namespace, image: Path, lock: NameLock | None) -> int:
    # With --json the report is on standard output and guest output on standard error.
    out = sys.stderr if args.json else sys.stdout
    with open_console(args.serial, out) as console:
        if console.name:
            print(f"serial port: {printable(console.name)}", file=sys.stderr)
        with _make(args, image, console) as machine:
            for remark in machine.image.remarks:
                shown = printable(f"{machine.image.path}: {remark}")
                print(f"kvmhost: {shown}", file=sys.stderr)
            return _run_machine(args, machine, console, lock)


def _make(args: argparse.Namespace, image: Path, console: Console) -> BaseMachine:
    common: dict[str, typing.Any] = {
        "console_fd": console.fd,
        "name": args.name or "",
        "store": store_options(args),
        "dirty_ring_entries": args.dirty_ring,
    }
    if args.restore:
        from kvmhost.machine.restore import restore_machine

        return restore_machine(args.restore, resident_max_bytes=args.resident_max, **common)
    return make_machine(
        image,
        loader=args.loader,
        mem_bytes=args.mem or 0,
        options=_pc_options(args),
        n_vcpus=args.vcpus,
        engine=args.engine,
        params=parse_params(args.param),
        **common,
    )


def _run_machine(
    args: argparse.Namespace, machine: BaseMachine, console: Console, lock: NameLock | None
) -> int:
    server: ControlServer | None = None
    try:
        if lock is not None:
            server = _serve(machine, lock)
        if args.store is not None or args.codec != "auto":
            # Open it now: an unavailable file or codec is an error of the command.
            machine.open_pager()
        if args.tracker:
            machine.use_tracker(args.tracker)
        if args.resident_max and not args.restore:
            machine.set_limit(args.resident_max)
        # The built-in guests never read; their standard input is left unread.
        if machine.tables_gpa is None:
            console.feed(machine.serial, _interrupt_main)
        machine.start(paused=args.paused)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
        status = machine.wait(args.timeout)
        if args.json:
            _emit_report(machine, status)
        machine.serial.flush()
        return status or (EXIT_FAILED if _lost_bytes(args, machine) else 0)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        # Closing the server ends the pauses of its clients; no guest code may run then.
        machine.runner.request_stop()
        machine.serial.flush(stall_s=0.2, total_s=0.5)
        _tell_lost(args, machine)
        if server is not None:
            server.close()


def _lost_bytes(args: argparse.Namespace, machine: BaseMachine) -> int:
    """Return the number of output bytes of the guest that could not be written to its output."""
    if args.serial in ("pty", "null"):
        return 0
    serial = machine.serial
    return serial.lost_bytes + serial.flush(stall_s=0, total_s=0)


def _tell_lost(args: argparse.Namespace, machine: BaseMachine) -> None:
    """Report how much of the guest's output was lost, and why."""
    lost = _lost_bytes(args, machine)
    if args.serial == "pty" and (lost := machine.serial.lost_bytes):
        why = "nobody read the pseudo-terminal"
    elif error := machine.serial.write_error:
        why = os.strerror(error)
    else:
        why = "its reader does not read"
    if lost:
        text = f"kvmhost run: {lost} bytes of the guest's output could not be written: {why}"
        print(text, file=sys.stderr)


def _pc_options(args: argparse.Namespace) -> PcOptions | None:
    if not (args.append or args.initrd or args.fw_cfg or args.cpu != CPU_MODELS[0]):
        return None
    from kvmhost.machine.pc import PcOptions

    modules = tuple(parse_modules(args.initrd)) if args.initrd else ()
    return PcOptions(args.append, modules, parse_fw_cfg(args.fw_cfg), args.cpu)


def _interrupt_main() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost run",
        description="Boot a guest image and show its serial output.",
        formatter_class=_formatter,
        epilog="The exit code is the guest's own status; 124: timed out, 125: triple fault or "
        "another end that the guest did not choose, 2: bad image or parameters.",
    )
    parser.add_argument(
        "image",
        nargs="?",
        metavar="IMAGE",
        help="a built-in guest (kvmhost guests lists them) or an image file",
    )
    parser.add_argument(
        "--restore",
        type=Path,
        metavar="FILE",
        help="resume a VM from a snapshot; image, sizes and parameters are in the file",
    )
    add_machine_arguments(parser)
    parser.set_defaults(mem=None)
    _add_pc_arguments(parser)
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="open a control socket under this name, for reclaimd, young and other clients",
    )
    add_option(
        parser,
        "--tracker",
        default=None,
        help="start a tracker at once: auto, or one that doctor lists (default: at the first "
        "harvest)",
    )
    parser.add_argument(
        "--dirty-ring",
        type=count,
        default=0,
        metavar="ENTRIES",
        help="give each vCPU a dirty ring, a power of two from 256 to 65536, which the tracker "
        "dirty then reads instead of the dirty log (engine kvm)",
    )
    add_option(
        parser,
        "--timeout",
        help="stop the guest after this time, with exit code 124 (default: never)",
    )
    parser.add_argument(
        "--paused", action="store_true", help="wait for a resume over the control socket"
    )
    add_option(
        parser,
        "--resident-max",
        help="keep resident guest memory below this size by evicting pages, with or without a "
        "daemon; 0 is no limit (default: no limit, or with --restore the limit in the file)",
    )
    add_store_arguments(parser)
    add_option(
        parser,
        "--json",
        help="print a report as JSON when the guest ends; its output then goes to standard error",
    )
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Return argparse's formatter, with a width that is found without importing shutil."""
    try:
        columns = os.get_terminal_size(sys.__stdout__.fileno() if sys.__stdout__ else 1).columns
    except (OSError, ValueError):
        columns = 80
    return argparse.HelpFormatter(prog, width=max(columns - 2, 20))


def _add_pc_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loader",
        default="auto",
        choices=LOADERS,
        help="how the image is loaded (default: by its contents)",
    )
    parser.add_argument(
        "--append", default="", metavar="TEXT", help="arguments on the image's command line"
    )
    parser.add_argument(
        "--initrd",
        default="",
        metavar="FILE[ ARGS][,...]",
        help="modules for the image; a comma in a name is written twice",
    )
    parser.add_argument(
        "--fw-cfg",
        action="append",
        default=[],
        metavar="name=NAME,file=PATH",
        help="a file in fw_cfg, or name=NAME,string=TEXT; may be repeated",
    )
    parser.add_argument(
        "--cpu",
        default=CPU_MODELS[0],
        choices=CPU_MODELS,
        help="the processor that the image sees: the same on every host, or all that KVM "
        "supports (default: plain)",
    )
    parser.add_argument(
        "--serial",
        default="stdio",
        metavar="WHERE",
        help="the serial port's other end: stdio, file:PATH, pty or null (default: stdio)",
    )


def _serve(machine: BaseMachine, lock: NameLock) -> ControlServer:
    from kvmhost.control.server import ControlServer

    server = ControlServer(machine, lock=lock)
    server.start()
    # A VM runs whether or not somebody reads this.
    with contextlib.suppress(OSError, ValueError):
        print(f"control socket: {printable(server.path)}", file=sys.stderr, flush=True)
    return server


def _emit_report(machine: BaseMachine, status: int) -> None:
    """Print the report; msgspec is imported only here, since most guests run without it."""
    import msgspec

    from kvmhost.tools.outputs.base import emit
    from kvmhost.tools.outputs.host import PagerRow, RunReport

    pager = machine.open_pager().counters() if machine.has_pager else None
    emit(
        RunReport(
            image=machine.image.path,
            engine=machine.engine.name,
            n_vcpus=len(machine.vcpus),
            mem_bytes=machine.layout.mem_bytes,
            status=status,
            doorbells=machine.doorbells,
            exits=machine.exits,
            uptime_s=round(machine.uptime_s, 6),
            resident_bytes=machine.memory.resident_bytes(),
            peak_rss_bytes=_peak_rss_bytes(),
            pager=None if pager is None else msgspec.convert(pager, PagerRow),
        )
    )


def _peak_rss_bytes() -> int:
    """Return the peak resident memory of this process in bytes, including guest memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
