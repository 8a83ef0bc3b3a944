"""The downloader, as its users run it, and models by their names on the Hub; the Hub is a server of this process."""

import argparse
import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentTypeError
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from safetensors.torch import load_file, save

from checkpoint import load_model
from cli.arguments import ROOT, checkpoint_folder
from files import locked
from scripts import download
from tests.conftest import HANG, REPO, assert_user_error, run_forked
from tests.test_scripts import GetCheckpoint, assert_same_logits, convert, names_in, save_sharded, save_sharded_bin

DOWNLOAD = "scripts/download.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"
NO_HURRY = {f"HF_HUB_{what}_TIMEOUT": str(HANG) for what in ("DOWNLOAD", "ETAG")}  # else 10 s


class LocalHub(ThreadingHTTPServer):
    """As much of the Hub's API as a download asks for, over one repository `org/tiny`."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.commit = files, COMMIT
        self.fetched: list[str] = []
        self.refuse_repo: tuple[int, str] | None = None
        self.refuse_files: tuple[int, str] | None = None
        self.token: str | None = None
        self.cuts = 0  # how often the weights' connection is still to be dropped half-way
        self.stall = threading.Event()  # set: the weights stop half-way
        self.stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.refuse(401, "RepoNotFound")
        elif path.startswith("/api/models/org/tiny"):
            self.api(path.removeprefix("/api/models/org/tiny"))
        elif path.startswith(f"/org/tiny/resolve/{self.server.commit}/"):
            self.file(path.removeprefix(f"/org/tiny/resolve/{self.server.commit}/"))
        else:
            self.refuse(404, "RepoNotFound")

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"", status, {"X-Error-Code": code, "X-Error-Message": "no"})

    def api(self, path: str) -> None:
        files = self.server.files
        if self.server.refuse_repo:
            self.refuse(*self.server.refuse_repo)
        elif path in ("", "/revision/main", f"/revision/{self.server.commit}"):
            names = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": "org/tiny", "sha": self.server.commit, "siblings": names}).encode())
        elif path in (f"/tree/{self.server.commit}", "/tree/main"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()]
            self.answer(json.dumps(tree).encode())
        else:
            self.refuse(404, "RevisionNotFound")

    def file(self, name: str) -> None:
        if self.server.refuse_files:
            self.refuse(*self.server.refuse_files)
        elif name not in self.server.files:
            self.refuse(404, "EntryNotFound")
        else:
            self.send_file(name)

    def send_file(self, name: str) -> None:
        body, start = self.server.files[name], 0
        if self.command == "GET":
            self.server.fetched.append(name)
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
        headers = {"ETag": f'"{etag(body)}"', "X-Repo-Commit": self.server.commit}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(body[start:], 206 if start else 200, headers, weights=name == WEIGHTS)

    def answer(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, weights: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if weights and self.server.stall.is_set():
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.stalled.set()
            while self.server.stall.is_set():
                time.sleep(0.01)
        elif weights and self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(body[: len(body) // 2])
        else:
            self.wfile.write(body)


def etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub(hub_checkpoint: GetCheckpoint) -> Iterator[LocalHub]:
    path = hub_checkpoint("gqa").path
    files = {name: (path / name).read_bytes() for name in ("config.json", "generation_config.json", WEIGHTS)}
    files |= {
        name: name.encode() for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "README.md")
    }
    server = LocalHub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stall.clear()
    server.shutdown()
    server.server_close()


def hub_environment(tmp_path: Path, url: str) -> dict[str, str]:
    return {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "NO_PROXY": "127.0.0.1", **NO_HURRY}


def run_script(script: str, *args: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command's main in a child that is forked, with an environment of its own."""

    def main(args: list[str]) -> None:
        os.environ.update(environment)
        for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
            del sys.modules[name]  # it reads the environment when it is imported
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(args)

    return run_forked(main, *args, cwd=cwd)


def run_download(tmp_path: Path, url: str, *args: str) -> subprocess.CompletedProcess[str]:
    return run_script(DOWNLOAD, *args, cwd=tmp_path, **hub_environment(tmp_path, url))


def visible(path: Path) -> list[str]:
    return [name for name in names_in(path) if not name.startswith(".")]


