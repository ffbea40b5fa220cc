"""For every test: the platform, a compile cache that the workers share, and the minutes each marker took.

What jax reads when it is imported is set here, before any test module imports it.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

# Tests compile far more than they compute: without LLVM's optimisations a third of the compile time is gone. What XLA itself does to a
# program (fusion, copies, collectives) is the same.
FLAGS = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "PJRT_NPROC": "32",  # XLA:CPU takes a thread per device; with 8, two programs of 8 devices in flight wait for each other for ever
    "JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "tokeff" / "xla-tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
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

MARKERS = ("core", "interp", "aot", "peers", "slow")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Some hundred programs of every method would be more memory maps than Linux allows a process."""
    import sys

    if "jax" in sys.modules:
        from tokeff.compat import forget_programs

        forget_programs()


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
