"""Run every instruction form on the GPU and keep its answers: the emulator's truth.

    python tests/make_ptx_fixtures.py [--device cpu] [group ...]      writes $OUT/forms.npz (or ./)

Each group runs in a forked process that loads its module once.  A form that fails or hangs ends
its process; the rest of the group goes on in a new one.  The summary is $OUT/forms.json.
Copy forms.npz to tests/fixtures/ptx/.  On the CPU (a rehearsal) the emulator answers.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import ptx_forms
import torch

from mirage_hello.ptx import loader

JOBS = 6
FIRST_SECONDS = 40  # context, ptxas and the first form
FORM_SECONDS = 20  # without progress
TOTAL_SECONDS = 140


def work(names, group, folder, device):
    """Child process: run these forms of a group, one file per result."""
    try:
        device = torch.device(device)
        chosen = [f for f in ptx_forms.groups()[group] if f.name in names]
        program = loader.Program(f"forms_{group}", ptx_forms.module_text(chosen))
        for form in chosen:
            (folder / "running").write_text(form.name)
            out = ptx_forms.run(form, program, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
                (folder / "device").write_text(torch.cuda.get_device_name())
            stem = folder / str(names.index(form.name))
            np.savez(f"{stem}.part", *out)
            os.replace(f"{stem}.part.npz", f"{stem}.npz")
        (folder / "running").unlink(missing_ok=True)
    finally:
        error = sys.exception()
        if error is not None:
            (folder / "error").write_text("".join(traceback.format_exception(error)[::-1]))
        os._exit(0)  # exit handlers of the driver's clients may hang after a failed kernel


class Job:
    """A child process that runs some forms of a group."""

    def __init__(self, group, names, root, device):
        self.group, self.names = group, names
        self.folder = Path(tempfile.mkdtemp(dir=root))
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=work, args=(names, group, self.folder, device))
        self.process.start()
        self.progress, self.count = time.time(), 0
        self.limit = FIRST_SECONDS

    def finished(self):
        """Whether the child ended, or was ended because it made no progress."""
        count = sum(".part" not in p.name for p in self.folder.glob("*.npz"))
        if count != self.count:
            self.progress, self.count, self.limit = time.time(), count, FORM_SECONDS
        if self.process.is_alive() and time.time() - self.progress < self.limit:
            return False
        if self.process.is_alive():
            (self.folder / "error").write_text(f"no progress for {self.limit} s")
            self.process.kill()
        self.process.join()
        return True

    def collect(self):
        """(results by form name, failure by form name, names left to run)."""
        results = {}
        for i, name in enumerate(self.names):
            path = self.folder / f"{i}.npz"
            if path.exists():
                with np.load(path) as data:
                    results[name] = [data[k] for k in data.files]
        running, error = self.folder / "running", self.folder / "error"
        left = [n for n in self.names if n not in results]
        if not left:
            return results, {}, []
        why = error.read_text() if error.exists() else "the process died"
        if not running.exists():  # the module itself does not load: do not try again
            return results, dict.fromkeys(left, why), []
        culprit = running.read_text()
        return results, {culprit: why}, [n for n in left if n != culprit]


def run_all(groups, device):
    """Every form of `groups`, JOBS groups at a time: (results, failures, name of the device)."""
    waiting = [(g, [f.name for f in forms]) for g, forms in groups.items()]
    running, results, failures, seen = [], {}, {}, set()
    end = time.time() + TOTAL_SECONDS
    with tempfile.TemporaryDirectory() as root:
        while (waiting or running) and time.time() < end:
            while waiting and len(running) < JOBS:
                running.append(Job(*waiting.pop(0), root, device))
            for job in [j for j in running if j.finished()]:
                running.remove(job)
                if (job.folder / "device").exists():
                    seen.add((job.folder / "device").read_text())
                done, failed, left = job.collect()
                results.update(done)
                failures.update(failed)
                if left:
                    waiting.append((job.group, left))
                print(f"{job.group}: {len(done)} done, {len(left)} left", flush=True)
                for name, why in failed.items():
                    print(f"  FAILED {name}: {why.splitlines()[0][:160]}", flush=True)
            time.sleep(0.05)
        for job in running:
            job.process.kill()
            results.update(job.collect()[0])
        for name in (n for _, names in waiting for n in names):
            failures.setdefault(name, "not run: out of time")
    return results, failures, " and ".join(sorted(seen)) or "the emulator"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="*")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    chosen = parser.parse_args()
    known = ptx_forms.groups()
    groups = {g: f for g, f in known.items() if not chosen.groups or g in chosen.groups}
    forms = {f.name: f for members in groups.values() for f in members}
    results, failures, device = run_all(groups, chosen.device)
    out = Path(os.environ.get("OUT", "."))
    arrays = {f"{name}|{i}": a for name, found in results.items() for i, a in enumerate(found)}
    meta = {
        "device": device,
        "digests": {name: forms[name].digest() for name in results},
        "failures": failures,
        "ptxas": loader.assembler.ptxas_version(),
    }
    np.savez_compressed(out / "forms.npz", meta=np.array(json.dumps(meta)), **arrays)
    (out / "forms.json").write_text(json.dumps(failures, indent=1))
    size = (out / "forms.npz").stat().st_size / 1e6
    print(
        f"{len(results)} of {len(forms)} forms on {device}, {size:.1f} MB; {len(failures)} failed"
    )


if __name__ == "__main__":
    main()
