"""Nothing in a checkpoint file is ever run, what is read is right, and what is refused is named."""

import argparse
import collections
import concurrent.futures
import io
import os
import pickle
import struct
import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from visionssm.errors import UserError
from visionssm.weights import read_checkpoint, select_weights

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.zeros(2)}


class Call:
    """Pickles as the call of a function: what a malicious file does."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


class Evil(dict):
    pass


def hostile_objects(marker):
    command = f"touch {marker}"
    yield "posix.system", Call(os.system, command)
    yield "builtins.eval", Call(eval, f"open({str(marker)!r}, 'w')")
    yield "builtins.exec", Call(exec, f"open({str(marker)!r}, 'w')")
    yield "builtins.open", Call(open, str(marker), "w")
    yield "subprocess.Popen", Call(subprocess.Popen, ["touch", str(marker)])
    yield "torch.hub.load", Call(torch.hub.load, str(marker.parent), "model")
    yield "torch.hub.load_state_dict_from_url", Call(torch.hub.load_state_dict_from_url, f"file://{marker}")
    yield "torch.serialization.load", Call(torch.load, str(marker))
    yield "builtins.getattr", Call(getattr, Call(__import__, "os"), "system")  # a known name around an unknown one
    yield "posix.system", {"args": argparse.Namespace(nested=[{"deep": (Call(os.system, command),)}])}
    yield "posix.system", Call(collections.OrderedDict, Call(os.system, command))
    yield "test_reading.Evil", Evil(a=1)
    yield "builtins.__import__", Call(__import__, "antigravity")


@pytest.mark.parametrize("number", range(13))
def test_a_hostile_pickle_is_refused_and_does_nothing(number, tmp_path):
    marker = tmp_path / "touched"
    name, evil = list(hostile_objects(marker))[number]
    torch.save({"model": WEIGHTS, "config": evil}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="refused: it names") as caught:
        read_checkpoint(tmp_path / "evil.pth")
    expected = "__import__" if name == "builtins.getattr" else name.rsplit(".", 1)[-1]
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_the_same_file_does_harm_where_pickles_are_trusted(tmp_path):
    """The test above means something: plain unpickling runs what it refuses."""
    marker = tmp_path / "touched"
    torch.save({"model": WEIGHTS, "config": Call(os.system, f"touch {marker}")}, tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert marker.exists()


def archive(path, data, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)


def test_hand_written_pickles(tmp_path):
    marker = tmp_path / "touched"
    # The name of a function built on the stack, as in protocol 4, and fetched from the memo
    command = f"touch {marker}".encode()
    stack_global = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c" + bytes([len(command)]) + command
    archive(tmp_path / "stack.pth", stack_global + b"\x85R.")
    archive(tmp_path / "inst.pth", b"(V" + command + b"\niposix\nsystem\n.")
    archive(tmp_path / "truncated.pth", b"\x80\x02}q\x00X")
    archive(tmp_path / "persistent.pth", b"\x80\x02X\x04\x00\x00\x00evilQ.")
    archive(tmp_path / "number.pth", b"\x80\x02K\x05.")
    for name in ("stack", "inst", "truncated", "persistent", "number"):
        with pytest.raises(UserError, match=f"{name}.pth: "):
            read_checkpoint(tmp_path / f"{name}.pth")
    assert not marker.exists()


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    zeros = b"\x80\x02]q\x00" + b"0" * (1 << 22)
    archive(tmp_path / "bomb.pth", zeros, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 20_000
    with pytest.raises(UserError, match=r"compressed, which torch\.save never does"):
        read_checkpoint(tmp_path / "bomb.pth")

    archive(tmp_path / "liar.pth", b"\x80\x02}.", **{"data/0": b"1234"})
    content = bytearray((tmp_path / "liar.pth").read_bytes())
    entry = content.rfind(b"PK\x01\x02")  # the last entry of the central directory: its two sizes
    content[entry + 20 : entry + 28] = struct.pack("<II", 0xFFFFFF00, 0xFFFFFF00)
    (tmp_path / "liar.pth").write_bytes(content)
    with pytest.raises(UserError, match="states contents larger than its"):
        read_checkpoint(tmp_path / "liar.pth")

    with (tmp_path / "large.pth").open("wb") as raw, zipfile.ZipFile(raw, "w") as file:
        file.writestr("archive/data.pkl", bytes(65 << 20))
    with pytest.raises(UserError, match="its pickle is larger than"):
        read_checkpoint(tmp_path / "large.pth")


def test_a_tensor_that_claims_more_than_it_stores(tmp_path):
    torch.save({"model": {"weight": torch.zeros(1).expand(1 << 20, 1 << 20)}}, tmp_path / "expanded.pth")
    with pytest.raises(UserError, match=r"claims a tensor of \(1048576, 1048576\) and stores less"):
        read_checkpoint(tmp_path / "expanded.pth")


def test_what_is_no_checkpoint_is_named(tmp_path):
    files = {
        "page.pth": (b"<!DOCTYPE html><html>not found</html>", "an HTML page, not a checkpoint"),
        "empty.pth": (b"", "not a checkpoint that torch.save wrote"),
        "text.pth": (b"weights", "not a checkpoint that torch.save wrote"),
        "legacy.pth": (legacy(), "not a checkpoint that torch.save wrote since PyTorch 1.6"),
        "broken.safetensors": (b"12345678", "not a readable safetensors file"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="a folder, expected a checkpoint file"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, expected a dict"):
        read_checkpoint(tmp_path / "list.pth")
    whole = tmp_path / "whole.pth"
    torch.save({"model": WEIGHTS}, whole)
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(UserError, match="broken one"):
        read_checkpoint(whole)


def legacy() -> bytes:
    file = io.BytesIO()
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def test_safetensors_and_plain_files(tmp_path):
    save_file(WEIGHTS, tmp_path / "plain.safetensors")
    torch.save(WEIGHTS, tmp_path / "plain.pth")
    for name in ("plain.safetensors", "plain.pth"):
        weights = select_weights(read_checkpoint(tmp_path / name))
        assert set(weights) == set(WEIGHTS)
        assert all(torch.equal(weights[key], value) for key, value in WEIGHTS.items())


def test_select_weights():
    other = {name: value + 1 for name, value in WEIGHTS.items()}
    content = {"model": WEIGHTS, "model_ema": other, "epoch": 3}
    with pytest.warns(UserWarning, match="f.pth: holds model and model_ema; model is taken"):
        assert torch.equal(select_weights(content, source="f.pth")["layer.weight"], WEIGHTS["layer.weight"])
    assert torch.equal(select_weights(content, "model_ema")["layer.weight"], other["layer.weight"])
    assert torch.equal(select_weights(content, "model")["layer.weight"], WEIGHTS["layer.weight"])
    with pytest.raises(UserError, match="has no weights under 'state_dict'; it has model, model_ema"):
        select_weights(content, "state_dict")
    with pytest.raises(UserError, match=r"expected names and their tensors, found epoch \(int\)"):
        select_weights({"epoch": 3})
    with pytest.raises(UserError, match="found nothing"):
        select_weights({"model": {}})


def test_known_foreign_objects_become_inert(tmp_path):
    content = {"model": WEIGHTS, "args": argparse.Namespace(lr=1), "pickle": pickle.dumps(1)}
    torch.save(content, tmp_path / "run.pth")
    read = read_checkpoint(tmp_path / "run.pth")
    assert not isinstance(read["args"], argparse.Namespace)
    assert torch.equal(select_weights(read)["layer.weight"], WEIGHTS["layer.weight"])


def assembled(*parts) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def test_small_pickles_with_large_consequences(tmp_path):
    doubled = b")q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0" for i in range(45))
    files = {
        "bytearray": (assembled(b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x06\x85R"), "names builtins.bytearray"),
        "storage": (assembled(b"ctorch.storage\nUntypedStorage\n\x8a\x05\x00\x00\x00\x00\x06\x85R"), "UntypedStorage"),
        "key": (assembled(doubled, b"}h\x2dK\x01s"), "nests tuples to"),
        "deep": (assembled(b")", b"\x85" * 1000), "deep"),
        "long": (assembled(b"]0" * 1_100_000, b"}"), "not one that torch.save writes"),
    }
    for name, (content, reason) in files.items():
        archive(tmp_path / f"{name}.pth", content)
        with pytest.raises(UserError, match=reason):
            read_checkpoint(tmp_path / f"{name}.pth")


def test_names_in_a_file_do_not_steer_the_terminal(tmp_path):
    archive(tmp_path / "escape.pth", assembled(b"cos\x1b[2J\nsystem\n"))
    with pytest.raises(UserError, match=r"names os\\x1b\[2J\.system"):
        read_checkpoint(tmp_path / "escape.pth")


def test_attributes_that_hide_methods(tmp_path):
    class Hidden:
        def __reduce__(self):
            return collections.OrderedDict, (), {"items": 1, "get": 1, "keys": 1}, None, iter(WEIGHTS.items())

    torch.save({"model": Hidden()}, tmp_path / "hidden.pth")
    assert select_weights(read_checkpoint(tmp_path / "hidden.pth")).keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.int8), torch.eye(2).to_sparse()],
    ids=["complex", "int8", "sparse"],
)
def test_weights_are_plain_numbers(value):
    with pytest.raises(UserError, match=r"head is a torch\.\w+ tensor"):
        select_weights({"model": {"head": value}})
    with pytest.raises(UserError, match="expected names of tensors, found 1"):
        select_weights({"model": {1: torch.zeros(2)}})


def test_any_entry_by_name():
    assert select_weights({"net": WEIGHTS}, "net").keys() == WEIGHTS.keys()


def test_threads_read_side_by_side(tmp_path):
    for number in range(2):
        torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=number)}, tmp_path / f"{number}.pth")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: read_checkpoint(tmp_path / f"{i % 2}.pth"), range(100)))
    assert all(content["model"].keys() == WEIGHTS.keys() for content in read)
