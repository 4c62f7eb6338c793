"""What the benchmarks share: their options, how they measure, and the file they write."""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import io
import json
import platform
import threading
import time
import warnings
from pathlib import Path

import psutil


def options(description: str, **defaults: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have; a program adds its own."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    for name, default in ({"batch": 32, "repeats": 3, "threads": 1} | defaults).items():
        what = {
            "batch": "images at once",
            "repeats": "how often all is measured",
            "threads": "of PyTorch",
        }
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what[name]} (default: {default})"
        )
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser


def cost(run, *args):
    """CPU seconds, peak memory over the start in bytes, result."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            done.wait(0.005)

    start = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        before = time.process_time()
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            result = run(*args)
        seconds = time.process_time() - before
    finally:
        done.set()
        watcher.join()
    return seconds, peak[0] - start, result


def result(what: str, chosen: argparse.Namespace, rows, **more) -> dict:
    """A benchmark's record, and its file if one was asked for: no names of machines or paths."""
    found = {
        "what": what,
        "batch": chosen.batch,
        "repeats": chosen.repeats,
        "threads": chosen.threads,
        "processor": processor(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm")},
        "date": datetime.date.today().isoformat(),
        **more,
        "rows": rows,
    }
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def processor() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
