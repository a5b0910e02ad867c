"""``kvmhost lab fetch HOST...``: download the kernels of emulated hosts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvmhost.lab.fetching import fetch, fetch_latest
from kvmhost.lab.hosts import HOSTS, find_host
from kvmhost.lab.inside import prepare
from kvmhost.tools.parser import CommandParser

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Fetch each host; print its kernel's version."""
    args = parser().parse_args(argv)
    if args.all == bool(args.host):
        parser().error("name hosts, or write --all for every one of them")
    for host in [find_host(name) for name in (HOSTS if args.all else args.host)]:
        files = (fetch_latest if args.latest else fetch)(host, _tell)
        prepare(host, _tell)
        print(f"{host.name}: kernel {files.version} is cached", flush=True)
    return 0


def _tell(line: str) -> None:
    print(f"fetching {line}", file=sys.stderr, flush=True)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost lab fetch",
        description="Download kernels from the distribution's packages, by the mirror that apt "
        "uses here; apt's own lists and caches stay as they are. Damaged files of the cache are "
        "fetched again. Exit code 126 without apt, a mirror or the package.",
    )
    parser.add_argument("host", nargs="*", metavar="HOST", help="kvmhost lab list shows all")
    parser.add_argument("--all", action="store_true", help="every host")
    parser.add_argument(
        "--latest",
        action="store_true",
        help="take the newest versions on the mirror, not the pinned ones, and boot those until "
        "the next fetch without --latest",
    )
    return parser
