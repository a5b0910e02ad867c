"""``kvmhost guests build``: build a guest image from a C file.

The file includes "guest.h", which is installed with kvmhost, and defines
guest_main(); PARAM() lines name its parameters. docs/guests.md describes the contract,
docs/examples/own_guest.c is an example. The compiler is $KVMHOST_GUEST_CC, else $CC, else cc.

exit status: 0; 2 if the source does not compile; 126 if there is no compiler
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kvmhost.boot.image import read_image
from kvmhost.errors import CapabilityError, ImageError
from kvmhost.files import check_target, write_file
from kvmhost.guests.build import CompilerMissingError, GuestBuildError, compile_guest
from kvmhost.temporary import temporary_folder
from kvmhost.tools.args import about
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option

__all__ = ["main", "parser"]


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost guests build",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="FILE.c", type=Path, help="the guest's source")
    add_option(
        parser, "--out", metavar="FILE", help="the image (default: FILE.elf beside the source)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Compile, check that the result is an image, and print how to run it."""
    args = parser().parse_args(argv)
    image = build(args.source, args.out or args.source.with_suffix(".elf"))
    print(f"{image}: kvmhost run {image if '/' in str(image) else f'./{image}'}")
    return 0


def build(source: Path, image: Path) -> Path:
    """Compile a guest.

    :raises ImageError: if the source cannot be read or compiled, or yields an invalid image
    :raises CapabilityError: if there is no compiler
    :raises LayoutError: for a link of another user at the image's place
    """
    if not source.is_file():
        raise ImageError(str(source), "source", "no such file")
    if image.resolve() == source.resolve():
        raise ImageError(str(source), "output", "is the source itself")
    check_target(image)
    with temporary_folder("kvmhost-build-") as folder:
        # The compiler follows links and leaves half a file when it fails.
        built = _compile(source, folder / image.name)
        write_file(image, built.read_bytes(), sync=False, mode=0o666)
    return image


def _compile(source: Path, image: Path) -> Path:
    """Compile a guest into a directory of this process, and check the image."""
    try:
        compile_guest(source, image)
    except CompilerMissingError as error:
        raise CapabilityError("guests build", "a C compiler", str(error), "install gcc") from error
    except GuestBuildError as error:
        raise ImageError(str(source), "source", str(error).strip()) from error
    read_image(image)
    return image
