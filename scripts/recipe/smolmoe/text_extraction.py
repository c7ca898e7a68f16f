"""Documentation formats to plain text."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from lxml import etree, html

_NAVIGATION = (
    "//script|//style|//head|//nav|//*[@class='related' or @class='sphinxsidebar' or @class='navheader' "
    "or @class='navfooter' or @class='toc' or @class='headerlink' or @class='footer']"
)
_ENDS_LINE = "//p|//div|//h1|//h2|//h3|//h4|//li|//dt|//dd|//tr|//pre"
_ENDS_BLOCK = "//p|//h1|//h2|//h3|//h4|//pre|//dl|//ul"
_POD_COMMAND = re.compile(r"(?m)^=(?:head\d|item|over|back|cut|encoding|for|begin|end|pod)[^\n]*")
_POD_FORMAT = re.compile(r"[BICFLSXZ]<+\s?([^<>]*?)\s?>+")


def read_text(path: Path) -> str:
    """A file's text, unpacked if it is gzip data (dictzip included), whatever its name."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    return data.decode("utf-8", "replace")


def html_text(path: Path) -> str:
    """The running text of an HTML page, without navigation; "" for a page that has none."""
    try:
        root = html.fromstring(re.sub(r"<\?xml[^>]*\?>", "", read_text(path)))
    except etree.ParserError:
        return ""
    for element in root.xpath(_NAVIGATION):
        if element.getparent() is not None:
            element.drop_tree()
    for selection in (_ENDS_LINE, _ENDS_BLOCK):
        for element in root.xpath(selection):
            element.tail = "\n" + (element.tail or "")
    for paragraph in root.xpath("//p"):
        _join_source_lines(paragraph)
    return root.text_content()


def _join_source_lines(paragraph: html.HtmlElement) -> None:
    """Line breaks inside a paragraph's source mean nothing; the paragraph's tail is outside of it."""
    for node in paragraph.iter():
        if node.text:
            node.text = node.text.replace("\n", " ")
        if node is not paragraph and node.tail:
            node.tail = node.tail.replace("\n", " ")


def pod_text(path: Path) -> str:
    """Perl's documentation format without commands and formatting codes."""
    text = _POD_COMMAND.sub(lambda match: re.sub(r"^=\S+\s*", "", match.group()), read_text(path))
    return _POD_FORMAT.sub(r"\1", text)


def join_wrapped_lines(text: str) -> str:
    """Join hard-wrapped prose; indented lines and list items keep their line."""
    return re.sub(r"(?<=[^\n])\n(?=[^\s\d*\-•])", " ", text)


def tidy(text: str) -> str:
    """Drop carriage returns, pilcrows and trailing blanks; allow one empty line in a row."""
    text = text.replace("\r", "").replace("¶", "").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
