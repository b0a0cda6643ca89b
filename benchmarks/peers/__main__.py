"""Measure peers on the demo model, one JSON file each, in the form of `vqkv compare --json`.

    python -m benchmarks.peers quanto-2 faiss-pq-4d8b --out benchmarks/results/peers

All peers if none is named. `make peers` installs what they need.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.peers.measure import Bench
from benchmarks.peers.roster import roster
from vqkv import load_model
from vqkv.calibration import read_text
from vqkv.cli.progress import progress_bars
from vqkv.evaluation.compare import Settings
from vqkv.evaluation.exact import ExactLogits
from vqkv.provenance import provenance
from vqkv.texts import CALIBRATION_MIX, EVALUATION_TEXTS, bundled_text


def main() -> int:
    """Measure and write; 3 where a canary failed."""
    made = roster()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(made)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers"))
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=8192, help="to score, per text")
    parser.add_argument("--passages", type=int, default=4, help="repeated ones of each length")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(made)):
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(made)}")

    model, tokenizer = load_model("demo")
    settings = Settings(
        calibration_texts=tuple(map(bundled_text, CALIBRATION_MIX)),
        calibration_tokens=arguments.calibration_tokens,
        tokens=arguments.tokens,
        passages=arguments.passages,
    )
    calibration = [read_text(path) for path in settings.calibration_texts]
    texts = [read_text(bundled_text(name)) for name in EVALUATION_TEXTS]
    arguments.out.mkdir(parents=True, exist_ok=True)
    blind = False
    with tempfile.TemporaryDirectory() as scratch, progress_bars() as tell:
        exact = ExactLogits(model, Path(scratch))
        bench = Bench(model, tokenizer, settings, exact, tell)
        for name in arguments.names or made:
            peer = made[name](model.config)
            rows = [vars(row) for row in bench.rows(peer, calibration, texts)]
            blind = blind or not all(row["evaluation"]["canary_ok"] for row in rows)
            data = {
                "provenance": {
                    **provenance(),
                    "command": f"python -m benchmarks.peers {name}",
                },
                "peer": peer.package,
                "model": "demo",
                "settings": {
                    **vars(settings),
                    "calibration_texts": [path.name for path in settings.calibration_texts],
                },
                "rows": rows,
            }
            text = json.dumps(data, indent=2, allow_nan=False)
            (arguments.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return 3 if blind else 0


if __name__ == "__main__":
    sys.exit(main())
