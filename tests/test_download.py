"""data/download.sh against a host on this machine: what comes, what is refused, what a stop leaves.

The public hosts themselves are never asked.
"""

import contextlib
import hashlib
import io
import os
import pty
import re
import shutil
import signal
import subprocess
import threading
import time
import zipfile
import zlib
from collections import defaultdict
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal
from numpy.testing import assert_array_equal
from test_data import reference_prey

import om2p_mamujoco
import om2p_mpe

DATASETS = "/datasets/zhuoran-li/offline_marl_dataset/resolve/main"
ARCHIVES = "/datasets/InstaDeepAI/og-marl/resolve/main/prior_work/omar"
PREYS = (
    "/instadeepai/og-marl/5b158ba90ffa0e6813018deb077273e9181b2e0d/og_marl/custom_environments"
    "/multiagent_particle_envs/multiagent/adversaries"
)
PREY = PREYS + "/simple_tag/pretrained_adv_model.pt"
ORIGINAL_PREYS = {  # sha256
    "simple_tag": "b22b95f3397f41a21aa247810e385a8ecf85294f2e2ed8e523a954c633daf7a2",
    "simple_world": "ed3170cfb9c3f6872305c9c795a7aed089fde7b5e5cc2bff5f7debfed37c2115",
}
NAMES = ("obs", "acs", "rews", "next_obs", "dones")
PROGRAMS = "awk,bash,cat,curl,cut,dirname,flock,grep,head,mkdir,mv,python3,rm,sed,sha256sum,sleep"
PROGRAMS = [*PROGRAMS.split(","), "tail", "tr", "wc", "wget"]
PAGE = b"<!DOCTYPE html>\n<html><body>Please sign in: {'shape': (1, 2)}</body></html>\n"
BOTH = pytest.mark.parametrize("tool", ["curl", "wget"])


class Request(BaseHTTPRequestHandler):
    """Answers as a file server does, or as the next plan for the path says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        host, part = self.server, self.headers.get("Range")
        host.requests.append((self.path, part))
        plan = host.plans[self.path].pop(0) if host.plans[self.path] else ""
        body = host.files.get(self.path)
        if plan == "elsewhere":  # as Hugging Face does with large files
            sha256 = hashlib.sha256(body).hexdigest()
            host.files.setdefault("/cdn", body)
            return self.answer(302, b"", Location="/cdn", X_Linked_ETag=f'"{sha256}"')
        if plan == "silence":
            host.go.wait(20)
        if body is None or isinstance(plan, int):
            return self.answer(plan or 404, PAGE)
        start = int(re.fullmatch(r"bytes=(\d+)-", part)[1]) if part else 0
        if plan == "no ranges":
            start = 0
        if start and start >= len(body):
            return self.answer(416, PAGE, Content_Range=f"bytes */{len(body)}")
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        headers = {"Content_Range": span} if start else {}
        if plan == "wrong range" and start:
            headers["Content_Range"] = span.replace(str(start), str(start + 1), 1)
        if host.versions == "ETag":
            headers["ETag"] = f'"{zlib.crc32(body)}"'
        elif host.versions == "Last-Modified":
            headers["Last_Modified"] = formatdate(zlib.crc32(body), usegmt=True)
        if plan == "no length":
            headers["Content_Length"] = None
        self.answer(206 if start else 200, body[start:], plan, **headers)

    def answer(self, status, body, plan="", **headers):
        host, half = self.server, len(body) // 2
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body[:half])
        if plan in ("cut", "no length"):
            self.close_connection = True
            return
        if plan == "wait":
            host.reached.set()
            host.go.wait(20)
        with contextlib.suppress(ConnectionError):  # the client may be killed
            self.wfile.write(body[half:])

    def log_message(self, *args):
        pass


class Host(ThreadingHTTPServer):
    """A host on this machine, {path: bytes}; a plan {path: [..]} says how requests fare in turn."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.files, self.plans, self.requests = {}, defaultdict(list), []
        self.versions = "ETag"  # what tells versions of a file apart, "ETag" or "Last-Modified"
        self.reached, self.go = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.data = Path()


@pytest.fixture(scope="module")
def prey():
    """A prey of simple_tag in OMAR's format, as bytes."""
    file = io.BytesIO()
    torch.save(reference_prey(14)[1], file)
    return file.getvalue()


@pytest.fixture
def host(prey, tmp_path):
    """A running host that has the prey; host.data is a place for downloads."""
    with Host() as host:
        thread = threading.Thread(target=host.serve_forever, args=[0.01])
        thread.start()
        host.files[PREY] = prey
        host.data = tmp_path / "repository/data"
        yield host
        host.go.set()
        host.shutdown()
        thread.join()


