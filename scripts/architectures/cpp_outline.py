"""The little of C++ that is needed to see which model of llama.cpp computes what: structs with their bases and
aliases, and the bodies of functions. It knows nothing of llama.cpp's names.

Written for clang-format-like sources: no preprocessor tricks around braces, no raw strings with braces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMMENT_OR_TEXT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
_STRUCT = re.compile(r"\b(?:struct|class)\s+([\w:]+)\s*(?:final\s*)?(?::\s*([^{;]*))?$")
_USING = re.compile(r"\busing\s+(\w+)\s*=\s*([^;]+);")
_TEMPLATE_ARGUMENTS = re.compile(r"<[^<>]*>")
_ACCESS = re.compile(r"\b(?:public|protected|private|virtual)\b")
_QUALIFIED = re.compile(r"((?:\w+::)+~?\w+)\s*\(")


@dataclass
class Struct:
    """bases: as written, without access and template arguments. aliases: name -> what `using` makes it."""

    name: str  # qualified by enclosing structs
    bases: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)


@dataclass
class Function:
    """A function defined outside of its struct: `scope` is the struct's qualified name."""

    scope: str
    name: str
    body: str


def bare(text: str) -> str:
    """The source without comments, and with the content of strings and characters blanked out."""
    return _COMMENT_OR_TEXT.sub(lambda m: " " if m[0][0] == "/" else '""', text)


def plain_name(text: str) -> str:
    """A type's name without template arguments and spaces."""
    while _TEMPLATE_ARGUMENTS.search(text):
        text = _TEMPLATE_ARGUMENTS.sub("", text)
    return _ACCESS.sub("", text).strip()


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(what stands before it, content) of each brace block at the top level of `text`, in order."""
    depth, start, opened = 0, 0, 0
    for match in re.finditer(r"[{};]", text):
        sign, at = match[0], match.start()
        if sign == "{":
            if depth == 0:
                opened = at
            depth += 1
        elif sign == "}":
            depth -= 1
            if depth == 0:
                yield text[start:opened].strip(), text[opened + 1 : at]
                start = at + 1
        elif depth == 0:
            start = at + 1


def structs(text: str, within: str = "") -> dict[str, Struct]:
    """All structs of a bare source, nested ones too, by qualified name."""
    found = {}
    for head, body in blocks(text):
        match = _STRUCT.search(plain_template(head))
        if match is None:
            continue
        name = f"{within}::{match[1]}" if within else match[1]
        struct = Struct(name, [plain_name(base) for base in (match[2] or "").split(",") if base.strip()])
        outer = body
        for _, inner in blocks(body):
            outer = outer.replace(inner, "")
        struct.aliases = {m[1]: plain_name(m[2]) for m in _USING.finditer(outer)}
        found[name] = struct
        found |= structs(body, name)
    return found


def plain_template(head: str) -> str:
    """The head of a definition without `template <...>` and other template arguments."""
    return plain_name(re.sub(r"\btemplate\s*(?=<)", "", head))


def functions(text: str) -> Iterator[Function]:
    """The member functions that a bare source defines outside of their structs, constructors included."""
    pending = ""  # of a constructor whose member initialisers have braces of their own
    for head, body in blocks(text):
        match = _QUALIFIED.search(plain_template(head)) or _QUALIFIED.search(pending)
        pending = plain_template(head) if match and match.string is not pending else ""
        if match is None:
            continue
        scope, _, name = match[1].rpartition("::")
        yield Function(scope, name, body)
