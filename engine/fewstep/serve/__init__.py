"""An HTTP server that draws images from an artefact."""

from fewstep.serve.app import create_app
from fewstep.serve.server import run

__all__ = ["create_app", "run"]
