"""compute-sanitizer over every hand-written kernel: memcheck, racecheck, synccheck, initcheck.

    python tests/sanitize.py [--out FILE.json] [--tool TOOL ...] [--family FAMILY ...]

Needs a GPU and the CUDA toolkit's compute-sanitizer. A family of kernels (sanitized_calls.py) and a
tool are one process; JOBS run side by side. A process writes each call's name before it runs it and
its error afterwards, so one that hangs costs the calls that were left, and is named. Prints a line
a family and tool, and which witnesses (sanitizer_witnesses.py) a tool flags; exit code 1 when a
tool complains, a result is wrong or a call did not end.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
JOBS = 12
TOTAL_SECONDS = 110.0
FIRST_PORT = 49152  # the tool talks to its target through a port: 16 for each process
FINDINGS = 8  # kept of each process


# Calls, in the process under the tool


def run_family(family: str, journal: Path) -> None:
    """Run every call of a family (in the emulator where there is no GPU), a line of JSON before
    each and after it."""
    import sanitized_calls
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with journal.open("w", buffering=1) as file:
        for call in sanitized_calls.calls(family):
            file.write(json.dumps({"call": call.name}) + "\n")
            try:
                error = call.error(device)
                line = {"call": call.name, "error": error, "right": error <= call.allowed}
            except Exception as exception:  # the tool ended the kernel: its report says why
                text = f"{type(exception).__name__}: {exception}"[:200]
                line = {"call": call.name, "error": text, "right": False}
            file.write(json.dumps(line) + "\n")
    os._exit(0)  # the driver's exit handlers may hang after a kernel that was ended


def compile_all(families: list[str]) -> int:
    """Every program of their calls into the kernel cache, so that no tool waits for ptxas."""
    import sanitized_calls
    import torch

    from mirage_hello.ptx import loader

    programs: set[loader.Program] = set()

    def collect(program: loader.Program, *launch: Any, **more: Any) -> None:
        programs.add(program)

    loader.Program.launch = collect  # type: ignore[method-assign]
    for family in families:
        for call in sanitized_calls.calls(family):
            with contextlib.suppress(Exception):  # the run under a tool meets it again, and says it
                call.run(*call.args)
    arch = loader.device_arch(0) if torch.cuda.is_available() else "sm_90a"
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(program.compile, arch) for program in programs]
    return sum(job.exception() is None for job in jobs)


# The tool's processes


def sanitizer() -> str:
    """compute-sanitizer of PATH or of the toolkit."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    found = [f"{p}/{folder}/compute-sanitizer" for p in places for folder in ("bin", ".")]
    found += [f"{p}/compute-sanitizer/compute-sanitizer" for p in places]
    for path in [shutil.which("compute-sanitizer"), *found]:
        if path and os.path.isfile(path):
            return path
    sys.exit("no compute-sanitizer: looked in PATH, $CUDA_HOME and /usr/local/cuda")


def said(option: str) -> str:
    done = subprocess.run([sanitizer(), option], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def command(tool: str, port: int, known_options: str) -> list[str]:
    """The tool with those of our options that this release of it has."""
    wanted = {
        "--error-exitcode": "9",
        "--print-limit": "20",
        "--show-backtrace": "device",
        "--destroy-on-device-error": "kernel",  # the next call runs all the same
        "--target-processes": "application-only",
        "--launch-timeout": "100",
        "--port": str(port),
    }
    if tool == "initcheck":  # it does not see what TMA stores write; parity says what is missing
        wanted["--check-api-memory-access"] = "no"
    else:  # torch's own kernels; ours are extern "C"
        wanted["--kernel-name-exclude"] = "regex=^_Z"
    options = [part for pair in wanted.items() if pair[0] in known_options for part in pair]
    return [sanitizer(), "--tool", tool, *options]


def run_tool(
    family: str, tool: str, port: int, known_options: str, folder: Path, end: float
) -> dict[str, Any]:
    """One process: what the tool said and what each call gave."""
    begun, stem = time.time(), f"{family}-{tool}".replace(" ", "_")
    journal, log = folder / f"{stem}.jsonl", folder / f"{stem}.log"
    script = [sys.executable, "-P", __file__, "--run", family, str(journal)]
    here = str(Path(__file__).parent)
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    # Every tensor an allocation of its own, so that memcheck sees where it ends.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths}
    left, code = end - begun, None
    if left > 5:
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command(tool, port, known_options), *script],
                stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
    text = log.read_text(errors="replace") if log.exists() else ""
    return {
        "family": family,
        "tool": tool,
        "exit_code": code,
        "seconds": round(time.time() - begun, 1),
        **read_journal(journal),
        **read_log(text),
    }


