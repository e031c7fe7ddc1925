"""Tests of ane_trainer/training/datasets/carriers.py; the downloads (slow) run where the registries can be reached."""

import hashlib
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest

from ane_trainer.training.datasets import carriers
from ane_trainer.training.datasets.table import FASHION_MNIST, MNIST, SourceFailed


class Evil:
    """A pickle that would run a command when loaded."""

    def __reduce__(self):
        return (print, ("executed",))


def python2_pickle(*arrays):
    """A tuple of 1-d arrays as Python 2's NumPy pickled them (protocol 2), written opcode by opcode."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def one(array):
        dtype = (
            b"cnumpy\ndtype\n" + text(array.dtype.str[1:].encode()) + b"K\x00K\x01\x87R(K\x03" + text(b"<")
        )
        dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        return (
            empty
            + b"(K\x01K"
            + bytes([len(array)])
            + b"\x85"
            + dtype
            + b"\x89"
            + text(array.tobytes())
            + b"tb"
        )

    return b"\x80\x02(" + b"".join(one(array) for array in arrays) + b"t."


def test_the_unpickler_loads_arrays_only(capsys):
    pixels, labels = np.arange(3, dtype="<f4"), np.arange(3, dtype="<i8")
    loaded = carriers.restricted_load(python2_pickle(pixels, labels))
    assert [array.dtype.str for array in loaded] == ["<f4", "<i8"]
    assert np.array_equal(loaded[0], pixels)
    assert np.array_equal(loaded[1], labels)
    with pytest.raises(SourceFailed, match=r"__builtin__\.print"):
        carriers.restricted_load(pickle.dumps(Evil(), protocol=2))
    assert capsys.readouterr().out == ""


def test_another_wheel_is_refused_before_it_is_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("mnist/data/mnist.pkl.gz", b"")
    with pytest.raises(SourceFailed, match="SHA-256"):
        carriers.rebuild_mnist((tmp_path / "x.whl").read_bytes())


def test_a_failing_tool_gives_its_own_reason(tmp_path):
    code = "import sys; sys.stderr.write('noise\\nERROR: no such thing\\nbye\\n'); sys.exit(3)"
    with pytest.raises(SourceFailed, match="ended with 3: ERROR: no such thing"):
        carriers.run_tool([sys.executable, "-c", code], tmp_path)
    carriers.run_tool([sys.executable, "-c", "open('made', 'w').close()"], tmp_path)
    assert (tmp_path / "made").exists()


def delivered(source, info):
    try:
        return {file.name: raw for file, raw in source(info, info.files)}
    except SourceFailed as failure:
        pytest.skip(f"no registry: {failure}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "info"),
    [(carriers.mnist_from_python_index, MNIST), (carriers.fashion_mnist_from_debian, FASHION_MNIST)],
)
def test_a_carrier_gives_the_official_files_bit_for_bit(source, info):
    raw = delivered(source, info)
    for file in info.files:
        assert hashlib.md5(raw[file.name]).hexdigest() == file.raw_md5
        assert hashlib.sha256(raw[file.name]).hexdigest() == file.raw_sha256
        assert len(raw[file.name]) == file.raw_bytes


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs Debian's apt-get")
def test_a_system_without_package_lists_is_served_too(tmp_path, monkeypatch):
    """apt-get without lists cannot download; lists in a folder of our own make it work without root."""
    config = tmp_path / "apt.conf"
    (tmp_path / "empty" / "partial").mkdir(parents=True)
    config.write_text(
        f'Dir::State::lists "{tmp_path / "empty"}";\nDir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(config))
    with pytest.raises(SourceFailed, match="E: "):
        carriers.run_tool(["apt-get", "download", carriers.DEBIAN_PACKAGE], tmp_path)
    assert delivered(carriers.fashion_mnist_from_debian, FASHION_MNIST).keys() == {
        f.name for f in FASHION_MNIST.files
    }
