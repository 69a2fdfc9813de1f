"""The encoder race: contestants in processes of their own take turns on the same inputs; medians, p95 and peak memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image

from metaembed.runtime.errors import MetaEmbedError
from metaembed.runtime.text import Side

from .records import Record
from .timing import gpu_memory_mib, peak_rss_mib, summarise, time_awake


@dataclass(frozen=True)
class Case:
    """A batch of equal inputs: so many words of text, an image of so many visual tokens (0: none), so many vectors back."""

    name: str
    side: Side
    words: int
    image_tokens: int
    vectors: int
    batch: int = 1

    @property
    def text(self) -> str | None:
        """Words of the demo's vocabulary; each is one token there."""
        return " ".join(("red", "umbrella", "and", "a", "blue", "anchor")[k % 6] for k in range(self.words)) or None

    @property
    def image(self) -> Image.Image | None:
        """Noise, square: neither side can skip work on it."""
        if not self.image_tokens:
            return None
        side = 28 * round(self.image_tokens**0.5)
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


CASES = (
    Case("short text query", "query", words=6, image_tokens=0, vectors=8),
    Case("long text query", "query", words=200, image_tokens=0, vectors=8),
    Case("8 short text queries", "query", words=6, image_tokens=0, vectors=8, batch=8),
    Case("image of 64 tokens", "candidate", words=0, image_tokens=64, vectors=16),
    Case("image of 256 tokens", "candidate", words=0, image_tokens=256, vectors=16),
    Case("image of 1024 tokens", "candidate", words=0, image_tokens=1024, vectors=16),
)

Runner = Callable[[], np.ndarray]
Build = Callable[..., Callable[[Case], Runner]]  # build(**options) -> prepare(case) -> run() -> embeddings (b, r, d)


@dataclass(frozen=True)
class Contestant:
    """A name, the function that builds it in its own process (importable by name), and that function's arguments."""

    name: str
    build: Build
    options: Mapping[str, Any]


def race(
    contestants: Sequence[Contestant], cases: Sequence[Case], *, rounds: int, warmup: int, note: Callable[[str], None]
) -> Iterator[list[Record]]:
    """Case by case, one record a contestant; one that cannot be built or cannot run a case is recorded with the reason.

    ``max_abs_difference`` is against the first contestant's vectors on the same input.
    """
    with ExitStack() as stack:
        running = {}
        for contestant in contestants:
            note(f"preparing {contestant.name}")
            process = stack.enter_context(_started(contestant))
            running[contestant.name] = process
        for case in cases:
            note(case.name)
            yield _race_case(running, case, rounds, warmup)


def _race_case(running: Mapping[str, Connection], case: Case, rounds: int, warmup: int) -> list[Record]:
    answers = {name: _ask(process, case) for name, process in running.items()}
    ready = {name: answer for name, answer in answers.items() if isinstance(answer, np.ndarray)}
    failed = [_base(case, name) | {"error": answer} for name, answer in answers.items() if name not in ready]
    if not ready:
        return failed
    timed = summarise(list(ready), lambda name: _ask(running[name], "run"), rounds=rounds, warmup=warmup)
    reference = next(iter(ready.values()))
    return failed + [
        _base(case, name)
        | timed[name].to_json()
        | {
            "max_abs_difference": float(np.abs(vectors - reference).max()),
            **_ask(running[name], "memory"),
        }
        for name, vectors in ready.items()
    ]


def _base(case: Case, name: str) -> Record:
    return {"input": case.name, "batch": case.batch, "image_tokens": case.image_tokens, "contestant": name}


@contextmanager
def _started(contestant: Contestant) -> Iterator[Connection]:
    """The contestant's process, spawned, so that it holds nothing of ours."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, contestant), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(timeout=10)
        if process.is_alive():
            process.terminate()


def _ask(process: Connection, what: Case | str) -> Any:
    try:
        process.send(what)
        return process.recv()
    except (EOFError, BrokenPipeError):
        raise MetaEmbedError("a contestant's process ended unexpectedly, most likely for lack of memory") from None


def _serve(connection: Connection, contestant: Contestant) -> None:
    """In the child: a Case prepares and runs once, ``run`` times one run, ``memory`` tells the peak, the end of file ends."""
    prepare, run, problem = None, None, None
    try:
        prepare = contestant.build(**contestant.options)
    except Exception as error:  # whatever it is, it becomes this contestant's record
        problem = _sentence(error)
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        if asked == "memory":
            held = gpu_memory_mib()
            connection.send({"peak_rss_mib": round(peak_rss_mib(), 1), **({"gpu_mib": held} if held else {})})
        elif asked == "run":
            assert run is not None
            connection.send(time_awake(run))
        else:
            try:
                if prepare is None:
                    raise MetaEmbedError(problem)
                run = prepare(asked)
                connection.send(run())
            except Exception as error:  # as above
                connection.send(_sentence(error))


def _sentence(error: Exception) -> str:
    if isinstance(error, MetaEmbedError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
