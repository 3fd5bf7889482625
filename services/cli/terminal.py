"""All commands share the code in this file: the console, the error messages and the requests to a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

console = Console(highlight=False, soft_wrap=True)
DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option("--url", help="Address of the server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """If the body fails because of a user's mistake, print one sentence on standard error and exit with code 2."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}")
    except (ValueError, RuntimeError) as error:  # Ray Serve raises RuntimeError if a deployment does not start
        _fail(str(error))


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the progress of a long task on standard error, such as a download.

    On a terminal, one line changes in place until the body ends. Elsewhere, only the first message is written.
    """
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    status = errors.status("")
    has_begun = False

    def say(news: str) -> None:
        nonlocal has_begun
        if not has_begun and not errors.is_terminal:
            errors.print(f"expertmesh: {news}", markup=False)
        elif errors.is_terminal:
            status.update(news)
            status.start()
        has_begun = True

    try:
        yield say
    finally:
        status.stop()


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"expertmesh: {sentence}", err=True)
    raise typer.Exit(2)


def fetch(url: str, path: str, key: str = "", body: dict[str, Any] | None = None) -> Any:
    """Send a POST if `body` is given, or else a GET, and return the JSON of the server's reply.

    `key` is the admin key, which is sent as a bearer token. Raises ValueError with one sentence if no server replies
    or if the reply is an error.
    """
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    method = "GET" if body is None else "POST"
    try:
        answer = httpx.request(method, url.rstrip("/") + path, headers=headers, json=body, timeout=60)
    except httpx.HTTPError as error:
        raise ValueError(
            f"no Expertmesh server answers at {url} ({type(error).__name__}); start one with: expertmesh up"
        ) from None
    if answer.is_error:
        raise ValueError(f"{url}{path} answered {answer.status_code}: {_sentence(answer)}")
    return answer.json()


def _sentence(answer: Any) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(answer.text[:200])