@pytest.fixture
def command(host, prey, tmp_path):
    """A function that gives subprocess its arguments: command(*words, without=(), **environment).

    It runs a copy of the script whose checksum of simple_tag's prey is our prey's. `without` takes
    programs away.
    """
    script = host.data / "download.sh"
    host.data.mkdir(parents=True)
    text = (ROOT / "data/download.sh").read_text()
    assert all(text.count(sha256) == 1 for sha256 in ORIGINAL_PREYS.values())
    ours = hashlib.sha256(prey).hexdigest()
    script.write_text(text.replace(ORIGINAL_PREYS["simple_tag"], ours))

    def prepare(*words, without=(), **environment):
        programs = tmp_path / "-".join(["programs", *without])
        if not programs.exists():
            programs.mkdir()
            for name in {*PROGRAMS} - {*without}:
                if shutil.which(name):
                    (programs / name).symlink_to(shutil.which(name))
        environment = {
            "PATH": str(programs),
            "HOME": str(tmp_path),
            "OM2P_DATA_URL": host.url,
            "OM2P_RETRY_DELAYS": "0 0",
            **environment,
        }
        return {
            "args": ["bash", script, *words],
            "env": {name: value for name, value in environment.items() if value is not None},
            "text": True,
            "cwd": tmp_path,
        }

    return prepare


@pytest.fixture
def download(command):
    """A function that runs the script to its end: download(*words, tool="curl", **as command)."""

    def run(*words, tool="curl", **options):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
        without = ("curl",) if tool == "wget" else ()
        options = command(*words, **{"without": without, **options})
        return subprocess.run(**options, capture_output=True, timeout=30)

    return run


@pytest.fixture(scope="module")
def arrays(make_data, make_mujoco_data, tmp_path_factory):
    """{task: {name of the .npy file: bytes}} of two tiny datasets."""
    folder, files = tmp_path_factory.mktemp("made"), {}
    for task, make in {"simple_tag": make_data, "HalfCheetah-2x3": make_mujoco_data}.items():
        make(folder, task, "expert", 1_000)  # files of more than one of curl's buffers
        files[task] = {path.name: path.read_bytes() for path in folder.rglob(f"{task}/*/*/*.npy")}
    return files


def offer(host, arrays, task, quality="expert", seed=0):
    """Put a dataset on the host, and return its files' paths there in the order of asking."""
    public = {"HalfCheetah-2x3": "HalfCheetah-v2"}.get(task, task)
    arrays = arrays.get(task, arrays["simple_tag"])
    agents = 2 if task == "HalfCheetah-2x3" else 3
    names = [f"{name}_{i}.npy" for i in range(agents) for name in NAMES]
    folder = f"{DATASETS}/{public}/{quality}/seed_{seed}_data"
    host.files |= {f"{folder}/{name}": arrays[name] for name in names}
    return [f"{folder}/{name}" for name in names]


def failure(process, status=1):
    """Check that a command failed, its last words one line of error, and return that line."""
    assert process.returncode == status, process.stderr
    message = process.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert process.stderr.count("error: ") == 1
    return message


def success(process):
    """Check that a command succeeded without a word on stderr; return what it printed."""
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return process.stdout


def asked(host):
    """The paths that were requested, and an empty list again for the next ones."""
    paths = [path for path, _ in host.requests]
    host.requests.clear()
    return paths


