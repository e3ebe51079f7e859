"""Serving an artefact on a port until it is interrupted."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from fewstep.errors import UserError
from fewstep.runtime.student import load


def run(path: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve the artefact at `path` until Ctrl-C; port 0 takes a free one.

    Raises UserError for a bad artefact, and where the port is taken, forbidden or out of range.
    """
    from fewstep.serve.app import create_app

    try:
        import uvicorn
    except ImportError as error:
        raise UserError("the server needs two packages: pip install fastapi uvicorn.") from error
    listener = listen(host, port)
    with listener:
        app = create_app(load(path), Path(path).resolve().name)
        address, chosen = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        print(f"serving {path} at http://{shown}:{chosen}/ (Ctrl-C stops)", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is known before the model is loaded."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise UserError(f"port is {port!r}, it must be a whole number from 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"host {host!r} is not an address of this machine; use 127.0.0.1 or 0.0.0.0.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is taken; stop its server or choose another with --port."
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} is not allowed for this user; choose one above 1023 with --port.") from error
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}); choose another address.") from error
    return listener
