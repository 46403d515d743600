"""Triton's interpreter without what makes it slow and changes nothing.

A launch replaces the language's builtins by NumPy's, for good reason; `InterpretedFunction.__call__`, the call of a
helper inside a kernel, looks through all of triton.language to do it again. Sums of integers are computed a second time
in 64 bits for an assertion that is then left out (options.debug is off). NumPy's dtypes stand in a table that is built
anew for every look-up, and for every value a type is put together, its name, too, letter by letter.
"""

from __future__ import annotations

import dataclasses
import sys
from types import FunctionType
from typing import Any

_DONE = "_seqconv_tests_made_fast"


def make_interpreter_fast() -> None:
    """Where it has been imported: Triton stays unimported, and may be compiling. Another version may do without."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or _DONE in vars(interpreter):
        return
    setattr(interpreter, _DONE, True)
    if hasattr(interpreter, "_LangPatchScope"):
        _replace_builtins_once_a_launch(interpreter)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _keep_types(interpreter)


def _replace_builtins_once_a_launch(interpreter: Any) -> None:
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


def _keep_types(interpreter: Any) -> None:
    block_type, look_up = interpreter.tl.block_type, interpreter._get_np_dtype
    build = block_type.__init__
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def np_dtype(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in dtypes:
            dtypes[scalar.name] = look_up(scalar)
        return dtypes[scalar.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            build(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key] | {"element_ty": element_ty})

    interpreter._get_np_dtype, block_type.__init__ = np_dtype, block