def test_a_download_loads_and_holds_nothing_twice(tmp_path: Path, hub: LocalHub, hub_checkpoint: GetCheckpoint) -> None:
    wanted = sorted(hub.files)
    for extra in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "original/tokenizer.model",
        "onnx/model.onnx",
        "tf_model.h5",
        "model.gguf",
        ".gitattributes",
    ):
        hub.files[extra] = b"not needed"
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny")
    assert result.returncode == 0, result.stderr
    assert visible(tmp_path / "checkpoints" / "org" / "tiny") == sorted(hub.fetched) == wanted
    assert_same_logits(tmp_path / "checkpoints" / "org" / "tiny", hub_checkpoint("gqa"))


def test_shards_are_fetched_where_there_is_no_single_file(
    tmp_path: Path, hub: LocalHub, hub_checkpoint: GetCheckpoint
) -> None:
    save_sharded(hub_checkpoint("gqa").path, tmp_path / "model")
    del hub.files[WEIGHTS]
    hub.files |= {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    hub.files |= {"pytorch_model-00001-of-00001.bin": b"", "pytorch_model.bin.index.json": b"{}"}
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", "here", "--revision", "main")
    assert result.returncode == 0, result.stderr
    assert not any(".bin" in name for name in hub.fetched)
    assert_same_logits(tmp_path / "here", hub_checkpoint("gqa"))


@pytest.mark.parametrize(
    "name", ["model.safetensors-{}-of-2.safetensors", "part [{}].safetensors", "weights{}.safetensors"]
)
def test_the_index_names_the_shards_whatever_they_are_called(
    tmp_path: Path, hub: LocalHub, hub_checkpoint: GetCheckpoint, name: str
) -> None:
    tensors = load_file(hub_checkpoint("gqa").path / WEIGHTS)
    del hub.files[WEIGHTS]
    where = {tensor: name.format(i % 2 + 1) for i, tensor in enumerate(sorted(tensors))}
    for shard in set(where.values()):
        hub.files[shard] = save({tensor: tensors[tensor] for tensor in tensors if where[tensor] == shard})
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    wanted = sorted(hub.files)
    hub.files |= {"consolidated.safetensors": b"", "pytorch_model.bin": b"", "model-00001-of-00009.safetensors": b""}
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", "here")
    assert result.returncode == 0, result.stderr
    assert sorted(hub.fetched) == wanted
    assert_same_logits(tmp_path / "here", hub_checkpoint("gqa"))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"{", ["is no index"]),
        (b"[]", ["is no index"]),
        (b'{"weight_map": {"a": 1}}', ["names 1"]),
        (b'{"weight_map": {"a": ["b"]}}', ["is no index"]),
        (b'{"weight_map": {}}', ["is no index"]),
        (b'{"weight_map": {"a": "config.json"}}', ["'config.json'", "no file of the repository"]),
        (b'{"weight_map": {"a": "gone.safetensors"}}', ["'gone.safetensors'", "no file of the repository"]),
        (b'{"weight_map": {"a": "../up.safetensors"}}', ["'../up.safetensors'", "no file of the repository"]),
    ],
)
def test_an_index_that_names_no_files_is_one_line(
    tmp_path: Path, hub: LocalHub, index: bytes, words: list[str]
) -> None:
    del hub.files[WEIGHTS]
    hub.files["model.safetensors.index.json"] = index
    assert_user_error(run_download(tmp_path, hub.url, "--repo_id", "org/tiny"), "index.json", *words)