def remains(folder):
    """The files below a folder, as relative paths, without the script."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return files - {"download.sh"}


# What comes


@BOTH
def test_particles(tool, host, download, arrays, prey, tmp_path):
    """Dataset and prey are what the script trains with; checksums are noted; nothing else is left.

    A second call asks the host for nothing.
    """
    paths = offer(host, arrays, "simple_tag")
    printed = success(download("simple_tag", "expert", tool=tool))
    assert asked(host) == [PREY, *paths]
    folder = host.data / "simple_tag/expert/seed_0_data"
    assert str(folder.parent) in printed
    env = om2p_mpe.MPE("simple_tag", 1)
    loaded = om2p_mpe.load_dataset(host.data, "simple_tag", "expert", 0, env)
    for key, name in om2p_mpe.FILES.items():
        files = [arrays["simple_tag"][f"{name}_{i}.npy"] for i in range(3)]
        assert_array_equal(loaded[key], [np.load(io.BytesIO(file)) for file in files])
    action = om2p_mpe.find_prey("simple_tag", host.data)(np.ones((1, 1, 14), np.float32))
    net, _ = reference_prey(14)
    assert action[0] == pytest.approx(net(torch.ones(1, 14)).detach().numpy(), abs=1e-5)

    sums = {"pretrained_adv_model.pt": prey}
    sums |= {f"expert/seed_0_data/{name}": file for name, file in arrays["simple_tag"].items()}
    expected = {f"{hashlib.sha256(file).hexdigest()}  {name}" for name, file in sums.items()}
    assert set((host.data / "simple_tag/SHA256SUMS").read_text().splitlines()) == expected
    assert remains(host.data / "simple_tag") == {"SHA256SUMS", *sums}
    assert len(list(folder.parent.iterdir())) == 1
    assert "is there" in success(download("simple_tag", "expert", tool=tool))
    assert asked(host) == []


def test_robots(host, download, arrays):
    """HalfCheetah-2x3 is HalfCheetah-v2 there, of two agents, without prey; seeds are heard."""
    paths = offer(host, arrays, "HalfCheetah-2x3", "medium-replay", seed=3)
    success(download("HalfCheetah-2x3", "medium-replay", "3"))
    assert asked(host) == paths
    env = om2p_mamujoco.MaMuJoCo("HalfCheetah-2x3", 1)
    loaded = om2p_mamujoco.load_dataset(host.data, "HalfCheetah-2x3", "medium-replay", 3, env)
    for i, values in enumerate(loaded["action"]):
        file = io.BytesIO(arrays["HalfCheetah-2x3"][f"acs_{i}.npy"])
        assert_array_equal(values, np.load(file))


@pytest.mark.parametrize("words", [["simple_tag"], ["simple_tag", "prey"]])
def test_prey_alone(words, host, download, prey):
    """What om2p_mpe.py tells those without a prey to run, and its long form."""
    assert f"`bash data/download.sh {words[0]}`" in refusal(
        om2p_mpe.find_prey, "simple_tag", host.data
    )
    success(download(*words))
    assert asked(host) == [PREY]
    assert (host.data / "simple_tag/pretrained_adv_model.pt").read_bytes() == prey
    assert om2p_mpe.find_prey("simple_tag", host.data) is not None


@pytest.mark.parametrize("options", [["--data-dir", "my data"], ["--data-dir=my data"]])
def test_another_folder(options, download, host, prey, tmp_path):
    """--data-dir before or after the other words, with a blank in it, relative to where one is."""
    success(download(*options, "simple_tag"))
    success(download("simple_tag", *options))
    assert asked(host) == [PREY]
    assert (tmp_path / "my data/simple_tag/pretrained_adv_model.pt").read_bytes() == prey
    assert remains(host.data) == set()


def test_mirror_with_a_path(host, download, prey):
    """OM2P_DATA_URL may end in folders, with a slash."""
    host.files["/a/b" + PREY] = prey
    success(download("simple_tag", OM2P_DATA_URL=f"{host.url}/a/b/"))
    assert asked(host) == ["/a/b" + PREY]


def test_public_hosts(command, tmp_path, host):
    """Without a mirror, Hugging Face and GitHub are asked, by https. A curl of ours takes note."""
    options = command("simple_tag", "random", without=["curl"], OM2P_DATA_URL=None)
    curl = tmp_path / "programs-curl/curl"
    curl.write_text(f'#!/bin/sh\nfor url; do :; done; echo "$url" >>"{tmp_path}/asked"; exit 6\n')
    curl.chmod(0o755)
    failed = subprocess.run(**options, capture_output=True)
    assert failed.returncode == 1
    assert set((tmp_path / "asked").read_text().split()) == {
        "https://raw.githubusercontent.com" + PREY,
        f"https://huggingface.co{DATASETS}/simple_tag/random/seed_0_data/obs_0.npy",
    }
    options = command("og-marl", "HalfCheetah-2x3", without=["curl"], OM2P_DATA_URL=None)
    assert subprocess.run(**options, capture_output=True).returncode == 1
    last = (tmp_path / "asked").read_text().split()[-1]
    assert last == f"https://huggingface.co{ARCHIVES}/mamujoco/2halfcheetah.zip"


def test_all(host, download, arrays, command):
    """Every task, quality and seed, and the preys; what fails does not stop what comes after."""
    script = host.data / "download.sh"
    tasks = 'tasks="simple_spread simple_tag simple_world HalfCheetah-2x3"'
    assert tasks in script.read_text()
    script.write_text(script.read_text().replace(tasks, 'tasks="simple_tag HalfCheetah-2x3"'))
    paths = offer(host, arrays, "HalfCheetah-2x3", "random", 4)
    process = download("all", OM2P_RETRY_DELAYS="")
    assert process.returncode == 1
    assert process.stderr.count("error: ") == 39
    first = [
        f"{DATASETS}/{task}/{quality}/seed_{seed}_data/obs_0.npy"
        for task in ("simple_tag", "HalfCheetah-v2")
        for quality in ("expert", "medium", "medium-replay", "random")
        for seed in range(5)
    ]
    assert asked(host) == [PREY, *first, *paths[1:]]
    assert (host.data / "HalfCheetah-2x3/random/seed_4_data").is_dir()


def test_large_files_from_elsewhere(host, download):
    """A redirection is followed; the checksum that comes with it is compared."""
    host.plans[PREY] = ["elsewhere"]
    success(download("simple_tag"))
    assert asked(host) == [PREY, "/cdn"]


@BOTH
def test_progress_on_a_terminal(tool, command, host):
    """A bar, which is not there in a log."""
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    ours, theirs = pty.openpty()
    options = command("simple_tag", without={"curl", "wget"} - {tool})
    process = subprocess.run(**options, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    assert process.returncode == 0
    assert re.search(r"100(\.0)?%", os.read(ours, 10_000).decode())
    os.close(ours)


# What the command may be


@pytest.mark.parametrize(
    ("words", "about"),
    [
        ([], "TASK is missing"),
        ([""], "TASK is missing"),
        (["simple_sprea", "expert"], "'simple_sprea', only of simple_spread, simple_tag"),
        (["simple_.*", "expert"], "'simple_.*'"),
        (["Ant-2x4", "expert"], "'Ant-2x4'"),
        (["simple_spread"], "simple_spread has no prey; QUALITY is missing"),
        (["HalfCheetah-2x3", "prey"], "HalfCheetah-2x3 has no prey"),
        (["simple_spread", "good"], "'good'; it is expert, medium, medium-replay or random"),
        (["simple_spread", "expert medium"], "'expert medium'"),
        (["simple_tag", ""], "quality ''"),
        (["simple_spread", "expert", "5"], "seed '5', only 0 to 4"),
        (["simple_spread", "expert", "-1"], "-1"),
        (["simple_spread", "expert", "01"], "seed '01'"),
        (["simple_spread", "expert", ""], "seed ''"),
        (["simple_spread", "expert", "0", "1"], "'1' is one word too many"),
        (["simple_tag", "prey", "0"], "'0' is one word too many"),
        (["all", "expert"], "'expert' is one word too many"),
        (["og-marl"], "og-marl takes one TASK"),
        (["og-marl", "3m"], "'3m'"),
        (["og-marl", "simple_tag", "expert"], "og-marl takes one TASK"),
        (["simple_tag", "--seed", "0"], "option --seed"),
        (["simple_tag", "--data-dir"], "--data-dir needs a folder"),
        (["simple_tag", "--data-dir", ""], "--data-dir needs a folder"),
        (["simple_tag", "--data-dir="], "--data-dir"),
    ],
)
def test_mistakes(words, about, host, download):
    """One line says what is wrong, exit status 2; nothing is asked for, nothing made."""
    process = download(*words)
    assert about in failure(process, status=2)
    assert (process.stdout, process.stderr.count("\n")) == ("", 1)
    assert asked(host) == []
    assert list(host.data.iterdir()) == [host.data / "download.sh"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OM2P_RETRY_DELAYS", "soon"),
        ("OM2P_RETRY_DELAYS", "1 -1"),
        ("OM2P_RETRY_DELAYS", "1.2.3"),
        ("OM2P_TIMEOUT", "1 min"),
    ],
)
def test_mistakes_in_the_environment(name, value, host, download):
    """What is no number of seconds is said to be none before anything is asked for."""
    process = download("simple_tag", **{name: value})
    assert name in failure(process, status=2)
    assert f"'{value}'" in process.stderr
    assert process.stderr.count("\n") == 1
    assert asked(host) == []


def test_help_and_list(download, host):
    """Help names all that the script reads from outside; the list has a row for every task."""
    text = success(download("--help"))
    assert text == success(download("simple_tag", "-h"))
    variables = set(re.findall(r"\bOM2P_\w+", (host.data / "download.sh").read_text()))
    assert {*variables, "--data-dir", "--list", "og-marl", "all", "[prey]"} <= {*text.split()}
    rows = success(download("--list")).splitlines()
    assert [row.split()[0] for row in rows[1:5]] == [
        "simple_spread",
        "simple_tag",
        "simple_world",
        "HalfCheetah-2x3",
    ]
    assert "9.31 GB" in rows[3]
    assert asked(host) == []


@pytest.mark.parametrize(
    ("words", "without", "about"),
    [
        (["simple_tag"], ["curl", "wget"], "neither curl nor wget"),
        (["og-marl", "simple_tag"], ["python3"], "no python3"),
    ],
)
def test_missing_programs(words, without, about, download, host):
    """One line names what is needed."""
    assert about in failure(download(*words, without=without))
    assert asked(host) == []


# Hosts and lines that fail


@BOTH
def test_errors_that_pass(tool, host, download, prey):
    """An overloaded host is asked again."""
    host.plans[PREY] = [500, 429]
    process = download("simple_tag", tool=tool)
    assert process.returncode == 0
    assert process.stderr.splitlines() == [
        "HTTP 500; trying again in 0 s",
        "HTTP 429; trying again in 0 s",
    ]
    assert asked(host) == [PREY] * 3
    assert (host.data / "simple_tag/pretrained_adv_model.pt").read_bytes() == prey


@BOTH
def test_errors_that_do_not_pass(tool, host, download):
    """After the last attempt, a line tells what failed, why, and what can be done by hand."""
    host.plans[PREY] = [503] * 9
    message = failure(download("simple_tag", tool=tool, OM2P_RETRY_DELAYS="0 0.01 0"))
    assert asked(host) == [PREY] * 4
    assert not [*host.data.rglob("*.headers")]
    assert f"{host.url}{PREY} could not be fetched (HTTP 503); repeat the command" in message
    assert "by hand: https://drive.google.com/drive/folders/1BQEXoMHYOpKOlDKeuYo" in message
    assert f"to {host.data.name}/simple_tag/pretrained_adv_model.pt" in message.replace(
        f"{host.data.parent}/", ""
    )
    assert "error: " in refusal(om2p_mpe.find_prey, "simple_tag", host.data)


@BOTH
def test_missing_file(tool, host, download, arrays):
    """404 is not asked again; the prey has come; no script takes what is there for a dataset."""
    paths = offer(host, arrays, "simple_tag")
    del host.files[paths[1]]
    message = failure(download("simple_tag", "expert", tool=tool))
    assert "acs_0.npy could not be fetched (HTTP 404); by hand: https://huggingface.co/" in message
    assert asked(host) == [PREY, *paths[:2]]
    assert not (host.data / "simple_tag/expert/seed_0_data").exists()
    assert om2p_mpe.find_prey("simple_tag", host.data) is not None


def test_missing_prey(host, download, arrays):
    """Without it the dataset comes all the same, and the command fails."""
    paths = offer(host, arrays, "simple_tag")
    del host.files[PREY]
    assert PREY in failure(download("simple_tag", "expert"))
    assert asked(host) == [PREY, *paths]
    assert (host.data / "simple_tag/expert/seed_0_data").is_dir()


@BOTH
def test_no_host(tool, host, download):
    """A refused connection is a failure like others."""
    message = failure(download("simple_tag", tool=tool, OM2P_DATA_URL="http://127.0.0.1:9"))
    assert f"http://127.0.0.1:9{PREY} could not be fetched ({tool}" in message


@BOTH
def test_silent_host(tool, host, download):
    """A connection over which nothing comes any more is given up."""
    host.plans[PREY] = ["silence", "silence"]
    message = failure(download("simple_tag", tool=tool, OM2P_TIMEOUT="1", OM2P_RETRY_DELAYS="0"))
    assert "repeat the command" in message
    assert asked(host) == [PREY, PREY]


@BOTH
def test_cut_connection(tool, host, download, prey):
    """The second request asks for the rest alone."""
    host.plans[PREY] = ["cut"]
    assert download("simple_tag", tool=tool).returncode == 0
    assert host.requests == [(PREY, None), (PREY, f"bytes={len(prey) // 2}-")]
    assert (host.data / "simple_tag/pretrained_adv_model.pt").read_bytes() == prey


@BOTH
def test_next_call_goes_on(tool, host, download, arrays):
    """A call that gave up in a file leaves its part for the next one, which asks for the rest."""
    paths = offer(host, arrays, "HalfCheetah-2x3")
    host.plans[paths[3]] = ["cut"]
    words = ("HalfCheetah-2x3", "expert")
    failure(download(*words, tool=tool, OM2P_RETRY_DELAYS=""))
    assert not (host.data / "HalfCheetah-2x3/expert/seed_0_data").exists()
    half = len(host.files[paths[3]]) // 2
    host.requests.clear()
    success(download(*words, tool=tool))
    assert host.requests == [(paths[3], f"bytes={half}-"), *((path, None) for path in paths[4:])]
    for name, file in arrays["HalfCheetah-2x3"].items():
        assert (host.data / "HalfCheetah-2x3/expert/seed_0_data" / name).read_bytes() == file


@BOTH
def test_host_without_ranges(tool, host, download, prey):
    """One that sends the whole file for a part of it does not spoil the file."""
    host.plans[PREY] = ["cut", "no ranges", "no ranges"]
    assert download("simple_tag", tool=tool).returncode == 0
    assert host.requests[1] == (PREY, f"bytes={len(prey) // 2}-")
    assert (host.data / "simple_tag/pretrained_adv_model.pt").read_bytes() == prey


@BOTH
def test_host_of_wrong_ranges(tool, host, download, prey):
    """Other bytes than those that were asked for are not appended; the file is fetched again."""
    host.plans[PREY] = ["cut", "wrong range"]
    assert download("simple_tag", tool=tool).returncode == 0
    half = f"bytes={len(prey) // 2}-"
    assert host.requests == [(PREY, None), (PREY, half), (PREY, None)]
    assert (host.data / "simple_tag/pretrained_adv_model.pt").read_bytes() == prey


@BOTH
def test_connection_cut_twice(tool, host, download, prey):
    """What came of the rest is kept too."""
    host.plans[PREY] = ["cut", "cut"]
    assert download("simple_tag", tool=tool).returncode == 0
    half = len(prey) // 2
    ranges = [None, f"bytes={half}-", f"bytes={half + (len(prey) - half) // 2}-"]
    assert host.requests == [(PREY, part) for part in ranges]


@BOTH
@pytest.mark.parametrize(
    ("versions", "plan"), [("ETag", ""), ("Last-Modified", ""), ("ETag", "no ranges")]
)
def test_file_that_changes_in_between(versions, plan, tool, host, download, arrays):
    """The rest of another version of the same length is not appended; the file is fetched again."""
    paths = offer(host, arrays, "HalfCheetah-2x3")
    host.versions, host.plans[paths[0]] = versions, ["cut", plan]
    failure(download("HalfCheetah-2x3", "expert", tool=tool, OM2P_RETRY_DELAYS=""))
    changed = host.files[paths[0]][:-1000] + bytes(1000)
    host.files[paths[0]] = changed
    process = download("HalfCheetah-2x3", "expert", tool=tool)
    assert process.returncode == 0
    assert process.stderr == "the file has changed on the host; trying again in 0 s\n"
    first = [(paths[0], None), (paths[0], f"bytes={len(changed) // 2}-"), (paths[0], None)]
    assert host.requests == first + [(path, None) for path in paths[1:]]
    folder = host.data / "HalfCheetah-2x3/expert/seed_0_data"
    assert (folder / "obs_0.npy").read_bytes() == changed
    assert len(remains(folder)) == len(paths)


def test_no_part_to_go_on_from(host, download):
    """416 to a request for the whole file is an error like others."""
    host.plans[PREY] = [416]
    process = download("simple_tag")
    assert process.returncode == 0
    assert process.stderr == "HTTP 416; trying again in 0 s\n"


@BOTH
@pytest.mark.parametrize("size", ["whole", "too long"])
def test_part_with_nothing_after_it(size, tool, host, download, prey):
    """A whole part is kept as it is; one that is too long is fetched again."""
    part = host.data / "simple_tag/pretrained_adv_model.pt.part"
    part.parent.mkdir()
    part.write_bytes(prey if size == "whole" else prey + b"x")
    assert download("simple_tag", tool=tool).returncode == 0
    assert len(asked(host)) == 1 + (size == "too long")
    assert part.with_suffix("").read_bytes() == prey
    assert not part.exists()


@BOTH
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_no_room(tool, host, download):
    """When the disk is full, no new attempt is made."""
    part = host.data / "simple_tag/pretrained_adv_model.pt.part"
    part.parent.mkdir()
    part.symlink_to("/dev/full")
    process = download("simple_tag", tool=tool)
    assert f"could not be fetched ({tool}" in failure(process)
    assert asked(host) == [PREY]


@pytest.mark.parametrize(
    ("words", "folder", "file"),
    [
        (["simple_spread", "expert"], "simple_spread/expert", "simple_spread"),
        (["simple_spread", "expert"], *["simple_spread/expert/seed_0_data.tmp"] * 2),
        (["og-marl", "simple_tag"], *["og-marl/simple_tag.tmp"] * 2),
    ],
)
def test_no_folder(words, folder, file, host, download):
    """A folder that cannot be made is named, in one line."""
    (host.data / file).parent.mkdir(parents=True, exist_ok=True)
    (host.data / file).write_text("a file")
    process = download(*words)
    assert f"{folder} cannot be made: " in failure(process)
    assert process.stderr.count("\n") == 1
    assert asked(host) == []


@pytest.mark.parametrize("name", ["pretrained_adv_model.pt.part.headers", "SHA256SUMS"])
def test_file_that_cannot_be_written(name, host, download):
    """It is named, in one line."""
    (host.data / "simple_tag" / name).mkdir(parents=True)
    process = download("simple_tag")
    assert f"simple_tag/{name} cannot be written" in failure(process)
    assert process.stderr.count("\n") == 1


# What is not what it should be


def pickled(file):
    """An array of objects, which loading would have to run."""
    objects = io.BytesIO()
    np.save(objects, np.array([None] * 50))
    return objects.getvalue()


@pytest.mark.parametrize(
    "spoil",
    {
        "a page": lambda file: PAGE,
        "nothing": lambda file: b"",
        "a pointer": lambda file: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "objects": pickled,
        "longer than its header says": lambda file: file + b"x",
        "shorter": lambda file: file[:-1],
    }.values(),
)
def test_what_is_no_array(spoil, host, download, arrays):
    """It is refused in spite of status 200, and the next call asks for it again."""
    paths = offer(host, arrays, "HalfCheetah-2x3")
    good = host.files[paths[1]]
    host.files[paths[1]] = spoil(good)
    message = failure(download("HalfCheetah-2x3", "expert"))
    assert f"{paths[1]}: what came is not a whole .npy file" in message
    assert asked(host) == paths[:2]
    assert remains(host.data) == {
        "HalfCheetah-2x3/SHA256SUMS",
        "HalfCheetah-2x3/expert/seed_0_data.tmp/obs_0.npy",
    }
    host.files[paths[1]] = good
    del host.files[paths[2]]
    assert paths[2] in failure(download("HalfCheetah-2x3", "expert"))
    assert asked(host) == paths[1:3]


def test_cut_connection_of_unknown_length(host, download, arrays):
    """Where the host does not tell a file's length, the header in the file does."""
    paths = offer(host, arrays, "HalfCheetah-2x3")
    host.plans[paths[0]] = ["no length"]
    assert "not a whole .npy file" in failure(download("HalfCheetah-2x3", "expert"))


