"""For every test: the platform, a compile cache that the workers share, and the minutes each marker took.

What jax reads when it is imported is set here, before any test module imports it.
"""

import gc
import itertools
import os
from collections import Counter
from pathlib import Path

import pytest

# Tests compile far more than they compute. Without LLVM's optimisations, with XLA's older emitter of loops in the place of MLIR's and with
# one LLVM module a program, two thirds of the compile time are gone. What XLA itself does to a program (fusion, copies, collectives) is
# the same but for one thing: that emitter knows no scatter, which becomes a loop. Tests that read compiled text use `tiny.compiled`.
FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_backend_optimization_level": 0,
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_cpu_parallel_codegen_split_count": 1,
}
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "PJRT_NPROC": "32",  # XLA:CPU takes a thread per device; with 8, two programs of 8 devices in flight wait for each other for ever
    "JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "tokeff" / "xla-tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "1",  # or pytest's deep stacks are written into every operation of every program
    # TPUs that exist only for the compiler, read when libtpu starts.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # several pytest-xdist workers hold the compiler at once
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # this and the rest only quiet the log
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}.items():
    os.environ.setdefault(name, value)

DONE = itertools.count()
MARKERS = ("core", "interp", "aot", "peers", "slow", "proof")


def pytest_collection_finish(session):
    """Tracing makes many small objects that live long: with Python's own thresholds a sixth of the time goes to looking through them."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and grouped and "@" not in grouped[0].nodeid:
        raise pytest.UsageError("this pytest-xdist does not see groups of tests under this pytest; install '.[test]' again")
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Some hundred programs of every method would be more memory maps than Linux allows a process, and many gigabytes. Counting maps
    takes as long as a small test, so not every test does."""
    import sys

    if "jax" in sys.modules and next(DONE) % 8 == 0:
        from tokeff.compat import forget_programs

        forget_programs(40_000)


def pytest_terminal_summary(terminalreporter):
    """Print the minutes of work behind each marker: summed over the workers, so more than the clock shows."""
    seconds, tests = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for marker in MARKERS:
                if isinstance(report, pytest.TestReport) and marker in report.keywords:
                    seconds[marker] += report.duration
                    tests[marker] += report.when == "call"
    if seconds:
        said = (f"{marker} {seconds[marker] / 60:.1f} ({tests[marker]} tests)" for marker in MARKERS if marker in seconds)
        terminalreporter.write_line(f"minutes by marker: {', '.join(said)}")
