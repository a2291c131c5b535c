"""Files as `torch.save` writes them, and wrong ones, put together without PyTorch."""

import io
import pickle
import struct
import zipfile

import numpy as np

KINDS = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def several(*parts):
    return b"(" + b"".join(parts) + b"t"


ORDERED_DICT = named("collections", "OrderedDict") + b")R"


def tensor(key, size, *, offset=0, stride=None, numel=None, kind="FloatStorage", legacy=False):
    """The opcodes of a tensor; without strides it is contiguous, and fills a storage of its own."""
    if stride is None:
        stride = [int(np.prod(size[i + 1 :])) for i in range(len(size))]
    numel = int(np.prod(size)) if numel is None else numel
    place = (text("storage"), named("torch", kind), text(key), text("cpu"), number(numel))
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + several(
            several(*place, *([b"N"] if legacy else [])) + b"Q",
            number(offset),
            several(*map(number, size)),
            several(*map(number, stride)),
            b"\x89",
            ORDERED_DICT,
        )
        + b"R"
    )


def state_dict(tensors):
    """The pickle of {name: opcodes}."""
    items = b"".join(text(name) + value for name, value in tensors.items())
    return b"\x80\x02" + ORDERED_DICT + b"(" + items + b"u."


def zipped(pickled, storages, *, compression=zipfile.ZIP_STORED, **entries):
    """The zip file of a pickle, {key: bytes} and other entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("model/data.pkl", pickled)
        for name, value in entries.items():
            archive.writestr(f"model/{name}", value)
        for key, value in storages.items():
            archive.writestr(f"model/data/{key}", value)
    return buffer.getvalue()


def legacy(pickled, storages):
    """The file of a pickle and {key: float32 bytes} as before PyTorch 1.6."""
    start = [number(0x1950A86A20F9469CFC6C), number(1001), b"}" + text("little_endian") + b"\x88s"]
    keys = [text(key) for key in storages]
    keys = b"]" + keys[0] + b"a" if len(keys) == 1 else b"](" + b"".join(keys) + b"e"
    pickles = [*(b"\x80\x02" + part + b"." for part in start), pickled, b"\x80\x02" + keys + b"."]
    return b"".join(pickles) + b"".join(
        struct.pack("<q", len(value) // 4) + value for value in storages.values()
    )


def of_arrays(arrays):
    """The zip file of {name: array}."""
    tensors = {
        name: tensor(name, leaf.shape, kind=KINDS[leaf.dtype.name]) for name, leaf in arrays.items()
    }
    return zipped(state_dict(tensors), {name: leaf.tobytes() for name, leaf in arrays.items()})
