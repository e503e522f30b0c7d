"""Coverage-guided fuzzing of every decoder with atheris: ``make fuzz``, or ``python -m tests.fuzz --seconds 600``.

Each decoder runs in a process of its own, from its samples and what earlier calls found (`--corpus`). What it should not have done
(another exception than a refusal, 10 s, 1 GB) ends its process; the input is kept in the corpus's folder as crash-*, timeout-* or oom-*,
and ``python -m tests.fuzz NAME FILE`` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from random import Random

LIMITS = ("-timeout=10", "-rss_limit_mb=1024", "-max_len=140000", "-len_control=20", "-print_final_stats=1")


def main() -> int:
    """The exit code: 0, 1 where something was found, 2 for a wrong call or without atheris."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz every decoder of bytes from the network.")
    parser.add_argument("decoder", nargs="?", help="only this one")
    parser.add_argument("input", nargs="?", type=Path, help="repeat what was found")
    parser.add_argument("--seconds", type=int, default=300, help="in all (300)")
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz"), help="folder of inputs (.fuzz)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        python = ".".join(map(str, sys.version_info[:2]))
        parser.error(f"atheris is not installed; it has wheels for Python 3.11 to 3.13 on Linux, x86_64 (this is Python {python})")
    from tests.wire.decoders import DECODERS

    if arguments.decoder not in (None, *DECODERS):
        parser.error(f"no decoder is called {arguments.decoder!r}; there are {', '.join(DECODERS)}")
    if arguments.input:
        DECODERS[arguments.decoder].decode(arguments.input.read_bytes())
        return 0
    names = [arguments.decoder] if arguments.decoder else list(DECODERS)
    seconds = max(1, arguments.seconds // len(names))
    return max([_run(name, DECODERS[name].samples, arguments.corpus / name, seconds) for name in names])


def _run(name: str, samples: tuple[bytes, ...], corpus: Path, seconds: int) -> int:
    corpus.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        (corpus / f"sample-{number}").write_bytes(sample)
    found = corpus.with_name(f"{name}-found")
    found.mkdir(exist_ok=True)
    options = [*LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={found}/"]
    done = subprocess.run([sys.executable, "-c", CHILD, name, str(corpus), *options], capture_output=True, text=True)
    executed = [line.split()[-1] for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units")]
    result = "nothing" if done.returncode == 0 else "\n".join(["", *done.stderr.splitlines()[-40:]])
    sys.stdout.write(f"{name}: {executed[0] if executed else 0} inputs, found {result}\n")
    sys.stdout.flush()
    return int(done.returncode != 0)


CHILD = "from tests.fuzz import fuzz; fuzz()"


def fuzz() -> None:
    """The process of one decoder; ends by itself."""
    import atheris

    with atheris.instrument_imports(include=["lwfed"]):
        from tests.wire.decoders import DECODERS, mutated
    decoder = DECODERS[sys.argv[1]]

    def once(data: bytes) -> None:
        with contextlib.suppress(*decoder.refuses):
            decoder.decode(data)

    def change(data: bytes, longest: int, seed: int) -> bytes:
        """By libFuzzer, or by ourselves: it knows no JSON, and most of what it makes of a message is none."""
        return atheris.Mutate(data, longest) if seed % 2 else mutated(Random(seed), (data, *decoder.samples))[:longest]

    atheris.Setup([sys.argv[0], *sys.argv[2:]], once, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