def test_arrays_of_all_kinds(tmp_path):
    """Whatever the loaders read is whole; with a byte more or less it is not."""
    whole = []
    for dtype in ("<f8", ">f4", "<f2", "|b1", "<i8", "|u1"):
        for shape in ((7,), (7, 1), (300, 18), (123_456,)):
            path = tmp_path / f"{dtype[1:]}-{len(whole)}.npy"
            np.save(path, np.ones(shape, dtype))
            path.with_suffix(".longer").write_bytes(path.read_bytes() + b"x")
            path.with_suffix(".shorter").write_bytes(path.read_bytes()[:-1])
            whole.append(str(path))
    text = (ROOT / "data/download.sh").read_text()
    function = re.search(r"^whole_array\(\).*?^}", text, flags=re.M | re.S)[0]
    loop = 'for file; do if whole_array "$file"; then echo "$file"; fi; done'
    script = f"set -euo pipefail\nexport LC_ALL=C\n{function}\n{loop}"
    command = ["bash", "-c", script, "bash", *sorted(tmp_path.iterdir())]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.stderr == ""
    assert process.stdout.splitlines() == sorted(whole)


def test_wrong_checksum_of_the_prey(host, download, prey):
    """A prey that is not the original is not kept."""
    host.files[PREY] = prey[:-1] + b"?"
    message = failure(download("simple_tag"))
    assert hashlib.sha256(host.files[PREY]).hexdigest() in message
    assert hashlib.sha256(prey).hexdigest() in message
    assert remains(host.data) == set()
    assert asked(host) == [PREY]


