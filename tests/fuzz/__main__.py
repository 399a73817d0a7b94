"""Damages checkpoints and adapters by the thousand, and counts how opening them ends.

python -m tests.fuzz --cases 3000 --out outcomes.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> int:
    from tests.fuzz.seeds import make_seeds
    from tests.fuzz.server import as_json, run, summary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000, help="number of damaged folders")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation of each folder")
    parser.add_argument("--seeds", nargs="*", help="names of the folders to damage, by default all")
    parser.add_argument("--out", type=Path, help="file for all outcomes as JSON")
    options = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as place:
        seeds = make_seeds(Path(place))
        chosen = options.seeds or list(seeds)
        each = -(-options.cases // len(chosen))
        for name in chosen:
            began = time.monotonic()
            found = run(seeds[name], name, range(options.first, options.first + each))
            outcomes += found
            print(f"{name}: {len(found)} in {time.monotonic() - began:.0f} s: {summary(found)}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(as_json(outcomes), indent=1))
    print(f"all: {len(outcomes)}: {summary(outcomes)}")
    bad = [outcome for outcome in outcomes if outcome.kind in ("traceback", "hang", "signal")]
    for outcome in bad[:20]:
        print(f"{outcome.seed} {outcome.number}: {outcome.damage}: {outcome.kind}: {outcome.message[-300:]}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