def read_journal(journal: Path) -> dict[str, Any]:
    """Calls that were right, those that were not, and the one that did not end."""
    lines = [json.loads(t) for t in journal.read_text().splitlines()] if journal.exists() else []
    ended = {line["call"]: line for line in lines if "right" in line}
    begun = [line["call"] for line in lines if "right" not in line]
    return {
        "right": sum(line["right"] for line in ended.values()),
        "wrong": [line for line in ended.values() if not line["right"]],
        "not_ended": [name for name in begun if name not in ended],
    }


def read_log(text: str) -> dict[str, Any]:
    """The tool's own count, and the first lines of its findings, each counted once."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    lines = [t.removeprefix("=========").strip() for t in text.splitlines() if "=====" in t]
    kinds = r"(Error|Warning|Invalid|Uninit|Barrier|Race|at \w+)"
    told = [line for line in lines if re.match(kinds, line)]
    counts = {line: told.count(line) for line in told}
    most = sorted(counts.items(), key=lambda item: -item[1])[:FINDINGS]
    return {
        "errors": int(summaries[-1]) if summaries else None,
        "kernels": sorted(set(re.findall(r"\bat (\w+)\+0x", text))),
        "findings": [f"{count} x {line[:160]}" for line, count in most],
        "tail": [] if summaries else text.splitlines()[-5:],
    }


def is_clean(result: dict[str, Any]) -> bool:
    complaints = result["wrong"] or result["not_ended"] or result["errors"] != 0
    return not complaints and result["right"] > 0


def describe(result: dict[str, Any]) -> str:
    """`attention fp8     racecheck  clean: 4 calls right, 0 errors, 21 s`."""
    if result["family"] == "witnesses":
        return f"{'witnesses':16} {result['tool']:9} flags {', '.join(result['kernels']) or 'none'}"
    parts = [f"{result['right']} calls right", f"{result['errors']} errors"]
    parts += [f"{line['call']}: {line['error']}" for line in result["wrong"][:3]]
    parts += [f"did not end: {name}" for name in result["not_ended"]]
    parts.append(f"{result['seconds']:.0f} s")
    verdict = "clean" if is_clean(result) else "NOT CLEAN"
    lines = [f"{result['family']:16} {result['tool']:9} {verdict}: {', '.join(parts)}"]
    lines += [f"    {text}" for text in [*result["findings"][:4], *result["tail"]]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--tool", action="append", choices=TOOLS)
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS)
    parser.add_argument("--logs", type=Path, help="keep the tools' own words in this folder")
    parser.add_argument("--run", nargs=2, metavar=("FAMILY", "JOURNAL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_family(args.run[0], Path(args.run[1]))
    import sanitized_calls

    end = time.time() + args.seconds
    asked = [
        subprocess.run([sanitizer(), f"--{o}"], capture_output=True) for o in ("help", "version")
    ]
    known_options, version = ((a.stdout + a.stderr).decode() for a in asked)
    families = [f for f in sanitized_calls.FAMILIES if not args.family or f in args.family]
    families = [f for f in families if sanitized_calls.calls(f)]
    print(f"{compile_all(families)} programs compiled", flush=True)
    runs = [(family, tool) for tool in args.tool or TOOLS for family in families]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
            jobs = [
                pool.submit(run_tool, *run, FIRST_PORT + 16 * i, known_options, folder, end)
                for i, run in enumerate(runs)
            ]
            results = []
            for job in concurrent.futures.as_completed(jobs):
                results.append(job.result())
                print(describe(results[-1]), flush=True)
    counted = [r for r in results if r["family"] != "witnesses"]
    clean = sum(map(is_clean, counted))
    print(f"{clean} of {len(counted)} clean")
    if args.out:
        found = {"version": version.strip().splitlines()[-2:], "results": results}
        args.out.write_text(json.dumps(found, indent=1))
    return 0 if clean == len(counted) else 1


if __name__ == "__main__":
    sys.exit(main())