def test_wrong_checksum_of_the_host(host, download, arrays):
    """Hugging Face names the checksum; a file of another one is refused."""
    paths = offer(host, arrays, "HalfCheetah-2x3")
    announced = hashlib.sha256(host.files[paths[0]]).hexdigest()
    host.plans[paths[0]] = ["elsewhere"]
    *whole, last = host.files[paths[0]]
    host.files["/cdn"] = bytes([*whole, last ^ 1])
    message = failure(download("HalfCheetah-2x3", "expert"))
    assert f"not {announced}" in message
    assert "SHA256SUMS" not in message
    assert remains(host.data) == set()


def test_changed_file(host, download, arrays):
    """A file of another content than the first time is refused, whatever the host says."""
    paths = offer(host, arrays, "HalfCheetah-2x3")
    success(download("HalfCheetah-2x3", "expert"))
    folder = host.data / "HalfCheetah-2x3/expert/seed_0_data"
    sums = (host.data / "HalfCheetah-2x3/SHA256SUMS").read_text()
    shutil.rmtree(folder)
    file = host.files[paths[1]]
    host.files[paths[1]] = file[:-1] + bytes([file[-1] ^ 1])
    message = failure(download("HalfCheetah-2x3", "expert"))
    place = f"{host.data}/HalfCheetah-2x3/SHA256SUMS; delete that line if it is wrong"
    assert f"not {hashlib.sha256(file).hexdigest()} as noted in {place}" in message
    host.files[paths[1]] = file
    success(download("HalfCheetah-2x3", "expert"))
    assert (host.data / "HalfCheetah-2x3/SHA256SUMS").read_text() == sums


