"""Triton's interpreter, the one place where its kernels run without a GPU, kept working with newer numpy."""

from __future__ import annotations


def repair() -> None:
    """Let loops of interpreted kernels take run-time bounds under Triton 3.6 and numpy 2.4.

    Triton 3.6 holds a scalar as an array of one element and hands it to int(), which numpy 2.4 refuses; from 3.7 on
    Triton squeezes it itself. Values are untouched. Does nothing where Triton is missing.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or getattr(patch, "squeezes", False):
        return

    def squeezing(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    squeezing.squeezes = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = squeezing
