"""How much memory a call needs beyond what is there already. Linux only."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")


def added_kib(call: Callable[[], object]) -> int:
    """KiB by which `call` raises the peak of the resident set, its result included.

    The process's lifetime peak is no measure of it: importing torch alone may have reached higher.
    The kernel starts the peak anew on request.
    """
    (_PROCESS / "clear_refs").write_text("5")
    before = _kib("VmRSS")
    result = call()
    added = _kib("VmHWM") - before
    del result
    return added


def _kib(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    assert found
    return int(found[1])