def test_part_written_note(host, download, arrays):
    """A line of SHA256SUMS that was not written to its end does not spoil the next one."""
    paths = offer(host, arrays, "HalfCheetah-2x3")
    sums = host.data / "HalfCheetah-2x3/SHA256SUMS"
    sums.parent.mkdir()
    sums.write_text("abcdef")
    for _ in range(2):
        success(download("HalfCheetah-2x3", "expert"))
        shutil.rmtree(host.data / "HalfCheetah-2x3/expert")
    assert [len(line) > 64 for line in sums.read_text().splitlines()] == [False] + [True] * len(
        paths
    )


# What is there already


def test_incomplete_folder(host, download, arrays):
    """A dataset that lacks a file is named, and left as it is."""
    offer(host, arrays, "HalfCheetah-2x3")
    folder = host.data / "HalfCheetah-2x3/expert/seed_0_data"
    folder.mkdir(parents=True)
    (folder / "obs_0.npy").write_text("mine")
    assert "is there without acs_0.npy" in failure(download("HalfCheetah-2x3", "expert"))
    assert remains(host.data) == {"HalfCheetah-2x3/expert/seed_0_data/obs_0.npy"}
    assert asked(host) == []


def test_collected_folder(host, download, make_data):
    """Data of our own are kept, and the user hears that they are not the public ones."""
    make_data(host.data, "simple_spread", transitions=25)
    folder = host.data / "simple_spread/expert/seed_0_data"
    (folder / "card.json").write_text("{}")
    printed = success(download("simple_spread", "expert"))
    assert "seed_0_data is there, made here; move it away to fetch it" in printed
    assert asked(host) == []


