"""One rank of a run that `fewstep` launched itself: `python -m fewstep.train recipe.json [--resume]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fewstep import config, host
from fewstep.errors import UserError
from fewstep.train import train


def main(arguments: list[str]) -> int:
    host.prepare()
    recipe = config.from_dict(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    try:
        train(recipe, resume="--resume" in arguments[1:])
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not any(words in str(error) for words in ("closed by peer", "reset by peer")):  # gloo's words
            raise
        print("fewstep: another process of this run has stopped.", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
