"""Files made to hurt: pickles that leave a mark, safetensors headers that lie, YAML that grows."""

import json
import os
import pickle
import struct
import zipfile


class Evil:
    """Unpickled, it runs a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def plain_pickle(path, mark, **more):
    path.write_bytes(pickle.dumps({"state_dict": Evil(mark), **more}))
    return path


def torch_pickle(path, mark, **more):
    """As torch.save writes it: a zip with a pickle inside."""
    import torch

    torch.save({"state_dict": {"weight": Evil(mark)}, "optimizer_states": [], "loops": {}, "global_step": 1}, path)
    assert zipfile.is_zipfile(path)
    return path


def header(claimed, text=b"{}", data=b""):
    """A safetensors file whose first eight bytes claim a header of so many bytes."""
    return struct.pack("<Q", claimed) + text + data


def tensors(entries, data=b"\0" * 64):
    """A safetensors file of {name: (dtype, shape, [begin, end])}."""
    head = {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in entries.items()}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return header(len(text), text, data)


SAFETENSORS = {
    "a header of 2^60 bytes": lambda whole: header(1 << 60, whole[8:]),
    "a header of 2^64 - 1 bytes": lambda whole: header((1 << 64) - 1, whole[8:]),
    "a header longer than the file": lambda whole: header(len(whole) * 2, whole[8:]),
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut in the header": lambda whole: whole[:20],
    "more than the header says": lambda whole: whole + b"\0" * 100,
    "empty": lambda whole: b"",
    "no header": lambda whole: b"\0" * 8,
    "a header that is no JSON": lambda whole: header(16, b"x" * 16),
    "a header nested deep": lambda whole: header(200_000, b"[" * 200_000),
    "offsets that overlap": lambda whole: tensors(
        {"a": ("F32", [8], [0, 32]), "b": ("F32", [8], [16, 48])}, b"\0" * 48
    ),
    "offsets past the end": lambda whole: tensors({"a": ("F32", [1 << 40], [0, 1 << 42])}),
    "offsets in disorder": lambda whole: tensors({"a": ("F32", [8], [32, 0])}),
    "a shape that isn't its bytes": lambda whole: tensors({"a": ("F32", [1 << 20], [0, 64])}),
    "a shape past 2^64": lambda whole: tensors({"a": ("F32", [1 << 40, 1 << 40], [0, 64])}),
    "an unknown dtype": lambda whole: tensors({"a": ("EVIL", [16], [0, 64])}),
    "tensors of other names": lambda whole: tensors({"a": ("F32", [16], [0, 64])}),
    "a pickle": lambda whole: pickle.dumps(Evil("marked")),
}

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
YAMLS = {
    "python/object/apply": 'model: !!python/object/apply:os.system ["touch marked"]\n',
    "python/object/new": "model: !!python/object/new:os.system [touch marked]\n",
    "python/name": "model: !!python/name:os.system\n",
    "python/module": "model: !!python/module:antigravity\n",
    "python/tuple": "model: !!python/tuple [1, 2]\n",
    "an unknown tag": "model: !evil {a: 1}\n",
    "a billion laughs": LAUGHS,
    "laughs in keys of a mapping": LAUGHS.replace("[", "{k: [").replace("]", "]}"),
    "laughs through merges": "a: &a {x: 1}\n"
    + "".join(
        f"{n}: &{n} {{<<: [{', '.join([f'*{o}'] * 9)}]}}\n" for o, n in zip("abcdefghi", "bcdefghij", strict=True)
    ),
    "laughs through interpolation": "a: haha\n"
    + "".join(f"{n}: '{f'${{{o}}}' * 9}'\n" for o, n in zip("abcdefghi", "bcdefghij", strict=True)),
    "an interpolation inside of another one": "a: b\nc: '${${a}}'\n",
    "a cycle of interpolations": "a: ${b}\nb: ${a}\n",
    "an unknown resolver": "a: ${evil:1}\n",
    "a value that holds itself": "model: &m {inner: *m}\n",
    "a list that holds itself": "model: &m [*m]\n",
    "a hundred thousand brackets": "[" * 100_000,
    "a hundred braces": "model: " + "{a: " * 100 + "1" + "}" * 100,
    "deep by indentation": "".join(f"{' ' * n}a:\n" for n in range(500)),
    "a date that isn't": "model: 2020-13-45\n",
    "a number of 5000 digits": f"model: {'7' * 5000}\n",
    "a bool that isn't": "model: !!bool maybe\n",
    "a list as a key": "? [1, 2]\n: 3\n",
    "no UTF-8": b"model: \xff\xfe\n",
    "a null byte": b"model: \0\n",
    "bytes": bytes(range(256)),
    "a list": "- model\n",
    "words": "hello\n",
    "nothing": "",
    "twenty megabytes": "a: 1\n" + "#" * (20 << 20),
    "a key twice": "model: {}\ndata: {}\nmodel: {}\n",
    "an open quote": 'model: "abc\n',
    "an unknown anchor": "model: *nobody\n",
}