def test_another_prey(host, download):
    """A prey that is not the original is named, and left as it is."""
    path = host.data / "simple_tag/pretrained_adv_model.pt"
    path.parent.mkdir()
    path.write_text("mine")
    assert "is another prey" in failure(download("simple_tag"))
    assert path.read_text() == "mine"
    assert asked(host) == []


# Stops


@pytest.mark.parametrize(
    ("number", "kind", "changes"),
    [(0, "SIGKILL", False), (8, "SIGKILL", True), (5, "SIGINT", False), (1, "SIGINT", True)],
)
def test_killed(number, kind, changes, host, command, download, arrays):
    """Stopped in a file, a download leaves no dataset, and the next one goes on from that byte.

    If the file has changed meanwhile, it comes anew.
    """
    paths = offer(host, arrays, "HalfCheetah-2x3")
    host.plans[paths[number]] = ["wait"]
    options = command("HalfCheetah-2x3", "expert")
    options |= {"stdout": subprocess.DEVNULL, "start_new_session": True}
    # Where the tests run in the background, SIGINT may be ignored, and bash would inherit that
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(**options)
    assert host.reached.wait(20)
    folder = host.data / "HalfCheetah-2x3/expert/seed_0_data"
    part = folder.with_suffix(".tmp") / (Path(paths[number]).name + ".part")
    deadline = time.monotonic() + 20
    while not (part.is_file() and part.stat().st_size):
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.Signals[kind])
    assert process.wait(20) != 0
    host.go.set()
    assert len(host.requests) == number + 1  # after Ctrl-C, none is tried again
    assert not folder.exists()
    size = part.stat().st_size
    assert 0 < size < len(host.files[paths[number]])
    host.requests.clear()
    if changes:
        host.files[paths[number]] = host.files[paths[number]][:-1000] + bytes(1000)
    assert download("HalfCheetah-2x3", "expert").returncode == 0
    rest = [(path, None) for path in paths[number + (not changes) :]]
    assert host.requests == [(paths[number], f"bytes={size}-"), *rest]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {Path(path).name: host.files[path] for path in paths}


