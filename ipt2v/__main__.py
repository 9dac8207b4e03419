"""One shard by hand: `python -m ipt2v RUN STAGE SHARD`, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ipt2v.run_dir import STAGES, VERIFY_SPLIT

EPILOG = """examples:
  python -m ipt2v runs/vace_14b_480p-1a2b3c4d first_frame 3
  torchrun --nproc-per-node 8 -m ipt2v runs/vace_14b_480p-1a2b3c4d video 3

exit code: 0 all made, 1 some items failed (see RUN/failure) or something broke, 2 the call or the run folder is wrong
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m ipt2v", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder, as `ipt2v freeze` or `ipt2v submit` made it")
    parser.add_argument("stage", choices=(*STAGES, VERIFY_SPLIT))
    parser.add_argument("shard", type=int, help="0-based")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    from ipt2v.run import run_shard  # here, so that --help needs no torch

    try:
        result = run_shard(chosen.run, chosen.stage, chosen.shard)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
