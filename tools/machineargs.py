"""Arguments of the commands that boot a guest: the machine, and its store of evicted pages."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvmhost.pager.options import MAX_PREFETCH_PAGES, StoreOptions
from kvmhost.tools.args import seconds, size_bytes
from kvmhost.tools.vocabulary import add_option
from kvmhost.vm.names import CODECS

__all__ = ["add_machine_arguments", "add_store_arguments", "store_options"]


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every command that boots a guest takes."""
    add_option(parser, "--engine")
    add_option(
        parser,
        "--mem",
        help="guest memory, for example 256M; a bare number is bytes (default: 64M, or 128M for "
        "images of a PC)",
    )
    add_option(parser, "--vcpus")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the guest: a number, of pages also a size (64M), of a part also a "
        "share (1/4, 25%%); may be repeated; kvmhost guests NAME lists them",
    )


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select where evicted pages are stored."""
    parser.add_argument(
        "--store",
        type=_store_path,
        default=None,
        metavar="memory|FILE",
        help="keep evicted pages in memory, or in a file that is created and removed "
        "(default: memory)",
    )
    parser.add_argument(
        "--codec",
        choices=CODECS,
        default="auto",
        help="compression of evicted pages (default: auto, which is lz4 if it is installed)",
    )
    parser.add_argument(
        "--store-limit",
        type=size_bytes,
        default=0,
        metavar="SIZE",
        help="memory, or bytes of the file, that the store may use, at least 32K; a full store "
        "refuses evictions (default: no limit)",
    )
    parser.add_argument(
        "--refuse-incompressible",
        action="store_true",
        help="keep pages that do not compress resident (default: they are stored as they are)",
    )
    add_option(
        parser,
        "--prefetch",
        help="when an evicted page is touched, also bring back up to this many pages after it "
        f"that were evicted together with it, at most {MAX_PREFETCH_PAGES}",
    )
    parser.add_argument(
        "--memory-wait",
        type=seconds,
        default="1m",
        metavar="TIME",
        help="how long a fault waits for memory of the host before the VM ends (default: 1m)",
    )


def _store_path(text: str) -> Path | None:
    return None if text == "memory" else Path(text)


def store_options(args: argparse.Namespace) -> StoreOptions:
    """Return the store options given by the arguments of :func:`add_store_arguments`.

    :raises LayoutError: for numbers out of range
    """
    return StoreOptions(
        codec=args.codec,
        path=args.store,
        limit_bytes=args.store_limit,
        memory_wait_s=args.memory_wait,
        refuse_incompressible=args.refuse_incompressible,
        prefetch_pages=args.prefetch,
    )
