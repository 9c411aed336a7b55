"""The namespace of our operators: one a copy of this package, for it may be loaded twice."""

from __future__ import annotations

import zlib

_ROOT = __name__.split(".")[0]
# A host names the package after its path; the installed one keeps the plain name.
NAMESPACE = "layerloom" if _ROOT == "layerloom" else f"layerloom_{zlib.crc32(_ROOT.encode()):08x}"
