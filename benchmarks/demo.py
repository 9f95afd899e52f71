"""What `make demo` shows, kept: runs the demo and copies its report and its figure to benchmarks/results/.

python benchmarks/demo.py
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    from embedft.demo import demo

    with tempfile.TemporaryDirectory() as folder:
        report = demo(Path(folder))
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / "report.png", RESULTS / "demo.png")
    report["machine"] = machine()
    (RESULTS / "demo.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{RESULTS / 'demo.json'}\n")


if __name__ == "__main__":
    main()
