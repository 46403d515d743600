"""Triton's interpreter without what makes it slow: it looks through all of triton.language at every helper's call.

A launch replaces the language's builtins by NumPy's, for good reason. `InterpretedFunction.__call__`, the call of a
helper inside a kernel, does it again, a third of a test's time, though all is replaced already.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

_DONE = "_seqconv_tests_replace_once"


def replace_builtins_once_a_launch() -> None:
    """Of the interpreter, where it has been imported: Triton stays unimported, and may be compiling."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    # Another version of Triton may do without.
    if interpreter is None or _DONE in vars(interpreter) or not hasattr(interpreter, "_LangPatchScope"):
        return
    language = interpreter.tl
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[str]] = set()  # by this launch: the modules of the language that a function's file imports

    def replace_once(function: FunctionType) -> Any:
        modules = (v for v in function.__globals__.values() if v is language or v is language.core)
        names = frozenset(module.__name__ for module in modules)
        if names in replaced:
            return interpreter._LangPatchScope()
        replaced.add(names)
        return replace(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launch_anew
    setattr(interpreter, _DONE, True)
