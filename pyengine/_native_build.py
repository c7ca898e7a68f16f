"""Generate the C source of pyengine._native, the cffi binding of native/include/pyengine.h. Runs at build time only.

python _native_build.py HEADER OUTPUT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

BEGIN, END = "/* cffi: begin */", "/* cffi: end */"


def declarations(header: str) -> str:
    """The declarations between the two marks of the header, as cffi reads them. Raises ValueError without the marks."""
    if header.count(BEGIN) != 1 or header.count(END) != 1:
        raise ValueError(f"the header must have each of the marks {BEGIN!r} and {END!r} once")
    return re.sub(r"\bPYE_API\b", "", header.split(BEGIN)[1].split(END)[0])


def main() -> None:
    from cffi import FFI

    header, output = Path(sys.argv[1]), Path(sys.argv[2])
    binding = FFI()
    binding.cdef(declarations(header.read_text(encoding="utf-8")))
    # The compiler sees the header itself beside cffi's reading of it, and refuses any contradiction between the two.
    binding.set_source("pyengine._native", '#include "pyengine.h"', py_limited_api=True)
    binding.emit_c_code(str(output))


if __name__ == "__main__":
    main()