def test_bin_weights_are_fetched_where_there_are_no_others(
    tmp_path: Path, hub: LocalHub, hub_checkpoint: GetCheckpoint
) -> None:
    save_sharded_bin(hub_checkpoint("gqa").path, tmp_path / "model")
    del hub.files[WEIGHTS]
    hub.files |= {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", "here")
    assert result.returncode == 0, result.stderr
    convert(tmp_path / "here", tmp_path / "out")
    assert_same_logits(tmp_path / "out", hub_checkpoint("gqa"))


def test_a_repository_without_weights_is_refused_before_anything_is_written(tmp_path: Path, hub: LocalHub) -> None:
    hub.files["tiny.Q4_0.gguf"] = hub.files.pop(WEIGHTS)
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny")
    assert_user_error(result, "org/tiny has tiny.Q4_0.gguf and no model.safetensors", "scripts/convert_gguf.py")
    assert not (tmp_path / "checkpoints").exists()


def test_a_dropped_connection_is_taken_up_again(tmp_path: Path, hub: LocalHub, hub_checkpoint: GetCheckpoint) -> None:
    hub.cuts = 2
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", "here")
    assert result.returncode == 0, result.stderr
    assert hub.fetched.count(WEIGHTS) == 3
    assert_same_logits(tmp_path / "here", hub_checkpoint("gqa"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_second_run_completes_an_interrupted_download(
    tmp_path: Path, hub: LocalHub, hub_checkpoint: GetCheckpoint, number: signal.Signals
) -> None:
    hub.stall.set()
    command = [sys.executable, str(REPO / DOWNLOAD), "--repo_id", "org/tiny", "--output_dir", "here"]
    environment = {**os.environ, **hub_environment(tmp_path, hub.url)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert hub.stalled.wait(HANG)
        others = sorted(set(hub.files) - {WEIGHTS})
        deadline = time.monotonic() + HANG
        # A file is there for good with the client's note about it.
        notes = tmp_path / "here" / ".cache" / "huggingface" / "download"
        while not all((notes / f"{name}.metadata").exists() for name in others) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(HANG) == -number, "it ends while the file is still on its way"
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    hub.stall.clear()
    assert visible(tmp_path / "here") == others
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_model(tmp_path / "here")
    hub.fetched.clear()
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", "here")
    assert result.returncode == 0, result.stderr
    assert hub.fetched == [WEIGHTS]
    assert list(tmp_path.rglob("*.incomplete")) == []
    assert_same_logits(tmp_path / "here", hub_checkpoint("gqa"))


def test_without_a_network_a_download_ends_in_one_line_within_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    assert run_download(tmp_path, "http://127.0.0.1:9", "--repo_id", "a--b").returncode == 2  # asks for nothing
    usual, start = time.monotonic() - start, time.monotonic()
    result = run_download(tmp_path, "http://127.0.0.1:9", "--repo_id", "org/tiny")
    assert_user_error(result, "org/tiny could not be downloaded", "Connection refused", "check the network")
    assert time.monotonic() - start < 10 * usual
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("repo_id", ["a/b/c", "with space/x", "../../etc", "a--b", "", "/abs"])
def test_a_malformed_repo_id_is_one_line(tmp_path: Path, repo_id: str) -> None:
    result = run_download(tmp_path, "http://127.0.0.1:9", "--repo_id", repo_id)
    assert_user_error(result, f"--repo_id {repo_id!r}", "organization/name")


@pytest.mark.parametrize("args", [[], ["--repo_id"], ["--repo_id", "a/b", "--what"]])
def test_a_mistake_on_the_downloaders_command_line_is_one_line(tmp_path: Path, args: list[str]) -> None:
    assert_user_error(run_download(tmp_path, "http://127.0.0.1:9", *args))


@pytest.mark.parametrize(
    ("refuse_repo", "refuse_files", "words"),
    [
        ((404, "RepoNotFound"), None, ["was not found", "check the spelling", "hf auth login"]),
        ((401, "RepoNotFound"), None, ["was not found", "check the spelling", "hf auth login"]),
        ((401, ""), None, ["401", "token"]),
        ((403, ""), None, ["403", "token"]),
        ((500, ""), None, ["500", "run this again"]),
        ((403, "GatedRepo"), None, ["is gated", "accept its licence", "--hf_token"]),
        (None, (403, "GatedRepo"), ["is gated", "accept its licence", "--hf_token"]),
        (None, (401, "GatedRepo"), ["is gated", "accept its licence", "--hf_token"]),
        (None, (403, ""), ["could not be downloaded", "run this again"]),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(
    tmp_path: Path,
    hub: LocalHub,
    refuse_repo: tuple[int, str] | None,
    refuse_files: tuple[int, str] | None,
    words: list[str],
) -> None:
    hub.refuse_repo, hub.refuse_files = refuse_repo, refuse_files
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny")
    assert_user_error(result, "org/tiny", *words)


def test_a_revision_that_is_not_there_is_one_line(tmp_path: Path, hub: LocalHub) -> None:
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--revision", "v9")
    assert_user_error(result, "org/tiny has no revision 'v9'")


@pytest.mark.parametrize("output", ["file", "file/below", "nowhere", "protected/below"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_fetched(
    tmp_path: Path, hub: LocalHub, output: str
) -> None:
    (tmp_path / "file").write_text("keep")
    (tmp_path / "nowhere").symlink_to("gone/away")
    (tmp_path / "protected").mkdir(mode=0o555)
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", output)
    assert_user_error(result, f"{output} cannot be written", "no folder that can be written to")
    assert not hub.fetched and (tmp_path / "file").read_text() == "keep" and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("output", [".", "there/", "link", "new/below/"])
def test_a_folder_that_holds_other_files_keeps_them(tmp_path: Path, hub: LocalHub, output: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for folder in (tmp_path, tmp_path / "there"):
        (folder / "notes.txt").write_text("keep")
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", output)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / output / WEIGHTS).is_file() and (tmp_path / output).is_dir()
    assert all((folder / "notes.txt").read_text() == "keep" for folder in (tmp_path, tmp_path / "there"))


def test_files_of_an_earlier_revision_are_not_mixed_with_others(
    tmp_path: Path, hub: LocalHub, hub_checkpoint: GetCheckpoint
) -> None:
    hub.files |= {WEIGHTS: b"of an earlier revision", "chat_template.jinja": b"{{ messages }}"}
    assert run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", "here").returncode == 0
    (tmp_path / "here" / "notes.txt").write_text("keep")
    save_sharded(hub_checkpoint("gqa").path, tmp_path / "model")
    hub.commit = COMMIT[::-1]
    del hub.files[WEIGHTS], hub.files["chat_template.jinja"]
    hub.files |= {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    hub.fetched.clear()
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", "here")
    assert_user_error(result, "here/chat_template.jinja is of another revision", "name another --output_dir")
    assert not hub.fetched and (tmp_path / "here" / WEIGHTS).is_file()


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_a_file_that_is_not_the_hubs_is_not_replaced(tmp_path: Path, hub: LocalHub, name: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / name).write_text("mine")
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", "here")
    assert_user_error(result, f"here/{name} was not put there by a download", "name another --output_dir")
    assert not hub.fetched and visible(tmp_path / "here") == [name]
    assert (tmp_path / "here" / name).read_text() == "mine"


def test_two_downloads_into_one_folder_do_not_meet(tmp_path: Path, hub: LocalHub) -> None:
    (tmp_path / "here").mkdir()
    with locked(tmp_path / "here"):
        result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--output_dir", "here")
    assert_user_error(result, "another run is downloading into here")
    assert not hub.fetched


def test_a_private_repository_opens_to_its_token(tmp_path: Path, hub: LocalHub) -> None:
    hub.token = "hf_secret"
    assert_user_error(
        run_download(tmp_path, hub.url, "--repo_id", "org/tiny"), "log in (hf auth login) if it is private"
    )
    result = run_download(tmp_path, hub.url, "--repo_id", "org/tiny", "--hf_token", "hf_secret")
    assert result.returncode == 0, result.stderr
    assert "hf_secret" not in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A model by its name

DEMO = REPO / "checkpoints" / "demo"
GENERATE = ("--max_new_tokens", "3", "--prompt", "def", "--temperature", "0")


def cache(tmp_path: Path, hub: LocalHub) -> dict[str, str]:
    """Fetch the demo into the Hub's own cache, as other programs do; return an environment without a network."""
    hub.files = {file.name: file.read_bytes() for file in DEMO.iterdir()}
    fetch = [sys.executable, "-c", "import huggingface_hub as hub; hub.snapshot_download('org/tiny')"]
    subprocess.run(fetch, env={**os.environ, **hub_environment(tmp_path, hub.url)}, check=True, capture_output=True)
    assert WEIGHTS in hub.fetched
    return hub_environment(tmp_path, "http://127.0.0.1:9")


def test_a_model_in_the_hubs_cache_is_found_by_its_name_without_a_network(tmp_path: Path, hub: LocalHub) -> None:
    environment = cache(tmp_path, hub)
    by_path = run_script("generate.py", *GENERATE, cwd=tmp_path)
    for option in ("--checkpoint_path", "--draft_checkpoint_path"):
        result = run_script("generate.py", option, "org/tiny", *GENERATE, cwd=tmp_path, **environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout == by_path.stdout
    (tmp_path / "text.txt").write_text("def main():\n    return 0\n")
    result = run_script(
        "eval.py",
        "--checkpoint_path",
        "org/tiny",
        "--text_file",
        "text.txt",
        "--dtype",
        "float32",
        cwd=tmp_path,
        **environment,
    )
    assert "perplexity" in result.stdout, result.stderr
    result = run_script("quantize.py", "--checkpoint_path", "org/tiny", "--mode", "int8", cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert names_in(tmp_path / "checkpoints" / "org") == ["tiny-int8"], "and not in the cache"
    assert len(list((tmp_path / "hf").rglob("config.json"))) == 1


def test_a_downloaded_model_is_found_by_its_name(tmp_path: Path, hub: LocalHub) -> None:
    (tmp_path / "checkpoints" / "org").mkdir(parents=True)
    (tmp_path / "checkpoints" / "org" / "tiny").symlink_to(DEMO)
    result = run_script("generate.py", "--checkpoint_path", "org/tiny", *GENERATE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("script", "option", "rest"),
    [
        ("generate.py", "--checkpoint_path", ()),
        ("generate.py", "--draft_checkpoint_path", ()),
        ("eval.py", "--checkpoint_path", ("--text_file", "x")),
        ("quantize.py", "--checkpoint_path", ("--mode", "int8")),
    ],
)
def test_a_model_that_is_nowhere_is_one_line_with_the_command_that_fetches_it(
    tmp_path: Path, script: str, option: str, rest: tuple[str, ...]
) -> None:
    environment = hub_environment(tmp_path, "http://127.0.0.1:9")
    result = run_script(script, option, "org/other", *rest, cwd=tmp_path, **environment)
    assert_user_error(result, option, "org/other", "python scripts/download.py --repo_id org/other")


# ---------------------------------------------------------------------------------------------------------------------
# What of the Hub's cache is found: in this process, by the type of the option


MAIN, OTHER = "1" * 40, "2" * 40


def put_in_cache(cache: Path, commit: str = MAIN, ref: str | None = None, name: str = "o--m") -> Path:
    """Put the demo into a cache as the Hub's client does; return the snapshot."""
    repository = cache / f"models--{name}"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in DEMO.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    if ref:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.parametrize("ref", ["main", "dev", "refs/pr/1", None])
def test_the_only_snapshot_is_found_by_branch_by_commit_and_by_neither(own_cache: Path, ref: str | None) -> None:
    snapshot = put_in_cache(own_cache, ref=ref)
    for revision in (None, MAIN, MAIN[:7], *([ref] if ref else [])):
        assert checkpoint_folder("o/m", revision) == snapshot
    (own_cache / "link").symlink_to("models--o--m")
    for folder in ("models--o--m", "link"):
        assert checkpoint_folder(str(own_cache / folder)) == snapshot
    load_model(snapshot)


def test_a_gguf_is_a_path_there_or_not(own_cache: Path) -> None:
    Path("o").mkdir()
    assert checkpoint_folder("o/m.gguf") == Path("o/m.gguf"), "what to do with it is said where it is read"
    Path("o/m.gguf").touch()
    assert checkpoint_folder("o/m.gguf") == Path("o/m.gguf")


def test_a_snapshot_that_is_used_in_place_of_main_is_told(own_cache: Path, capsys: Any) -> None:
    snapshot = put_in_cache(own_cache, ref="main")
    assert checkpoint_folder("o/m/") == snapshot, "a slash at the end is none in a name"
    Path("o").mkdir()
    assert checkpoint_folder("o/m") == snapshot, "nor does a folder that is there make it a path"
    assert capsys.readouterr().err == ""
    (own_cache / "models--o--m" / "refs" / "main").write_text(OTHER)
    assert checkpoint_folder("o/m") == snapshot
    assert f"main is {OTHER[:12]}, which is not there; {snapshot.name[:12]} is" in capsys.readouterr().err


def test_a_disk_that_is_full_is_not_taken_for_the_network() -> None:
    words = r"o/m could not be written \(No space left on device\); make room"
    with pytest.raises(ValueError, match=words), download.hub_errors("o/m", None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_of_several_snapshots_main_is_found_and_the_others_by_revision(own_cache: Path) -> None:
    dev, main = put_in_cache(own_cache, OTHER, "dev"), put_in_cache(own_cache, MAIN, "main")
    for name in ("o/m", str(own_cache / "models--o--m")):
        assert checkpoint_folder(name) == main
        assert checkpoint_folder(name, "dev") == checkpoint_folder(name, OTHER) == dev
    (own_cache / "models--o--m" / "refs" / "main").unlink()
    for name in ("o/m", str(own_cache / "models--o--m")):
        with pytest.raises(ArgumentTypeError, match=rf"several snapshots.*--revision: {MAIN}, {OTHER}"):
            checkpoint_folder(name)
    put_in_cache(own_cache, main.name[:-1] + "x", "tag")
    with pytest.raises(ArgumentTypeError, match=f"several snapshots of {main.name[:7]}; name one"):
        checkpoint_folder("o/m", main.name[:7])


@pytest.mark.parametrize("revision", ["v9", "1", "3" * 40, "../main", "/etc/passwd", "*"])
def test_a_revision_that_is_not_cached_is_named_with_the_command_that_fetches_it(
    own_cache: Path, revision: str
) -> None:
    put_in_cache(own_cache, ref="main")
    for name in ("o/m", str(own_cache / "models--o--m")):
        with pytest.raises(ArgumentTypeError) as error:
            checkpoint_folder(name, revision)
        assert f"--repo_id o/m --revision {revision} --output_dir" in str(error.value)


def test_a_folder_of_the_cache_without_a_snapshot_is_one_line(own_cache: Path) -> None:
    (own_cache / "models--o--m" / "snapshots").mkdir(parents=True)
    with pytest.raises(ArgumentTypeError, match="has no snapshot of main; download"):
        checkpoint_folder(str(own_cache / "models--o--m"))


def test_a_path_beside_a_models_folder_is_refused_with_what_to_name(tmp_path: Path) -> None:
    files = ("model.safetensors", "config.json")
    for name in ("llama-7b", *(f"llama-7b/{file}" for file in files), "other/config.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}") if path.suffix else path.mkdir()
    (tmp_path / "no_model").mkdir()
    cures = {
        ".": f"has no config.json; name a folder in it, such as {tmp_path}/llama-7b",
        "lama-7b": f"is not a folder; name one or organization/name of the Hub; did you mean {tmp_path}/llama-7b?",
        "llama-7b/model.safetensors": f"is not a folder; name the one that it is in, {tmp_path}/llama-7b",
        "absent": "is not a folder; name one or organization/name of the Hub",
    }
    for name, cure in cures.items():
        with pytest.raises(argparse.ArgumentTypeError) as error:
            checkpoint_folder(str(tmp_path / name))
        assert str(error.value).startswith(f"{tmp_path / name} {cure}")
    for name in ("llama-7b", "no_model"):  # what is missing is said where it is read
        assert checkpoint_folder(str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize(
    ("script", "rest"),
    [("generate.py", GENERATE), ("eval.py", ("--text_file", "x")), ("quantize.py", ("--mode", "int8"))],
)
def test_a_revision_of_a_folder_is_one_line(tmp_path: Path, script: str, rest: tuple[str, ...]) -> None:
    result = run_script(script, "--checkpoint_path", DEMO, "--revision", "main", *rest, cwd=tmp_path)
    assert_user_error(result, "--checkpoint_path", "--revision main", "is a folder")


def test_a_revision_generates(tmp_path: Path) -> None:
    put_in_cache(tmp_path / "hf" / "hub", OTHER, "dev")
    put_in_cache(tmp_path / "hf" / "hub", MAIN, "main")
    name = ("--checkpoint_path", "o/m", "--revision", "dev")
    environment = hub_environment(tmp_path, "http://127.0.0.1:9")
    result = run_script("generate.py", *name, *GENERATE, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr


def test_links_into_the_users_own_cache_load_and_others_do_not(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, folder = put_in_cache(own_cache, ref="main"), own_cache.parent / "local"
    shutil.copytree(DEMO, folder)
    for target in (snapshot / WEIGHTS, snapshot.parents[1] / "blobs" / WEIGHTS):
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(target)
        load_model(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(own_cache.parent / "another"))
    with pytest.raises(ValueError, match="outside of its folder"):
        load_model(folder)


def test_blobs_may_be_a_link_in_the_users_own_cache_alone(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put_in_cache(own_cache, ref="main")
    blobs, moved = snapshot.parents[1] / "blobs", own_cache.parent / "moved"
    blobs.rename(moved)
    blobs.symlink_to(moved)
    load_model(checkpoint_folder("o/m"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(own_cache.parent / "another"))
    with pytest.raises(ValueError, match="outside of its folder"):
        load_model(snapshot)


@pytest.mark.parametrize("target", ["../secret", "token"])
def test_what_lies_beside_the_models_of_the_cache_is_not_read(own_cache: Path, target: str) -> None:
    snapshot = put_in_cache(own_cache, ref="main")
    shutil.copy(DEMO / WEIGHTS, own_cache / target)
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(own_cache / target)
    with pytest.raises(ValueError, match="outside of its folder"):
        load_model(snapshot)


def test_the_programs_own_checkpoints_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("checkpoints/demo") == ROOT / "checkpoints/demo"
    (tmp_path / "checkpoints/demo").mkdir(parents=True)
    assert checkpoint_folder("checkpoints/demo") == Path("checkpoints/demo")
