"""`coda prune`: the smaller dense checkpoint that structured pruning leaves."""

from pathlib import Path

from coda_jax import checkpoints, checks, files, hub, methods, trees
from coda_jax.commands.sources import hf_files, read_source
from coda_jax.data.vocabularies import copy_files


def prune(source: str, output: str, *, base: str | None = None, step: int | None = None) -> None:
    """Merges what was trained, cuts out what is gone, and writes a dense checkpoint.

    Args:
        source: an adapter file, or a run of `coda train` or T5X, of structured pruning.
        output: folder to write, which must not exist yet or be empty; in Hugging Face's layout,
            or, where that has no place for what is left, in our own.
        base: folder of the dense checkpoint that it was trained from.
        step: of a run; None for the newest.

    Raises:
        FileExistsError: the output holds something.
        ValueError: nothing can be cut, see `methods.sliced`; other errors are those of `convert`.
    """
    checks.paths(INPUT=source, OUTPUT=output, INITIAL_CHECKPOINT_PATH=base)
    checks.Maybe(checks.Whole(0))("STEP", step)
    files.check_new(output)
    folder = hub.find(source)
    read = read_source(folder, base=base, step=step)
    config, params = methods.sliced(read.config, read.params)
    folders = [folder, *([hub.find(base)] if base else [])]
    beside = hf_files(read, folders)
    with files.atomic_folder(output) as new:
        in_hf = checkpoints.save_dense(Path(new), config, params)
        copy_files(beside, Path(new))
    before = trees.count(methods.merge(read.config, read.params)[1])
    after = trees.count(params)
    layout = "Hugging Face's layout" if in_hf else "a layout that only coda_jax reads"
    print(
        f"{source} is now in {output}, in {layout}: {after:,} parameters, {after / before:.1%} of "
        f"{before:,}"
    )