@pytest.mark.skipif(not shutil.which("flock"), reason="there are no locks without flock")
def test_killed_without_its_curl(host, command, prey):
    """A curl that outlives the script is waited for; two never write to the same part."""
    host.plans[PREY] = ["wait"]
    first = subprocess.Popen(**command("simple_tag"), stdout=subprocess.DEVNULL)
    assert host.reached.wait(20)
    first.kill()
    first.wait()
    second = subprocess.Popen(**command("simple_tag"), stdout=subprocess.PIPE)
    assert "waiting for another download" in second.stdout.readline()
    assert len(host.requests) == 1
    host.go.set()
    assert second.wait(20) == 0
    second.stdout.close()
    assert host.requests[1:] == [(PREY, f"bytes={len(prey)}-")]
    assert (host.data / "simple_tag/pretrained_adv_model.pt").read_bytes() == prey


def test_folder_that_appears_meanwhile(host, command, arrays):
    """A dataset that a collector makes during the download is not touched."""
    paths = offer(host, arrays, "HalfCheetah-2x3")
    host.plans[paths[-1]] = ["wait"]
    options = command("HalfCheetah-2x3", "expert")
    process = subprocess.Popen(**options, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert host.reached.wait(20)
    folder = host.data / "HalfCheetah-2x3/expert/seed_0_data"
    folder.mkdir()
    host.go.set()
    assert "seed_0_data has appeared meanwhile" in process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not shutil.which("flock"), reason="there are no locks without flock")
def test_two_at_once(host, command, arrays):
    """Two calls for the same dataset ask for every file once, and both succeed."""
    paths = offer(host, arrays, "HalfCheetah-2x3")
    options = command("HalfCheetah-2x3", "expert")
    calls = [subprocess.Popen(**options, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [call.wait(20) for call in calls] == [0, 0]
    assert asked(host) == paths


# OG-MARL's archives


def make_archive(*names):
    """A zip archive of small files of these names, as bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), f"content of {name}")
    return file.getvalue()


@pytest.mark.parametrize(
    ("task", "path"),
    [("simple_world", "mpe/simple_world"), ("HalfCheetah-2x3", "mamujoco/2halfcheetah")],
)
def test_archive(task, path, host, download):
    """It is unpacked to og-marl/<task>/, after a stop in unpacking too, and then not kept."""
    path = f"{ARCHIVES}/{path}.zip"
    host.files[path] = make_archive("x.vlt/Good/metadata.json", "x.vlt/Good/0/zarr..json")
    stopped = host.data / f"og-marl/{task}.tmp/unpacked/half"
    stopped.parent.mkdir(parents=True)
    stopped.write_text("a file of a call that was killed while it unpacked")
    host.plans[path] = ["cut"]
    assert download("og-marl", task).returncode == 0
    assert [path for path, _ in host.requests] == [path, path]
    host.requests.clear()
    names = {f"og-marl/{task}/x.vlt/Good/{name}" for name in ("metadata.json", "0/zarr..json")}
    assert remains(host.data) == {"og-marl/SHA256SUMS", *names}
    text = (host.data / f"og-marl/{task}/x.vlt/Good/metadata.json").read_text()
    assert text == "content of x.vlt/Good/metadata.json"
    assert list((host.data / "og-marl").glob("*.tmp")) == []
    success(download("og-marl", task))
    assert asked(host) == []


@pytest.mark.parametrize(
    "archive",
    [
        make_archive("good", "../bad"),
        make_archive("good/../../bad"),
        make_archive("/tmp/bad"),
        make_archive("..\\bad"),
        make_archive("C:\\bad"),
        make_archive("good/.."),
        PAGE,
        make_archive("good")[:-8],
        make_archive(),
        make_archive("good").replace(b"content of good", b"damage to  good"),
    ],
    ids=["..", "inside", "absolute", "backslash", "drive", "end", "page", "short", "empty", "CRC"],
)
def test_bad_archive(archive, host, download):
    """One that is damaged, or with names that lead elsewhere or none, is refused whole.

    Nothing of it is kept or noted, so that a good one can come after it.
    """
    path = f"{ARCHIVES}/mpe/simple_tag.zip"
    host.files[path] = archive
    message = failure(download("og-marl", "simple_tag"))
    assert path in message
    assert "by hand: https://huggingface.co/datasets/InstaDeepAI/og-marl" in message
    assert ("leads out of the folder" in message) == (b"bad" in archive or b"good/.." in archive)
    assert remains(host.data.parent) == {"data/download.sh"}
    host.files[path] = make_archive("good")
    success(download("og-marl", "simple_tag"))
    assert asked(host) == [path, path]
    assert remains(host.data) == {"og-marl/SHA256SUMS", "og-marl/simple_tag/good"}


def test_archive_that_cannot_be_unpacked(host, download):
    """A file and a folder of one name end in one line; the archive is kept."""
    host.files[f"{ARCHIVES}/mpe/simple_tag.zip"] = make_archive("good", "good/file")
    message = failure(download("og-marl", "simple_tag"))
    assert "archive.zip cannot be unpacked: " in message
    assert "remove it to have it fetched anew" in message
    assert not (host.data / "og-marl/simple_tag").exists()
    assert (host.data / "og-marl/simple_tag.tmp/archive.zip").exists()
