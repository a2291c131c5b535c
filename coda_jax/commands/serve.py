"""`coda serve`: answers over HTTP."""

import asyncio

from coda_jax import checks
from coda_jax.commands.loading import LoadedModel, sized, with_checkpoint_defaults
from coda_jax.data.reports import say
from coda_jax.data.vocabularies import (
    Vocabulary,
    check_vocabulary,
    identity,
    load_vocabulary,
)
from coda_jax.inference import Decoding, Encodings, Predictor
from coda_jax.objectives import model_for
from coda_jax.serving.answers import Answers, described, embedded, generated
from coda_jax.serving.app import Service
from coda_jax.serving.batcher import Batcher
from coda_jax.serving.metrics import Metrics
from coda_jax.serving.reading import Reader
from coda_jax.serving.server import Server, listen
from coda_jax.sharding import Placement

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: LoadedModel,
    decoding: Decoding,
    vocabulary: str | None = None,
    font: str | None = None,
    embed: str | None = None,
    placement: Placement | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_rows: int = 64,
    max_queue: int = 256,
    max_body: int = 2**25,
    max_wait_ms: float = 5.0,
) -> None:
    """Answers requests until SIGTERM or SIGINT, and then those that were accepted.

    The address is printed when requests are accepted, and all programs are compiled before the
    first is answered: until then /health says so.

    Args:
        model: what answers.
        decoding: how outputs are made; what it leaves open, the adapter's training or
            generation_config.json may say. Longer inputs are refused.
        vocabulary: folder or file of the vocabulary, or "bytes"; None: beside the checkpoint.
        font: file of the font of headers; None for the default.
        embed: "mean" or "tokens" to answer with the encoder's outputs instead.
        placement: the devices; None for all, which share the rows of a batch.
        host: the address to listen at; other machines reach only others than the loopback's.
        port: 0 for any that is free.
        max_rows: the most rows of a request.
        max_queue: the most rows that wait.
        max_body: the most bytes of a request.
        max_wait_ms: milliseconds that a row waits for others to share its batch.

    Raises:
        OSError: the address is taken, or none of this machine.
        ValueError: an option is out of its range, or has no effect.
    """
    checks.paths(VOCABULARY=vocabulary, HEADER_FONT=font)
    checks.text("HOST", host)
    checks.Whole(0, 65535)("PORT", port)
    _check_limits(max_rows, max_queue, max_body, max_wait_ms)
    vocabulary = load_vocabulary(vocabulary or model.directory)
    check_vocabulary(identity(vocabulary), **model.vocabulary)
    decoding = sized(decoding, model)
    with listen(host, port) as listener:
        answers = _answers(model, decoding, vocabulary, embed, placement)
        encode = model.inputs.encoder(model.config, vocabulary, answers.longest, font)
        expects = model_for(model.config).expects
        names = [*model.adapters] if model.adapters else None
        metrics = Metrics()
        reader = Reader(model.inputs, encode, expects, answers.longest, names, max_rows)
        batcher = Batcher(answers, names, max_queue, max_wait_ms / 1000, metrics)
        service = Service(reader, batcher, names, max_body, metrics)
        _say_where(host, listener.getsockname()[1], len(answers.shapes))
        asyncio.run(Server(service, batcher).answer(listener))


def _check_limits(max_rows: int, max_queue: int, max_body: int, max_wait_ms: float) -> None:
    limits = {"MAX_ROWS": max_rows, "MAX_QUEUE": max_queue, "MAX_BODY": max_body}
    for name, value in limits.items():
        checks.COUNT(name, value)
    checks.Number(least=0, most=60_000)("MAX_WAIT_MS", max_wait_ms)
    if max_queue < max_rows:
        raise ValueError(f"MAX_QUEUE={max_queue} has no places for MAX_ROWS={max_rows} rows")


def _answers(
    model: LoadedModel,
    decoding: Decoding,
    vocabulary: Vocabulary,
    embed: str | None,
    placement: Placement | None,
) -> Answers:
    """What answers: generated texts, what a head says, or the encoder's outputs."""
    config, params = model.config, model.params
    if embed is None and not model_for(config).describes:
        decoding = with_checkpoint_defaults(decoding, model)
        predictor = Predictor(config, params, decoding, vocabulary, placement, model.adapters)
        return generated(predictor, config, vocabulary)
    decoding.check_encodes()
    encodings = Encodings(config, params, decoding, embed, placement, model.adapters)
    return (described if embed is None else embedded)(encodings, config, decoding)


def _say_where(host: str, port: int, num_programs: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}", flush=True)
    if host not in _LOOPBACK:
        say(f"HOST={host!r}: whoever reaches this machine can ask; nobody is asked who he is")
    say(f"compiling {num_programs} programs")
