"""Pickles are read as data: no code that they refer to is executed."""

import collections
import os
import pickle
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from m3ae_fast.base.errors import UserError
from m3ae_fast.weights.inert_pickle import Inert, load_inert
from tests.weights.official_pickle import Call, write_checkpoint

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "swapped": np.arange(3, dtype=">i4"),
    "scalar": np.float32(2.5),
    "no axis": np.array(7, np.int32),
    "empty": np.zeros((0, 3)),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_are_restored(tmp_path, protocol):
    others = {
        "words": ["a", ("b", None)],
        "bytes": b"c\xff",
        "ordered": collections.OrderedDict(d=1),
        "n": [1, 2.5, True],
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(ARRAYS | others, protocol))
    found = load_inert(path)
    assert {key: found[key] for key in others} == others
    for key, array in ARRAYS.items():
        assert (
            found[key].dtype.newbyteorder("=") == array.dtype.newbyteorder("=") and found[key].shape == array.shape
        ), key
        np.testing.assert_array_equal(found[key], array)


NUMBERS = st.sampled_from([np.dtype(code) for code in ("?", *"bBhHiIqQefdFD")]).flatmap(
    lambda dtype: st.sampled_from([dtype, dtype.newbyteorder()])
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    array=NUMBERS.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))),
    is_fortran=st.booleans(),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_arrays_of_any_dtype_shape_and_order_are_restored_as_writable(array, is_fortran, protocol):
    saved = [np.asfortranarray(array) if is_fortran else array, array.reshape(-1)[:1].sum()]
    saved[0].flags.writeable = False  # as in NumPy views of JAX arrays
    with tempfile.NamedTemporaryFile() as file:
        file.write(pickle.dumps(saved, protocol))
        file.flush()
        found, scalar = load_inert(Path(file.name))
    own = array.dtype.newbyteorder("=")
    assert (found.dtype.newbyteorder("="), found.shape) == (own, saved[0].shape)
    assert found.astype(own).tobytes() == array.astype(own).tobytes()
    assert found.flags.writeable or not found.size
    np.testing.assert_array_equal(scalar, saved[1])


@pytest.mark.parametrize(
    "call",
    [
        Call(exec, "open('PWNED', 'w').close()"),
        Call(np.memmap, "PWNED", "uint8", "w+", 0, (1,)),
        Call(os.system, "touch PWNED"),
        Call(getattr, "os", "system"),
        Call(shutil.copy, __file__, "PWNED"),
        Call(np.ndarray.tofile, np.zeros(1), "PWNED"),
    ],
)
def test_functions_named_in_a_pickle_are_not_called(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.pkl").write_bytes(pickle.dumps({"state": call, "array": ARRAYS["matrix"]}))
    found = load_inert(tmp_path / "h.pkl")
    assert isinstance(found["state"], Inert) and found["array"].shape == (2, 3)
    assert os.listdir(tmp_path) == ["h.pkl"]


def test_object_dtypes_and_invalid_arrays_are_refused(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps([np.array([{}, print], dtype=object), np.zeros(2, "i4,f4")], 4))
    assert [array.size for array in load_inert(path)] == [0, 0]  # the arrays are left empty
    data = pickle.dumps(ARRAYS["matrix"], 5)
    path.write_bytes(data.replace(b"K\x02K\x03", b"K\x09K\x09"))  # a shape that its bytes do not fill
    with pytest.raises(UserError, match="it is damaged"):
        load_inert(path)


def test_damage_at_any_position_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_checkpoint(tmp_path / "a.pkl", {"a/b": ARRAYS["matrix"]}, {"flag": 1}).read_bytes()
    draw = random.Random(0)
    refused = 0
    for i in range(400):
        damaged = bytearray(data[: draw.randrange(len(data))] if i % 2 else data)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256) if len(damaged) else 0
        (tmp_path / "a.pkl").write_bytes(damaged)
        try:
            load_inert(tmp_path / "a.pkl")
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 300
    assert os.listdir(tmp_path) == ["a.pkl"]
