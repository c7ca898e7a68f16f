"""Runs GGUF mixture-of-experts models bigger than memory, inside unmodified llama.cpp.

from pyengine import Llama
llm = Llama("model.gguf", ram_budget="50%")
print(llm("The quick brown fox", max_tokens=16)["choices"][0]["text"])
"""

from __future__ import annotations

from pyengine import errors

TYPE_CHECKING = False  # typing's own, without the time that typing takes
if TYPE_CHECKING:
    from typing import Any

    from pyengine.bundled import bundled_model
    from pyengine.llama import Llama

    __version__: str

__all__ = ["Llama", "__version__", "bundled_model", "errors"]


def __getattr__(name: str) -> Any:
    # Lazy: the command line prints its help without loading llama.cpp, or searching for metadata. And Ctrl-C while this
    # module is imported ends in a traceback, because nothing of ours can catch it yet.
    if name == "Llama":
        from pyengine.llama import Llama

        return Llama
    if name == "bundled_model":
        from pyengine.bundled import bundled_model

        return bundled_model
    if name == "__version__":
        from importlib import metadata

        return metadata.version("pyengine")
    raise AttributeError(f"module 'pyengine' has no attribute {name!r}")
