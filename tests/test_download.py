"""data/download.sh against a host on this machine, which answers as Hugging Face's does.

The public hosts themselves are never asked.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, reference_prey

import om2p_mpe

pytest.importorskip("huggingface_hub", reason="its client fetches the datasets")
if not shutil.which("curl"):
    pytest.skip("curl is not installed, which fetches the prey", allow_module_level=True)

NAMES = [f"{name}_{i}.npy" for i in range(3) for name in om2p_mpe.FILES.values()]
COMMIT = "0123456789abcdef" * 2 + "01234567"


class Request(BaseHTTPRequestHandler):
    """The Hub's answers for datasets: what a revision is, its tree, and the files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, host = self.path.split("?")[0], self.server
        host.asked += [path] if self.command == "GET" else []
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(revision|tree)/.*", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path)
        if api:
            files = [(name, len(x)) for (there, name), x in host.files.items() if there == api[1]]
            rest = {"type": "file", "oid": "0" * 40}
            tree = [{"path": name, "size": size, **rest} for name, size in files]
            info = {"id": api[1], "sha": COMMIT, "siblings": [{"rfilename": x} for x, _ in files]}
            body = json.dumps(info if api[2] == "revision" else tree).encode()
        else:
            body = host.files.get(file.groups() if file else ("prey", path.removeprefix("/prey/")))
        part = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))
        sent = (body or b"")[int(part[1]) if part else 0 :]
        self.send_response(404 if body is None else 206 if part else 200)
        if body is not None:
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        if part:
            first, last = len(body) - len(sent), len(body) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if self.command == "GET":
            self.close_connection = cut = bool(host.cut and path.endswith(host.cut))
            self.wfile.write(sent[: len(sent) // 2] if cut else sent)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def host():
    """A running host of the files {(repository, path): bytes}; `cut` is one that it never ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Request) as host:
        host.daemon_threads, host.files, host.asked, host.cut = True, {}, [], None
        thread = threading.Thread(target=host.serve_forever, args=[0.01])
        thread.start()
        yield host
        host.shutdown()
        thread.join()


@pytest.fixture
def download(host, tmp_path):
    """A function that runs the script, with a prey's checksum that is on the host."""
    torch.save(reference_prey(14)[1], file := io.BytesIO())
    host.files["prey", "simple_tag/pretrained_adv_model.pt"] = file.getvalue()
    (tmp_path / "convert_prey.py").symlink_to(ROOT / "data/convert_prey.py")
    ours = f"get_prey simple_tag {hashlib.sha256(file.getvalue()).hexdigest()}"
    text = (ROOT / "data/download.sh").read_text()
    text, count = re.subn("get_prey simple_tag [0-9a-f]{64}", ours, text)
    assert count == 1
    (tmp_path / "download.sh").write_text(text)

    def run(*words, **environment):
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_ENDPOINT": f"http://127.0.0.1:{host.server_port}",
            "OM2P_PREY_URL": f"http://127.0.0.1:{host.server_port}/prey",
            "HOME": str(tmp_path),
            **environment,
        }
        command = ["bash", tmp_path / "download.sh", *words, "--data-dir", tmp_path / "data"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


def offer(host, task="simple_tag", quality="expert", seed=0, names=NAMES):
    """Put a dataset on the host; {name: bytes}."""
    rng, files = np.random.default_rng(0), {}
    for name in names:
        np.save(file := io.BytesIO(), rng.normal(size=(9_000, 16)).astype(np.float32))
        files[name] = file.getvalue()
        path = f"{task}/{quality}/seed_{seed}_data/{name}"
        host.files["zhuoran-li/offline_marl_dataset", path] = files[name]
    return files


def failure(process):
    """Check that a command failed, its last words one line of error, and return that line."""
    assert process.returncode == 1, process.stderr
    message = process.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    return message


def test_dataset_and_prey(host, download, tmp_path):
    """Bytes as they are there, and the prey as the scripts load it; nothing else is left."""
    files = offer(host)
    assert (process := download("simple_tag", "expert")).returncode == 0, process.stderr
    folder = tmp_path / "data/simple_tag/expert/seed_0_data"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert [path.name for path in folder.parents[1].glob(".*")] == []
    action = om2p_mpe.load_prey(folder.parents[1] / "prey.npz")(np.ones((1, 1, 14), np.float32))
    expected = reference_prey(14)[0](torch.ones(1, 14)).detach().numpy()
    assert action[0] == pytest.approx(expected, abs=1e-5)


def test_robots(host, download, tmp_path):
    """HalfCheetah-2x3 is HalfCheetah-v2 there, of two agents; a second call fetches nothing."""
    files = offer(host, "HalfCheetah-v2", "medium-replay", 3, NAMES[:10])
    assert (process := download("HalfCheetah-2x3", "medium-replay", "3")).returncode == 0, process
    folder = tmp_path / "data/HalfCheetah-2x3/medium-replay/seed_3_data"
    assert {path.name for path in folder.iterdir()} == {*files}
    host.asked.clear()
    assert "is there" in download("HalfCheetah-2x3", "medium-replay", "3").stdout
    assert host.asked == []


def test_stopped_download_goes_on(host, download, tmp_path):
    """What came before the connection was lost is not fetched again; no dataset is there yet."""
    files, host.cut = offer(host, "simple_spread"), "acs_1.npy"
    assert "repeat the command" in failure(download("simple_spread", "expert"))
    folder = tmp_path / "data/simple_spread/expert/seed_0_data"
    assert not folder.parent.exists()
    host.cut, host.asked = None, []
    assert download("simple_spread", "expert").returncode == 0
    assert len([path for path in host.asked if "resolve" in path]) < len(files)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_archive(host, download, tmp_path):
    """OG-MARL's archive is unpacked, for data/convert_og_marl.py."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("simple_tag.vlt/Expert/metadata.json", "{}")
    host.files["InstaDeepAI/og-marl", "prior_work/omar/mpe/simple_tag.zip"] = file.getvalue()
    assert (process := download("og-marl", "simple_tag")).returncode == 0, process.stderr
    assert (tmp_path / "data/og-marl/simple_tag/simple_tag.vlt/Expert/metadata.json").is_file()


def test_what_is_missing_there(host, download, tmp_path):
    """A dataset without one of its files is none."""
    offer(host, names=NAMES[:-1])
    assert "dones_2.npy" in failure(download("simple_tag", "expert"))
    assert not (tmp_path / "data/simple_tag/expert").exists()


def test_no_host(download):
    """Without a connection both kinds of sources end in one line."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "OM2P_PREY_URL": "http://127.0.0.1:9"}
    assert "could not be fetched" in failure(download("simple_tag", "expert", **nowhere))
    assert "could not be fetched" in failure(download("simple_tag", **nowhere))


def test_another_prey_is_refused(host, download, tmp_path):
    """Its checksum is known, and no prey.npz is made of another file."""
    host.files["prey", "simple_tag/pretrained_adv_model.pt"] = b"<html>"
    assert "its sha256 is" in failure(download("simple_tag"))
    assert not (tmp_path / "data/simple_tag/prey.npz").exists()


def test_usage(download):
    """Mistakes end in one line before anything is asked for; --list says what there is."""
    for words in ("", "simple_ball", "simple_tag best", "simple_tag expert 7", "og-marl tag"):
        assert f"'{words}'" in failure(download(*words.split()))
    assert "no prey" in failure(download("simple_spread"))
    assert "97,500" in download("--list").stdout
