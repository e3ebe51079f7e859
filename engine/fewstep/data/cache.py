"""Where things made once are kept: `$FEWSTEP_CACHE`, else `$XDG_CACHE_HOME/fewstep`, else `~/.cache/fewstep`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fewstep.errors import UserError


def folder(*parts: str) -> Path:
    """The cache's folder `parts`, made if need be. Raises UserError where it cannot be made."""
    root = os.environ.get("FEWSTEP_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"
    path = base.joinpath(*parts)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {str(path)!r} cannot be made ({error.strerror}); set FEWSTEP_CACHE to a writable folder."
        ) from error
    return path


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Where another process put `path` there meanwhile, that one stays. Raises UserError where the place is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}); give a writable folder.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):
            temporary.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}); give a writable folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
