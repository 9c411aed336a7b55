"""Peak memory of a process of a test's own.

``ru_maxrss`` will not do: a new process starts with its parent's, here all that pytest ever held.
"""

import sys

import pytest

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

# Goes before a script that calls ``peak_bytes()``, or ``file_bytes()``: the pages of mapped files
# that the process touches now.
PEAK_BYTES = """
def peak_bytes(field="VmHWM:"):
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024

def file_bytes():
    return peak_bytes("RssFile:")
"""
