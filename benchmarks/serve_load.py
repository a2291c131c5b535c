"""Many clients of one `coda serve`: is each answer right, and how long does it take.

    python -m benchmarks.serve_load --clients=200 --seconds=60 --json=report.json

Serves the bundled text checkpoint with several adapters: its own, and others whose leaves were
moved at random. Each client has one connection, on which it asks for one to three rows of its
choice, whose answers it knows from `Predictor`, which was asked for them one by one; it waits for
the response and asks again. At the end the server is told to stop by SIGTERM while the last
requests are under way.
"""

import argparse
import asyncio
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any
import urllib.request

import jax
import numpy as np

from coda_jax import bundled, files, methods, trees
from coda_jax.checkpoints import load_adapter, load_hf, save_adapter
from coda_jax.data.vocabularies import load_vocabulary
from coda_jax.inference import Decoding, Predictor
from coda_jax.profiling import timing
from coda_jax.serving.answers import generated

_WORDS = ("def", "return", "self", "import", "os", "path", "if", "not", "None", "raise", "x = 1")
_SECONDS_TO_START = 600
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # of this machine


@dataclasses.dataclass
class Counts:
    """What clients have seen.

    Attributes:
        seconds: of each response with answers.
        rows: answered, and right.
        wrong: rows with another answer than the expected one; the first few.
        lost: requests without a response.
        refused: responses 429 or 503.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    rows: int = 0
    wrong: list[Any] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    refused: int = 0


def make_adapters(folder: pathlib.Path, count: int) -> dict[str, str]:
    """{name: folder} of so many adapters of the bundled base, the first of which is its own."""
    config, base = load_hf(bundled.CODA)
    config, params = load_adapter(bundled.CODA / "adapter", config, base)
    own, frozen = methods.partition(config, params)
    found = {"adapter0": str(bundled.CODA / "adapter")}
    for number in range(1, count):
        rng = np.random.default_rng(number)
        moved = {
            path: np.asarray(leaf) * rng.normal(1, 0.3, leaf.shape).astype(leaf.dtype)
            for path, leaf in trees.flatten(own).items()
        }
        params = trees.merge(frozen, trees.unflatten(moved))
        name = f"adapter{number}"
        save_adapter(folder / name, config, params)
        found[name] = str(folder / name)
    return found


def expected_answers(options: argparse.Namespace, adapters: dict[str, str]) -> dict:
    """{(text, adapter): answer} of texts of all lengths, each asked for alone."""
    config, params = load_hf(bundled.CODA)
    vocabulary = load_vocabulary(bundled.CODA)
    decoding = Decoding(
        max_input_length=options.input_length,
        max_decode_length=options.output_length,
        batch_size=jax.device_count(),
    )
    predictor = Predictor(config, params, decoding, vocabulary, adapters=adapters)
    answer = generated(predictor, predictor.adapters.config, vocabulary)
    rng, found = random.Random(0), {}
    for number in range(options.texts):
        words = rng.choices(_WORDS, k=rng.randint(1, options.input_length // 4))
        text = f"{number} {' '.join(words)}"
        inputs = [np.array([*vocabulary.encode(text), vocabulary.eos_id])]
        if len(inputs[0]) <= options.input_length:
            for name in adapters:
                ((_, said),) = answer(inputs, [name])
                found[text, name] = said["prediction"]
    return found


def start(options: argparse.Namespace, adapters: dict[str, str]) -> tuple[subprocess.Popen, str]:
    """The process of a server that is ready, and its address."""
    given = {
        "INITIAL_CHECKPOINT_PATH": f"'{bundled.CODA}'",
        "ADAPTERS": adapters,
        "PORT": 0,
        "BATCH_SIZE": options.batch_size,
        "MAX_QUEUE": 3 * options.clients,
        "MAX_ROWS": 3,
        "Decoding.max_input_length": options.input_length,
        "Decoding.max_decode_length": options.output_length,
    }
    command = [sys.executable, "-m", "coda_jax.cli", "serve", "--gin_file=runs/serve.gin"]
    command += [f"--gin.{name}={value}" for name, value in given.items()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    address = process.stdout.readline().strip()
    for _ in range(10 * _SECONDS_TO_START):
        try:
            _open(f"{address}/health").close()
            return process, address
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"the server at {address!r} is not ready")


async def ask(reader, writer, host: str, body: bytes) -> tuple[int, bytes]:
    """The status and the body of a response."""
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = int(re.search(r"content-length: (\d+)", answer, re.IGNORECASE)[1])
    return int(answer.split()[1]), await reader.readexactly(length)


async def client(number: int, host: str, expected: dict, until: float, counts: Counts) -> None:
    """Asks again and again."""
    rng, pairs = random.Random(number), list(expected)
    reader, writer = await asyncio.open_connection(*host.split(":"))
    try:
        while time.monotonic() < until:
            asked = rng.choices(pairs, k=rng.randint(1, 3))
            texts, names = map(list, zip(*asked, strict=True))
            body = json.dumps({"inputs": texts, "adapter": names}).encode()
            started = time.monotonic()
            status, content = await ask(reader, writer, host, body)
            if status in (429, 503):
                counts.refused += 1
                await asyncio.sleep(0.2)
                continue
            counts.seconds.append(time.monotonic() - started)
            found = [x["prediction"] for x in json.loads(content)["answers"]]
            for pair, answer in zip(asked, found, strict=True):
                if answer == expected[pair]:
                    counts.rows += 1
                else:
                    counts.wrong.append([*pair, answer, expected[pair]])
    except (OSError, EOFError, KeyError, ValueError) as error:
        counts.lost.append(f"{type(error).__name__}: {error}")
    finally:
        writer.close()


async def load(options: argparse.Namespace, address: str, expected: dict, stop) -> Counts:
    """All clients at once; `stop` is called when their last requests are under way."""
    counts, host = Counts(), address.removeprefix("http://")
    until = time.monotonic() + options.seconds
    clients = [client(n, host, expected, until, counts) for n in range(options.clients)]

    async def stop_in_the_end():
        await asyncio.sleep(options.seconds)
        await asyncio.to_thread(stop)

    await asyncio.gather(stop_in_the_end(), *clients)
    return counts


def metric(text: str, name: str) -> float:
    """The value of a metric without labels."""
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def report_of(counts: Counts, metrics: str, options: argparse.Namespace) -> dict[str, Any]:
    """What there is to say of a load."""
    middle, most, nearly_all = np.percentile(1e3 * np.array(counts.seconds), [50, 95, 99])
    batches = metric(metrics, "coda_batch_rows_count")
    return {
        "requests": len(counts.seconds),
        "rows": counts.rows,
        "rows_per_second": counts.rows / options.seconds,
        "rows_of_a_batch": metric(metrics, "coda_batch_rows_sum") / batches,
        "ms": {
            "p50": middle,
            "p95": most,
            "p99": nearly_all,
            "most": 1e3 * max(counts.seconds),
        },
        "refused": counts.refused,
        "wrong": counts.wrong,
        "lost": counts.lost,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--texts", type=int, default=100, help="different ones")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--input_length", type=int, default=128)
    parser.add_argument("--output_length", type=int, default=16)
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(pathlib.Path(folder), options.adapters)
        expected = expected_answers(options, adapters)
        different = len(set(expected.values()))
        print(f"{len(expected)} pairs of a text and an adapter have {different} different answers")
        process, address = start(options, adapters)
        metrics = []

        def stop():
            with _open(f"{address}/metrics") as response:
                metrics.append(response.read().decode())
            process.send_signal(signal.SIGTERM)

        try:
            counts = asyncio.run(load(options, address, expected, stop))
            exit_code = process.wait(60)
        finally:
            process.kill()
    report = {"versions": timing.versions(), **vars(options), "different_answers": different}
    report |= {**report_of(counts, *metrics, options), "exit_code": exit_code}
    print(json.dumps({name: report[name] for name in ("requests", "rows_per_second", "ms")}))
    for name in ("wrong", "lost"):
        print(f"{name}: {len(report[name])} {report[name][:3]}")
    print(f"refused: {report['refused']}, exit code: {exit_code}")
    if options.json:
        files.write_json(options.json, report)


if __name__ == "__main__":
    main()
