"""The binding's declarations come from the public header, and those that contradict it are refused."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from cffi import FFI


@pytest.fixture(scope="module")
def header(root: Path) -> str:
    return (root / "native" / "include" / "pyengine.h").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def declarations(native_build: ModuleType, header: str) -> str:
    text: str = native_build.declarations(header)
    return text


def compile_binding(declarations: str, root: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Compile a binding named `trial` with these declarations against the real header, as the build does."""
    binding = FFI()
    binding.cdef(declarations)
    binding.set_source("trial", '#include "pyengine.h"', py_limited_api=True)
    binding.emit_c_code(str(folder / "trial.c"))
    flags = [
        "-DPy_LIMITED_API=0x030A0000",
        "-Werror=incompatible-pointer-types",
        "-Werror=implicit-function-declaration",
    ]
    includes = [f"-I{root / 'native' / 'include'}", f"-I{sysconfig.get_path('include')}"]
    command = ["cc", "-shared", "-fPIC", *flags, *includes, "trial.c", "-o", "trial.abi3.so", *more]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


def test_declarations_are_all_that_is_public(declarations: str, header: str) -> None:
    def functions(text: str) -> list[str]:
        return re.findall(r"^(?!#).*?\b(pye_\w+)\(", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL), re.MULTILINE)

    assert "PYE_API" not in declarations
    assert functions(declarations) == functions(header)


@pytest.mark.parametrize("mark", ["/* cffi: begin */", "/* cffi: end */"])
def test_header_without_a_mark_is_refused(native_build: ModuleType, header: str, mark: str) -> None:
    with pytest.raises(ValueError, match="marks"):
        native_build.declarations(header.replace(mark, ""))


def test_true_declarations_compile(declarations: str, root: Path, tmp_path: Path) -> None:
    result = compile_binding(declarations, root, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("true", "false"),
    [
        ("const float * priorities", "const double * priorities"),
        ("pye_open(const char * path, pye_engine ** out)", "pye_open(const char * path, pye_info * out)"),
        ("pye_built_for(void)", "pye_built_against(void)"),
    ],
)
def test_false_function_does_not_compile(declarations: str, root: Path, tmp_path: Path, true: str, false: str) -> None:
    assert true in declarations
    assert compile_binding(declarations.replace(true, false), root, tmp_path).returncode != 0


def test_false_struct_cannot_be_used(declarations: str, root: Path, tmp_path: Path, native_folder: Path) -> None:
    """A declaration that leaves out a field compiles; cffi compares it with the compiler's at first use."""
    field = "    uint64_t evictions;\n"
    assert field in declarations
    link = [f"-L{native_folder}", "-lpyengine", f"-Wl,-rpath,{native_folder}", "-Wl,--allow-shlib-undefined"]
    result = compile_binding(declarations.replace(field, ""), root, tmp_path, *link)
    assert result.returncode == 0, result.stderr
    script = "import llama_cpp, trial\ntrial.ffi.new('pye_info *')\ntrial.ffi.new('pye_stats *')"
    used = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert used.returncode != 0
    assert "ffi.error: pye_stats: wrong offset for field" in used.stderr
