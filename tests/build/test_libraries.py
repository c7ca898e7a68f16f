"""What the built shared libraries export, and what they load and from where."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

GGML_LIBRARIES = {"libggml.so.0", "libggml-base.so.0", "libggml-cpu.so.0"}


@contextmanager
def opened(library: Path) -> Iterator[ELFFile]:
    with library.open("rb") as stream:
        yield ELFFile(stream)


def symbols(library: Path, *, defined: bool) -> set[str]:
    """Names of the dynamic symbols that the library defines, or that it takes from elsewhere."""
    with opened(library) as elf:
        table = elf.get_section_by_name(".dynsym")
        assert isinstance(table, SymbolTableSection)
        return {s.name for s in table.iter_symbols() if s.name and (s["st_shndx"] != "SHN_UNDEF") == defined}


def dynamic_entries(library: Path, tag: str, value: str) -> list[str]:
    with opened(library) as elf:
        section = elf.get_section_by_name(".dynamic")
        assert isinstance(section, DynamicSection)
        return [str(getattr(entry, value)) for entry in section.iter_tags(tag)]


@pytest.fixture(scope="module")
def declared(root: Path) -> set[str]:
    """The functions that the public header declares."""
    header = (root / "native" / "include" / "pyengine.h").read_text(encoding="utf-8")
    return set(re.findall(r"^PYE_API [^;(]*?\b(pye_\w+)\(", header, re.MULTILINE))


def test_library_exports_the_public_header_and_the_backend_entry_only(native_folder: Path, declared: set[str]) -> None:
    assert len(declared) >= 10
    assert symbols(native_folder / "libpyengine.so", defined=True) == declared | {"ggml_backend_init"}


def test_binding_has_every_declared_function(native_build: ModuleType, declared: set[str]) -> None:
    from pyengine import _native

    assert {name for name in dir(_native.lib) if not name.isupper()} == declared


def test_library_names_the_ggml_libraries_beside_it(native_folder: Path) -> None:
    library = native_folder / "libpyengine.so"
    assert set(dynamic_entries(library, "DT_NEEDED", "needed")) >= GGML_LIBRARIES
    assert dynamic_entries(library, "DT_RUNPATH", "runpath") == ["$ORIGIN/../llama_cpp/lib"]
    assert dynamic_entries(native_folder / "_native.abi3.so", "DT_RUNPATH", "runpath") == ["$ORIGIN"]


def test_binding_keeps_to_the_stable_interface(native_folder: Path) -> None:
    """Python's private functions differ between its versions, and the wheel is for four of them."""
    used = symbols(native_folder / "_native.abi3.so", defined=False)
    assert not {name for name in used if name.startswith("_Py") and name not in ("_Py_NoneStruct", "_Py_Dealloc")}


@pytest.mark.parametrize("stock_first", [True, False])
def test_one_ggml_in_the_process(stock_first: bool) -> None:
    """llama-cpp-python installs each library under several names as separate files. A second copy of ggml would have
    its own registry of back-ends, and llama.cpp would never meet ours."""
    order = ["llama_cpp", "pyengine._native"] if stock_first else ["pyengine._native", "llama_cpp"]
    script = f"import {order[0]}, {order[1]}\nprint(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    loaded = {line.split()[-1] for line in maps.splitlines() if re.search(r"/libggml[^/]*$", line)}
    assert {Path(path).name for path in loaded} == GGML_LIBRARIES
