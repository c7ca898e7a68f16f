"""List every architecture of the pinned llama.cpp whose graph calls the common builder of expert FFNs.

    python list_moe.py            # print the list, as JSON
    python list_moe.py --write    # put it into moe_architectures.json, which is checked in
    python list_moe.py --source SRC

An architecture's graph may be its own, another one's by name (`using graph = ...`), a derived one, or one that calls a
member function that calls the builder. Read from llama.cpp's source, so that nothing is forgotten: a test runs this
again and compares. Some architectures share a graph with expert FFNs but never load experts; the list says which.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TypedDict

import model_sources
from cpp_outline import Struct, bare, functions, plain_name, structs

LIST = Path(__file__).with_name("moe_architectures.json")

BUILDER = "build_moe_ffn"
_CALL = re.compile(rf"\b{BUILDER}\s*\(")
_EXPERT_TENSORS = re.compile(r"\bLLM_TENSOR_FFN_(?:GATE_UP|GATE|UP|DOWN)_EXPS\b|\bcreate_tensor_gate_up_exps\b")


class Entry(TypedDict):
    """architecture: value of general.architecture. sources: where the builder is called. loads_experts: whether the
    architecture's own loading code names expert tensors; without it no file can have any."""

    architecture: str
    sources: list[str]
    loads_experts: bool


class Sources:
    """What the model sources define."""

    def __init__(self, folder: Path) -> None:
        texts = {p.name: bare(p.read_text()) for p in sorted((folder / "models").iterdir())}
        self.callers = {name for name, text in texts.items() if _CALL.search(text)}
        self.structs: dict[str, Struct] = {}
        self._bodies: dict[str, list[tuple[str, str, str]]] = {}  # scope -> (function, body, file)
        for name, text in texts.items():
            self.structs |= structs(text)
            for f in functions(text):
                self._bodies.setdefault(f.scope, []).append((f.name, f.body, name))

    def resolve(self, name: str, within: str) -> str | None:
        """The struct that a type's name means inside of another struct: its own, inherited, or of an outer scope."""
        scope = within
        while True:
            for candidate in self.line(scope):
                if f"{candidate}::{name}" in self.structs:
                    return f"{candidate}::{name}"
                if name in self.structs[candidate].aliases:
                    return self.resolve(self.structs[candidate].aliases[name], "")
            if not scope:
                return name if name in self.structs else None
            scope = scope.rpartition("::")[0]

    def line(self, name: str) -> list[str]:
        """The struct and all it derives from, the nearest first."""
        if name not in self.structs:
            return []
        out = [name]
        for base in self.structs[name].bases:
            found = self.resolve(base, name.rpartition("::")[0])
            out += self.line(found) if found else []
        return out

    def body(self, struct: str, function: str) -> tuple[str, str] | None:
        """(body, struct that has it) of a member function, inherited ones too; several of that name are joined."""
        for candidate in self.line(struct):
            bodies = [body for name, body, _ in self._bodies.get(candidate, []) if name == function]
            if bodies:
                return "\n".join(bodies), candidate
        return None

    def calls(self, graph: str) -> set[str]:
        """The files in which the graph, or one it derives from, calls the builder."""
        bodies = (entry for candidate in self.line(graph) for entry in self._bodies.get(candidate, []))
        return {file for _, body, file in bodies if _CALL.search(body)}


def graphs(sources: Sources, model: str) -> list[str]:
    """The graphs that a model may make."""
    found = sources.body(model, "build_arch_graph")
    if found is None:
        raise SystemExit(f"{model} has no build_arch_graph: llama.cpp's sources are not as this script knows them")
    names = [plain_name(n) for n in re.findall(r"\bmake_unique\s*<\s*([\w:]+(?:<[^<>]*>)?)\s*>", found[0])]
    resolved = [sources.resolve(name, model) for name in names]
    if not all(resolved):
        raise SystemExit(f"{model} makes graphs that are defined nowhere: {names}")
    return [g for g in resolved if g]


def loads_experts(sources: Sources, model: str) -> bool:
    """Whether a model's load_arch_tensors, or those of its bases that it calls, make expert tensors."""
    found = sources.body(model, "load_arch_tensors")
    if found is None:
        return False
    body, owner = found
    if _EXPERT_TENSORS.search(body):
        return True
    called = re.findall(r"\b(\w+)::load_arch_tensors\s*\(", body)
    return any(loads_experts(sources, base) for base in called if base != owner)


def architectures(folder: Path) -> list[Entry]:
    """The list, ordered by name. `folder` is llama.cpp's src/."""
    # Strings are names here: only comments go.
    names_of = dict(re.findall(r'\{\s*(LLM_ARCH_\w+),\s*"([^"]+)"\s*\}', (folder / "llama-arch.cpp").read_text()))
    mapping = re.findall(
        r"case\s+(LLM_ARCH_\w+):\s*return\s+new\s+(\w+)\s*\(", bare((folder / "llama-model.cpp").read_text())
    )
    sources = Sources(folder)
    out: list[Entry] = []
    for arch, model in mapping:
        files = set().union(*(sources.calls(graph) for graph in graphs(sources, model)))
        if files:
            where = [f"src/models/{file}" for file in sorted(files)]
            entry: Entry = {
                "architecture": names_of[arch],
                "sources": where,
                "loads_experts": loads_experts(sources, model),
            }
            out.append(entry)
    missed = sources.callers - {Path(file).name for e in out for file in e["sources"]}
    if missed or not out:
        raise SystemExit(f"{folder}: no architecture was found for the calls of {BUILDER} in {sorted(missed) or 'it'}")
    return sorted(out, key=lambda e: e["architecture"])


def checked_in() -> list[Entry]:
    """The list as it lies beside this script."""
    entries: list[Entry] = json.loads(LIST.read_text())["architectures"]
    return entries


def text_of(entries: list[Entry]) -> str:
    """The list as it is checked in: one architecture a line."""
    head = json.dumps({"llama_cpp_python": model_sources.VERSION, "builder": BUILDER})[:-1]
    lines = ",\n".join("  " + json.dumps(e) for e in entries)
    return f'{head}, "architectures": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="llama.cpp's src/ folder, instead of the pinned one")
    parser.add_argument("--write", action="store_true", help=f"write {LIST.name}")
    args = parser.parse_args()
    text = text_of(architectures(model_sources.find(args.source)))
    if args.write:
        LIST.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
