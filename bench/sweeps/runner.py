"""What every tile sweep does: each case in a process of its own, with a time limit.

A kernel that hangs or takes the CUDA context with it costs its own case and nothing else.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable


def main(
    file: str, stem: str, names: Iterable[str], run_case: Callable[[str], dict], limit_s: int = 40
) -> int:
    """`FILE [SUBSTRING ...]` runs every case whose name holds one of them.

    Args:
        file: the sweep's own path, which is started again for each case.
        stem: results go to $OUT/sweep-<stem>.json, rewritten after every case.
        names: of the cases.
        run_case: measures one and returns what JSON can hold.
        limit_s: seconds a case may take.
    """
    out = os.environ.get("OUT", ".")
    if len(sys.argv) > 2 and sys.argv[1] == "--case":
        with open(f"{out}/.case.json", "w") as f:
            json.dump(run_case(sys.argv[2]), f)
        return 0
    wanted = sys.argv[1:] or [""]
    results = []
    for name in names:
        if not any(part in name for part in wanted):
            continue
        try:
            command = [sys.executable, file, "--case", name]
            code: int | str = subprocess.run(command, timeout=limit_s, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "timed out"
        if code:
            print(f"{name}: failed ({code})", flush=True)
            continue
        with open(f"{out}/.case.json") as f:
            results.append(json.load(f))
        with open(f"{out}/sweep-{stem}.json", "w") as f:
            json.dump(results, f, indent=1)
    return 0
