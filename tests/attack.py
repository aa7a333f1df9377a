"""
A seeded attack on the four scripts: kills, full disks and hostile input. Not part of the quick suite. Linux; mounting
full disks needs root. Everything happens in a temporary folder. Exits non-zero if anything failed.

$ python tests/attack.py                                  # about ten minutes on two cores
$ python tests/attack.py --parts kills --only ft-resume   # the cases whose name contains this, with all that they print

One parent imports torch and polars but computes nothing with them, so a case can be a fork, which starts at once: it
copies the base folders, forks again to run a script as __main__, and judges what that leaves.
"""
import argparse
import atexit
import base64
import builtins
import bz2
import csv
import ctypes
import gc
import gzip
import hashlib
import http.server
import io
import json
import lzma
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
SECONDS, IDLE, MEMORY = 60, 15, 2 << 30  # a run that is slower, sleeps without a break, or holds more has failed
COLUMNS = {"lost": "lost or differing bytes", "refused": "refused reruns or good inputs", "traceback": "tracebacks",
           "hang": f"hangs > {SECONDS} s", "memory": "> 2 GB", "escape": "raw escapes",
           "accepted": "accepted bad input",
           "hub": "hub requests", "code": "foreign code run", "left": "temporary files or processes left",
           "message": "messages that are missing, long or untrue"}
C = "--val-fraction 0.2 --size 48 --workers 1"
T = "--batch-size 16 --workers 0 --precision fp32 --log-every 1"
LP = f"train.py --phase lp --data data/tiny --model tiny.json --pretrained none --epochs 2 {T}"
FT = f"train.py --phase ft --data data/tiny --epochs 2 --save-every 0 {T}"
RESUME = "train.py --phase ft --out runs/part --workers 0 --resume"
P = "predict.py --run runs/tiny/ft --workers 0"
FILES = "--out preds/new.npz --submission preds/new.csv --neighbors 3 --html preds/new.html"
E = "ensemble.py preds/a.npz preds/b.npz --out preds/new.npz --submission preds/new.csv"
SOUP = "ensemble.py --soup runs/tiny/lp runs/tiny/ft --out runs/soup"
SCENARIOS = {  # name: folder written to, what of the base folders is removed first, command, its outputs
    "clean": ("data", "data/.cache", f"clean.py raw/prompts.csv --out data/new {C}", "data/new"),
    "clean-folder": ("data", "", f"clean.py odd --out data/new {C}", "data/new"),
    "clean-replace": ("data", "", f"clean.py raw/prompts.csv --out data/tiny {C} --size 40 --overwrite", "data/tiny"),
    "clean-demo": ("data", "data/.cache", f"clean.py --out data/demo {C}", "data/demo data/demo-raw"),
    "clean-pool": ("data", "", f"clean.py raw/prompts.csv --out data/new {C} --workers 2", "data/new"),
    "lp": ("runs", "runs/tiny", f"{LP} --out runs/tiny", "runs/tiny/lp"),
    "lp-replace": ("runs", "", f"{LP} --out runs/tiny --lr 0.01 --overwrite", "runs/tiny/lp"),
    "ft": ("runs", "runs/tiny/ft", f"{FT} --out runs/tiny", "runs/tiny/ft"),
    "ft-workers": ("runs", "runs/tiny/ft", f"{FT} --out runs/tiny --workers 1", "runs/tiny/ft"),
    "ft-resume": ("runs", "", RESUME, "runs/part/ft"),
    "predict": ("preds", "", f"{P} {FILES}", "preds/new"),
    "predict-images": ("preds", "", f"{P} raw/prompts.csv --tta 2 --prompt-col prompt {FILES}", "preds/new"),
    "predict-replace": ("preds", "", f"{P} --tta 2 --overwrite {FILES.replace('new', 'a')}", "preds/a."),
    "ensemble": ("preds", "", E, "preds/new"),
    "ensemble-replace": ("preds", "", f"{E.replace('new', 'old')} --weights 1,3 --overwrite", "preds/old"),
    "soup": ("runs", "", SOUP, "runs/soup")}
CLEAN, PREDICT, NEW = SCENARIOS["clean"][2], f"{P} --out preds/new.npz", f"{LP} --out runs/new"
INIT = f"{FT} --out runs/new --init runs/tiny/ft"


# ------------------------------------------------ running a script
class Hub(http.server.BaseHTTPRequestHandler):  # has nothing
    do_GET = do_HEAD = do_POST = lambda self: self.send_error(404)
    log_message = lambda *_: None  # noqa: E731


def preload(tmp):
    """Import all that the scripts import, and start a hub -> its process id"""
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    for name in ("http_proxy", "https_proxy", "all_proxy", "hf_hub_offline", "transformers_offline"):
        os.environ.pop(name, None), os.environ.pop(name.upper(), None)
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": f"{tmp}/hf", "HOME": str(tmp),
                   "MPLCONFIGDIR": f"{tmp}/mpl", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{tmp}/bin:{os.environ['PATH']}"}
    (tmp / "bin").mkdir()
    (tmp / "bin/gs").write_text("#!/bin/sh\ntouch PWNED\n")  # the Ghostscript to which Pillow hands EPS
    (tmp / "bin/gs").chmod(0o755)
    if not (hub := os.fork()):
        server.serve_forever()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name in ("numpy polars torch PIL.ImageCms clean train predict ensemble demo open_clip timm ftfy faiss "
                 "matplotlib.figure matplotlib.backends.backend_agg sentence_transformers").split():
        try:
            __import__(name)
        except ImportError as e:
            print(f"not preloaded: {e}", file=sys.stderr)
    gc.freeze()  # else every collection in a fork copies a gigabyte
    return hub


def run_as_main(words, root, log, kill):
    """What `python SCRIPT ARGS` does, in this fork."""
    import torch
    os.setsid()
    os.chdir(root)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 0
    try:
        for n, file in enumerate(("/dev/null", log / "out", log / "err")):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), n)
        while "=" in words[0]:
            os.environ.update([words.pop(0).split("=", 1)])
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        sys.stdout = open(1, "w", encoding=encoding, closefd=False)
        sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False)
        torch.set_num_threads(1)
        install_hooks(log, kill)
        sys.argv = [str(ROOT / words[0]), *words[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, (int, type(None))):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def install_hooks(log, kill):
    """Count file operations, and SIGKILL this process before or after the n-th of one kind. kill: (kind, n, when)."""
    import demo
    demo.draw_demo.__defaults__ = 60, 16, 0  # rows, corrupted, seed
    me, counts = os.getpid(), Counter()

    def wrap(module, name):
        real = getattr(module, name)

        def wrapped(*args, **kwargs):
            mode = str([*args, "r", "r"][1]) + kwargs.get("mode", "")
            if os.getpid() != me or name == "open" and not set("wax+") & set(mode):
                return real(*args, **kwargs)
            counts[name] += 1
            if kill == (name, counts[name], "before"):
                os.kill(me, signal.SIGKILL)
            result = real(*args, **kwargs)
            if kill == (name, counts[name], "after"):
                os.kill(me, signal.SIGKILL)
            return result
        setattr(module, name, wrapped)

    def audit(event, args):
        if event in ("socket.connect", "socket.getaddrinfo") and isinstance(args[1], (tuple, int)):  # not AF_UNIX
            with os.fdopen(os.open(log / "net", os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w") as f:
                f.write(f"{event} {args[-1]}\n")

    def start(process, real=multiprocessing.process.BaseProcess.start):
        counts["process"] += 1
        return real(process) if counts["process"] < 12 else os._exit(0)  # accepted to be a fork bomb
    multiprocessing.process.BaseProcess.start = start
    for name in ("replace", "rename", "unlink", "link", "fsync", "rmdir"):
        wrap(os, name)
    wrap(builtins, "open")
    io.open = builtins.open
    sys.addaudithook(audit)
    atexit.register(lambda: os.getpid() == me and (log / "ops").write_text(json.dumps(counts)))


def processes(session):
    """Living processes of a session -> {pid: (state, processor time, bytes of memory)}"""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            stat = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat[3]) == session and stat[0] not in "ZX":
            found[int(place.name)] = stat[0], int(stat[11]) + int(stat[12]), int(stat[21]) * 4096
    return found


def forked(f, *args):
    """f(*args) in a fork, because a process that has computed with polars must not fork a script"""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        with os.fdopen(writer, "wb") as out:
            try:
                pickle.dump(f(*args), out)
            except BaseException:
                pickle.dump(RuntimeError(traceback.format_exc()), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        result = pickle.load(source)
    os.waitpid(pid, 0)
    if isinstance(result, RuntimeError):
        raise result
    return result


class Case:
    """`root`, a copy of the base folders, in which scripts run; `problems` are what went wrong: (column, what)"""

    def __init__(self, root, base=None, without=""):
        self.root, self.log, self.problems, self.runs = root, root.with_name(f"{root.name}.log"), [], 0
        self.log.mkdir()
        if base:
            shutil.copytree(base, root, symlinks=True)
        for name in without.split():
            shutil.rmtree(root / name)

    def problem(self, column, text):
        self.problems.append((column, " ".join(f"{text}".split())[:300].encode("ascii", "backslashreplace").decode()))

    def run(self, command, kill=None, by=signal.SIGKILL):
        """kill: as in install_hooks, or seconds until the signal `by` -> rc, out, err, seconds"""
        words = shlex.split(command) if isinstance(command, str) else list(command)
        for file in self.log.iterdir():
            file.unlink()
        if not (pid := os.fork()):
            run_as_main(words, self.root, self.log, kill)
        self.runs, start, sent, now, looked, active, work, peak = self.runs + 1, time.monotonic(), False, 0, 0, 0, 0, 0
        while not (done := os.wait4(pid, os.WNOHANG))[0]:
            time.sleep(0.01)
            now = time.monotonic() - start
            if isinstance(kill, float) and now > kill and not sent:
                (os.killpg if by == signal.SIGINT else os.kill)(pid, by)  # Ctrl-C goes to all
                sent = True
            if now - looked < 0.5:
                continue
            looked, alive, before = now, processes(pid), work
            work, peak = sum(p[1] for p in alive.values()), max([peak, *(p[2] for p in alive.values())])
            if work != before or any(p[0] != "S" for p in alive.values()):
                active = now
            if now > SECONDS or now - active > IDLE or peak > 2 * MEMORY:
                os.kill(pid, signal.SIGKILL)
                looked = math.inf
                if peak <= 2 * MEMORY:
                    self.problem("hang", f"{now:.0f} s: {shlex.join(words)}")
        rc, peak = os.waitstatus_to_exitcode(done[1]), max(peak, done[2].ru_maxrss << 10)
        if peak > MEMORY:
            self.problem("memory", f"{peak >> 20} MiB: {shlex.join(words)}")
        for _ in range(100):
            if not (alive := processes(pid)):
                break
            time.sleep(0.1)
        for orphan in alive:
            self.problem("left", f"a process outlives {shlex.join(words)}")
            os.kill(orphan, signal.SIGKILL)
        out, err = ((self.log / n).read_bytes().decode("utf-8", "replace") for n in ("out", "err"))
        if VERBOSE:
            print(f"$ {shlex.join(words)}  # kill {kill}, rc {rc}, {now:.1f} s\n{out}{err}", file=sys.stderr)
        err = re.sub(r"[^\r\n]*\d+%\|[^\r\n]*?\]|\d+\w* \[[^\r\n]*?\]", "", err)  # bars of tqdm
        if "Traceback (most recent" in err:
            self.problem("traceback", err.strip().splitlines()[-1])
        shown = re.sub("(^|\n)\r+|\r+(?=\r|\n|$)", r"\1", out + err)
        if odd := re.search(r"[^\n]{0,30}[\0-\x08\x0b-\x1f\x7f-\x9f][^\n]{0,30}", shown):
            self.problem("escape", repr(odd[0]))
        if long := [line for line in re.split(r"[\r\n]", out + err) if len(line) > 2000]:
            self.problem("message", f"of {len(long[0])} characters: {long[0][:80]}")
        if (self.log / "net").exists():
            self.problem("hub", (self.log / "net").read_text())
        if (self.root / "PWNED").exists():
            self.problem("code", f"code in a file was run by {shlex.join(words)}")
        return SimpleNamespace(rc=rc, out=out, err=err, seconds=now, words=words)

    def last_line(self, result):
        return (result.err.strip().splitlines() or [""])[-1]

    def check_refusal(self, result):
        lines = [line for line in re.split(r"[\r\n]", result.err) if line.strip()]
        if result.rc < 0 and not {"hang", "memory"} & {p[0] for p in self.problems}:
            self.problem("message", f"ended by signal {-result.rc}")
        if result.rc > 0 and not 1 <= len(lines) <= 4 and "usage:" not in result.err and "Traceback" not in result.err:
            self.problem("message", f"{len(lines)} lines: {lines[-1:]}")

    def check_unchanged(self, before, outputs=()):
        """No file but outputs may have changed, and never one with "mine" in its path."""
        after = snapshot(self.root)
        changed = [n for n, facts in before.items() if after.get(n) != facts]
        for name in [n for n in changed if "mine" in n or not n.startswith(tuple(outputs))][:1]:
            self.problem("lost", f"{name} is {'changed' if name in after else 'gone'}")


def snapshot(root):
    """{path: mode, content} of all that is not hidden"""
    found = {}
    for place, folders, names in os.walk(root):
        folders[:] = [n for n in folders if not n.startswith(".")]
        for path in (Path(place, n) for n in folders + names if not n.startswith(".")):
            mode = path.lstat().st_mode
            content = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
            found[str(path.relative_to(root))] = mode, content and hashlib.sha256(os.fsencode(content)).digest()
    return found


def signature(root, outputs):
    """{path: hash} of what every finished run of a command must have left"""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name.startswith(tuple(outputs)) and path.is_file() and not re.search(r"(^|/)\.|log\.jsonl|notes\.txt", name):
            found[name] = hashlib.sha256(comparable(path).replace(str(root).encode(), b"")).hexdigest()
    return found


def comparable(path):
    """The bytes of a file; of those that hold times or absolute paths, the rest of their content"""
    import polars as pl
    import torch
    from safetensors import safe_open
    if path.suffix == ".parquet":
        return repr(pl.read_parquet(path).to_dict(as_series=False)).encode()
    if path.name == "summary.json":  # the hashes are of files with absolute paths
        return json.dumps(json.loads(path.read_text()) | {"hashes": 0}).encode()
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        timed = "images_per_s", "memory_gib", "args"
        return repr([[(k, v) for k, v in row.items() if k not in timed] for row in rows]).encode()
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        return repr([state[k] for k in ("step", "best", "raw", "ema")]).encode()
    if path.suffix == ".safetensors":  # its arguments say --resume
        with safe_open(path, "pt") as f:
            meta = json.loads(f.metadata()["config"]) | {"args": 0}
            return repr([(k, f.get_tensor(k).tolist()) for k in sorted(f.keys())] + sorted(meta.items())).encode()
    return path.read_bytes()


# --------------------------------------------- kills and full disks
def finish(case, name, before):
    """After an accident the same command must finish, and leave what an undisturbed run leaves."""
    command, outputs = SCENARIOS[name][2], SCENARIOS[name][3].split()
    result = case.run(command)
    if result.rc and "--resume" in result.err and name in ("ft", "ft-workers"):
        result = case.run(RESUME.replace("part", "tiny"))
    found, wanted = forked(signature, case.root, outputs), REFERENCE[name]["signature"]
    if result.rc and not (found == wanted and "already" in result.err):
        case.problem("refused", f"rc {result.rc}: {case.last_line(result)}")
    elif different := [n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)]:
        case.problem("lost", f"{len(different)} outputs differ, first {min(different)}")
    for path in [p for end in ("tmp", "partial", "old") for p in case.root.rglob(f"*.{end}")][:1]:
        case.problem("left", path.relative_to(case.root))
    case.check_unchanged(before, outputs)


def kill_case(case, name, kill, by):
    before = snapshot(case.root)
    result = case.run(SCENARIOS[name][2], kill, by)
    if name.startswith("ft") and result.rc == -signal.SIGHUP and "step 1 " in result.out:
        case.problem("lost", "SIGHUP does not save")
    if SCENARIOS[name][0] == "preds":  # every output is whole at any time, the old one or the new one
        for file, found in forked(signature, case.root, [SCENARIOS[name][3]]).items():
            if found not in (REFERENCE[name]["before"].get(file), REFERENCE[name]["signature"].get(file)):
                case.problem("lost", f"{file} is neither the old one nor the new one after the kill")
    finish(case, name, before)


def kills(rng):
    for name, facts in REFERENCE.items():
        points = sorted({(kind, n) for kind, count in facts["ops"].items() if kind != "process"
                         for n in (1, count, rng.randint(1, count))})
        for kind, n in rng.sample(points, min(6, len(points))):
            when = rng.choice(["before", "after"])
            yield f"{name}/{when}-{kind}-{n}", SCENARIOS[name][1], kill_case, name, (kind, n, when), signal.SIGKILL
        for by in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            share = round(rng.uniform(0.05, 1), 3)
            yield f"{name}/{by.name}-at-{share}", SCENARIOS[name][1], kill_case, name, share * facts["seconds"], by


def mount(place, kib, *flags):
    options = ",".join([*flags, f"size={max(4, kib)}k"])
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True).returncode == 0


def disk_case(case, name, share):
    """The folder that is written to becomes a tmpfs, in a mount namespace that ends with this process."""
    top, _, command, outputs = SCENARIOS[name]
    folder, kept = case.root / top, case.root / "kept"
    folder.rename(kept)
    folder.mkdir()
    private = ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
    private = private and subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0
    if not private or not mount(folder, 1 << 20):
        return print(f"disks/{name}/{share}: skipped, because no tmpfs can be mounted here", file=sys.stderr)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    shutil.rmtree(kept)
    before, used = snapshot(case.root), (os.statvfs(folder).f_blocks - os.statvfs(folder).f_bfree) * 4
    mount(folder, used + int(share * REFERENCE[name]["kib"]), "remount")
    result = case.run(command)
    if result.rc:
        case.full = 1
        case.check_refusal(result)
        if not re.search("No space left|[Dd]isk.*full|full.*disk", case.last_line(result)):
            case.problem("message", f"does not name the full disk: {case.last_line(result)}")
        found, new = forked(signature, case.root,
                            outputs.split()), REFERENCE[name]["signature"] if top == "preds" else {}
        done = [n for n, s in found.items() if s == new.get(n)]  # of several outputs the first ones
        case.check_unchanged({n: facts for n, facts in before.items() if n not in done}, ["runs/part/ft/metrics.jsonl"])
    mount(folder, 1 << 20, "remount")
    finish(case, name, before)
    subprocess.run(["umount", "-l", folder])


def disks(rng):
    for name in REFERENCE:
        if name not in ("lp-replace", "clean-pool", "ft-workers"):
            for share in (0.01, 0.35, 0.7, round(rng.uniform(0.05, 0.95), 3)):
                yield f"{name}/{share}", SCENARIOS[name][1], disk_case, name, share


# ------------------------------------------------------ bad inputs
class Evil:
    def __reduce__(self):
        return exec, ("open('PWNED', 'w')",)


def instead(make):
    """make(path), in the place of what is there"""
    def put(path):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        make(path)
    return put


def link(target):
    return instead(lambda path: os.symlink(target, path))


def moved(source):
    return lambda path: os.rename(path.parent / source, path)


def damaged(change):
    return lambda path: path.write_bytes(change(path.read_bytes() if path.exists() else bytes(5000)))


def edited(change):
    """The file that the path, a pattern, fits, with change(content, its metadata). Content: of JSON, last.pt and npz a
    dict, of a checkpoint the weights, of npy an array, of Parquet a DataFrame"""
    def put(path):
        import numpy as np
        import polars as pl
        import torch
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file
        path = next(path.parents[1].glob(f"{path.parent.name}/{path.name}"))
        load = {".json": lambda p: json.loads(p.read_text()), ".npy": np.load, ".npz": lambda p: dict(np.load(p)),
                ".parquet": pl.read_parquet, ".pt": lambda p: torch.load(p, weights_only=True),
                ".safetensors": load_file}
        found, meta = load[path.suffix](path), {}
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                meta = json.loads(f.metadata()["config"])
        found = change(found, meta)
        save = {".json": lambda: path.write_text(json.dumps(found)), ".npy": lambda: np.save(path, found),
                ".npz": lambda: np.savez(path, **found), ".parquet": lambda: found.write_parquet(path),
                ".pt": lambda: torch.save(found, path),
                ".safetensors": lambda: save_file(found, path, {"config": json.dumps(meta)})}
        save[path.suffix]()
    return put


def set_at(found, key, value):
    """set_at({"a": {"b": 1}}, "a.b", 2), in place; a value of "-" removes it"""
    *keys, last = key.split(".")
    for k in keys:
        found = found[k] if isinstance(found.get(k), dict) else found.setdefault(k, {})
    found.pop(last, 0) if value == "-" else found.update({last: value})


def zeros(mib):
    """A raw deflate stream of zeros, made at once: a block that was fully flushed can be repeated"""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)) * mib + b"\x03\0"


def forged_zip(*members):
    """(name, stored bytes, method, size once unpacked, flags) -> a zip that says so"""
    body = directory = b""
    for name, data, method, size, flags in members:
        name = os.fsencode(name)
        head = struct.pack("<5H3I2H", 20, flags | 2048, method, 0, 33, zlib.crc32(data), len(data), size, len(name), 0)
        directory += b"PK\1\2\x14\0" + head + struct.pack("<3H2I", 0, 0, 0, 0, len(body)) + name
        body += b"PK\3\4" + head + name + data
    end = struct.pack("<4H2IH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + end


def zip_with(name, data, method=0, size=None, flags=0):
    """odd/ as a zip, with one more member"""
    def make(path):
        members = [(p.name, p.read_bytes(), 0, p.stat().st_size, 0) for p in sorted(path.parent.glob("odd/*.*"))]
        stored, n = data() if callable(data) else (data, len(data))
        path.write_bytes(forged_zip(*members, (name, stored, method, size or n, flags)))
    return make


def tar_with(pack, data=b"", filler=0, **facts):
    """odd/ as a tar, behind one more member with `filler` times 16 MiB of zeros. pack: bytes, or a
    compressor of a kind that reads streams one after the other as one"""
    def make(path):
        info, buffer = tarfile.TarInfo("x.png"), io.BytesIO()
        for key, value in {"size": len(data), **facts}.items():
            setattr(info, key, value)
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for file in sorted(path.parent.glob("odd/*.*")):
                archive.add(file, file.name)
        head = info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)
        path.write_bytes(pack(head) + (pack(bytes(1 << 24)) * filler if filler else b"") + pack(buffer.getvalue()))
    return make


def picture(kind="PNG", size=(64, 64), mode="RGB", **kwargs):
    """Bytes of an image that is not blank"""
    from PIL import Image
    image = Image.linear_gradient("L").rotate(30).resize(size).convert(mode)
    image.save(out := io.BytesIO(), kind, **kwargs)
    return out.getvalue()


def png(width, height, data=b"", depth=8, colour=2, before=(b"", b"")):
    """A PNG by its chunks; before: kind and content of one ahead of the pixels"""
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), before, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
                                           for k, d in chunks if k)


def scans(n=1000):
    """A progressive JPEG with its last scan n times"""
    data = picture("JPEG", (3000, 3000), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * n + b"\xff\xd9"


def fuzzed(whole, rng):
    """Some bytes changed, and one in four cut off"""
    data = bytearray(whole)
    for _ in range(rng.choice([1, 3, 20])):
        data[rng.randrange(min(len(data), rng.choice([64, 10**6])))] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(data[:rng.choice([len(data)] * 3 + [rng.randrange(len(data))])])


def sidecar_bomb():
    """-> 239 MiB of JSON at about 161 : 1, below the ratio that is refused; its size"""
    unit = b"".join(b"%d," % n for n in random.Random(3).sample(range(10**6), 60)) + b"[]," * 15000
    deflate, data = zlib.compressobj(9, zlib.DEFLATED, -15), b"[" + unit * 5500 + b"0]"
    return deflate.compress(data) + deflate.flush(), len(data)


def large_array(name):
    """The npz with an array of 3.9 GB"""
    def make(path):
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,)}"
        header = b"\x93NUMPY\1\0v\0" + header.ljust(117) + b"\n"
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        large = deflate.compress(header) + deflate.flush(zlib.Z_FULL_FLUSH) + zeros(3900)
        with zipfile.ZipFile(path) as f:
            members = [(n, f.read(n), 0, f.getinfo(n).file_size, 0) for n in f.namelist() if n != f"{name}.npy"]
        path.write_bytes(forged_zip(*members, (f"{name}.npy", large, 8, len(header) + (3900 << 20), 0)))
    return make


def encoder_with(modules):
    """MiniLM's folder with another modules.json, and the module that it asks for"""
    def make(path):
        from clean import find_encoder
        shutil.copytree(Path(find_encoder()[0]), path, copy_function=os.symlink)
        (path / "modules.json").unlink()
        (path / "modules.json").write_text(json.dumps(modules))
        for folder in (path, path.parent):
            (folder / "evil.py").write_text("open('PWNED', 'w')\nclass Evil:\n    pass\n")
    return make


BAD, LARGE, GONE, BLANK, KEPT = "image unreadable", "image too large", "image missing", "image blank", "kept"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
PIXELS = zlib.compress(b"".join(b"\0" + bytes([i, 9, 9]) * 64 for i in range(64)))
HIDDEN = png(30000, 30000, b"\x78\xda" + zeros(100))  # for the inside of an icon
IMAGES = {  # rules, of which one must drop the image, or "kept": {name: its bytes, or what makes them}
    BAD: {"empty": b"", "html": b"<html>404</html>", "eps": EPS, "script": b"#!/bin/sh\ntouch PWNED\n",
          "eps-dos": struct.pack("<7IH", 0xc6d3d0c5, 30, len(EPS), 0, 0, 0, 0, 0) + EPS, "pickle": pickle.dumps(Evil()),
          "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "pfm": b"PF\n7900 7900\n-1.0\n", "zero": png(0, 64),
          "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">H2I2H", 3, 64, 64, 8, 3) + bytes(14) + bytes(range(64)) * 192,
          "half-png": lambda: picture()[:-200], "half-jpeg": lambda: picture("JPEG")[:-200],
          "half-webp": lambda: picture("WEBP")[:60], "pdf": lambda: picture("PDF"), "ico": lambda: picture("ICO")},
    LARGE: {"bomb": png(20000, 20000, b"\x78\xda" + zeros(50), 1, 0)},
    BLANK: {"pixel": png(1, 1, zlib.compress(bytes(4)))},
    f"{BAD}|{LARGE}": {
        "claims-png": png(60000, 60000), "claims-ppm": b"P6 60000 60000 255\n",
        "claims-bmp": struct.pack("<2sIIIIIIHH24x", b"BM", 54, 0, 54, 40, 60000, 60000, 1, 24),
        "ico-hidden": struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(HIDDEN), 22) + HIDDEN,
        "icns-hidden": b"icns" + struct.pack(">I4sI", len(HIDDEN) + 16, b"ic07", len(HIDDEN) + 8) + HIDDEN,
        "gif-hidden": lambda: picture("GIF", (16, 16), "P").replace(b",\0\0\0\0\x10\0\x10\0",
            b",\0\0\0\0\x30\x75\x30\x75")},
    KEPT: {"profile": lambda: picture("JPEG", icc_profile=b"x" * 500),
           "exif": lambda: picture("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")},
    f"{BAD}|{LARGE}|{KEPT}": {
        "wide": lambda: picture(size=(70000, 64)), "high": lambda: picture(size=(64, 70000)), "scans": scans,
        "longest": lambda: picture(size=(1_000_000, 48), mode="L"), "crc": png(64, 64, PIXELS[:-4] + b"abcd"),
        "text": png(64, 64, PIXELS, before=(b"zTXt", b"parameters\0\0\x78\xda" + zeros(500))),
        "icc": png(64, 64, PIXELS, before=(b"iCCP", b"x\0\0\x78\xda" + zeros(500))),
        "tiff-loop": lambda: re.sub(b"\0\0\0\0$", b"\x08\0\0\0", picture("TIFF"))}}
NAMES = {  # of files and folders
    "title": "\x1b]0;PWNED\x07", "red": "\x1b[31m", "return": "a\rb", "newline": "a\nb", "c1": "\x9b31m",
    "delete": "\x7f",
    "bytes": os.fsdecode(b"\xff\xfe"), "latin": os.fsdecode(b"caf\xe9"), "long": "n" * 251, "flag": "--overwrite",
    "format": "%s{}{0}", "quotes": "'\";", "space": " ", "cat": "🐱", "nfd": "e\u0301", "star": "*[0-9]",
    "backslash": "a\\b"}
DAMAGES = {  # what may stand in the place of a file; the first two always do
    "fifo": instead(os.mkfifo), "zero": link("/dev/zero"), "loop": link("loop"), "tty": link("/dev/tty"),
    "folder": instead(os.mkdir), "gone": link("nowhere"), "empty": instead(Path.touch),
    "random": instead(lambda p: p.write_bytes(random.Random(1).randbytes(5000))),
    "half": damaged(lambda b: b[:len(b) // 2]), "header": damaged(lambda b: b"\xff" * 8 + b[8:]),
    "pickle": damaged(lambda b: pickle.dumps(Evil())), "escape": damaged(lambda b: b"\x1b]0;PWNED\x07,\x1b[31m\n" * 9),
    "deep": damaged(lambda b: struct.pack("<Q", 100_000) + b"[" * 100_000)}
X, ODD = CLEAN.replace("raw/prompts.csv", "{}"), SCENARIOS["clean-folder"][2]
READS = [  # file, command that reads it, what must become of the run
    ("raw/images/00007.png", CLEAN, f"drop:00007:{GONE}|{BAD}"),
    ("raw/images/00007.png", f"{PREDICT} raw/prompts.csv", "named:00007"),
    ("odd/07.txt", ODD, "rows:20"), ("odd/07.json", ODD, "rows:20"), ("odd/x.zip", ODD, "rows:20"),
    ("odd/x.parquet", ODD, "rows:20"),
    *[(n, X.format(n), "refuse") for n in ("raw/prompts.csv", "x.jsonl", "x.tar", "x.parquet")],
    ("x.csv", f"{CLEAN} --exclude x.csv", "refuse"), ("data/tiny/summary.json", SCENARIOS["clean-replace"][2], "any"),
    ("data/.cache/53aa51172d142c89-fp32/evil.npz", CLEAN, "same:clean"), ("tiny.json", NEW, "refuse"),
    *[(f"data/tiny/{n}", NEW, "refuse") for n in ("summary.json", "pairs.parquet", "targets.npy")],
    *[(f"w.{end}", f"{NEW} --pretrained w.{end}", "refuse") for end in ("pt", "safetensors")],
    ("runs/tiny/lp/best.safetensors", SCENARIOS["ft"][2] + " --overwrite", "refuse"),
    ("runs/tiny/ft/best.safetensors", SOUP, "refuse"),
    ("runs/part/ft/last.pt", RESUME, "refuse"), ("runs/part/ft/metrics.jsonl", RESUME, "any"),
    ("runs/part/lp/metrics.jsonl", "predict.py --out preds/new.npz --workers 0", "ok"),
    ("runs/tiny/ft/best.safetensors", PREDICT, "refuse"),
    ("x.csv", f"{PREDICT} --neighbors 2 --corpus x.csv", "refuse"),
    ("x.csv", f"{PREDICT} --sample-submission x.csv", "refuse"), ("preds/a.npz", E, "refuse"),
    ("x.csv", f"{E} x.csv", "refuse"),
    ("preds/b.npz", f"{E.replace('b.npz', 'old.npz')} --fit preds/b.npz", "refuse")]
HUGE = "1" + "0" * 30
EDITS = [  # (file, commands that read it, changes): expressions of its content x and metadata meta, or a key and JSON
    # values, of which "-" removes it. "?": the run may succeed; "=": it must leave what an undisturbed one leaves
    ("runs/tiny/ft/best.safetensors", [PREDICT, SOUP], """
        backbone.config.vision_cfg.timm_model_name "local-dir:evil" "hf-hub:evil/evil" 5 "../evil"
        backbone.config.vision_cfg.timm_model_pretrained? true
        backbone.model "timm:local-dir:evil" "timm:hf-hub:evil/evil" "timm:nowhere" null
        backbone.model? "hf-hub:evil/evil" "\\u001b]0;PWNED\\u0007"
        backbone.kwargs {"checkpoint_path":"evil.bin"} {"pretrained_cfg":{"file":"evil.bin"}}
        backbone.image_size 8000 0 "32" null [32,32] 33.5 "-"
        backbone.config.vision_cfg.layers 1000000 0 -1 "2" [2,2,2,2] ; backbone.config.vision_cfg.width 1000000 0 null
        backbone.config.vision_cfg.head_width 0 1000000000 ; backbone.config.vision_cfg.patch_size 0 1
        backbone.config.vision_cfg.mlp_ratio 1e9 NaN ; backbone.config.vision_cfg.image_size? 8000
        backbone.config.vision_cfg.nowhere 1 ; backbone.config.embed_dim 1000000000 null
        backbone.mean [NaN,NaN,NaN] [0,0] null [0,0,"x"] ; backbone.std [0,0,0] [NaN,NaN,NaN] [1]
        backbone.interpolation? 5 "nowhere" ; backbone.resize_mode? "\\u001b[31m" ; backbone {} null "x"
        head "nowhere" null [] "mlp" ; dim 0 1000000000 "384" 10 ; format 1 "2" "-" ; text_model.name "-" 5 ""
        text_model? {"name":"evil/evil","sha256":"0"} ; data? 5 null "/dev/zero" "\\u001b]0;PWNED\\u0007" ; args? null
        x["head.weight"].fill_(nan) ; x["head.bias"][:1].fill_(inf) ; x.pop("head.bias")
        x.update({"\\x1b[31m": x["head.bias"].clone()}) ; x.update({"head.weight": x["head.weight"].T.contiguous()})
        [v.zero_() for k, v in x.items() if "head" in k] ; ? x.update({k: v.half() for k, v in x.items()})"""),
    ("runs/tiny/ft/best.safetensors", [f"{PREDICT} raw/prompts.csv evil.bin.png"], """
        mean_target "-" null "x" [0.1,0.1] ; meta.update(mean_target=[nan] * 384) ; meta.update(mean_target=[0] * 384)
        meta.update(mean_target=[1e300] * 384)"""),
    ("data/tiny/summary.json", [NEW, f"{PREDICT} --neighbors 2"], """
        format 1 "2" null "-" ; text_model null {} "x" "-" {"name":5,"sha256":5} ; hashes null [] "-" ; rows? -1"""),
    ("data/tiny/summary.json", [f"train.py --phase lp --data data/tiny --out runs/new {T} --epochs 1"], """
        recommend.model "hf-hub:evil/evil" "timm:hf-hub:evil/evil" "timm:local-dir:evil" "local-dir:evil" 5 []
        recommend.model "\\u001b]0;PWNED\\u0007" ; recommend.pretrained "evil.bin" ; recommend.image_size 1000000 "x"
        recommend.out? "evil" ; recommend.lp? {"out":"evil","lr":NaN} []"""),
    ("runs/part/ft/last.pt", [RESUME], """
        raw "-" {} 5 ; optimizer "-" {} ; step "-" 1000000000000000000000 -5 "3" null ; best? "-" "x"
        losses? "-" ["x"] ; world "-" 2 ; meta "-" {} ; args "-" {} ; args.lr "-" NaN "x" ; args.data "/dev/zero"
        args.batch_size 1000000000 0 ; meta.backbone.model "timm:hf-hub:evil/evil" "timm:local-dir:evil"
        meta.backbone.image_size 8000 ; meta.backbone.config.vision_cfg.layers 1000000
        [v.fill_(nan) for v in x["raw"].values() if v.is_floating_point()]"""),
    ("data/tiny/targets.npy", [NEW, f"{PREDICT} --neighbors 2"], """
        x.__setitem__(0, nan) ; x.__setitem__(slice(0, 60, 3), nan) ; x.__setitem__((5, 5), inf) ; x.__setitem__(0, 0)
        x * 613 ; x * np.where(np.arange(60) == 3, 2, 1)[:, None].astype("f4") ; ? x.astype("f8") ; ? x.astype("f2")
        x.astype("i4") ; x.astype("c8") ; x.astype("U5") ; x > 0 ; np.array([Evil()] * 60, object)
        x[:, :10] / np.linalg.norm(x[:, :10], axis=1, keepdims=True) ; x.ravel() ; x[None] ; x[:-1]"""),
    ("data/tiny/pairs.parquet", [NEW, f"{PREDICT} --neighbors 2"], """
        x.drop("image") ; x.drop("prompt") ; x.drop("split") ; ? x.drop("group")
        x.with_columns(split=pl.lit("nowhere")) ; x.with_columns(split=pl.lit(None, pl.String))
        x.with_columns(split=1) ; x.with_columns(image=1) ; x.with_columns(image=pl.lit(None, pl.String))
        x.with_columns(image=pl.concat_list("image")) ; x.with_columns(image=pl.lit("images/nowhere.jpg"))
        x.with_columns(image=pl.lit("images/\\x1b]0;PWNED\\x07.jpg")) ; x.with_columns(image=pl.lit("/dev/zero"))
        x.with_columns(weight=pl.lit(nan)) ; x.with_columns(weight=-1.0) ; x.with_columns(weight=pl.lit(None, pl.Float64))
        x.with_columns(weight=1e300) ; x.with_columns(weight=0.0) ; x.drop("weight") ; x.with_columns(source=1)
        x.head(20) ; x.head(0)"""),
    ("preds/a.npz", [E], """
        x["embeddings"].__setitem__(0, nan) ; x["embeddings"].__setitem__((1, 1), inf) ; x["embeddings"].fill(0)
        x["embeddings"].__setitem__(0, 0) ; x["ids"].__setitem__(0, x["ids"][1]) ; x["targets"].__setitem__(0, nan)
        x["targets"].fill(0) ; x | {"embeddings": x["embeddings"] * 1e30}
        x | {"embeddings": x["embeddings"].astype(int)} ; x | {"embeddings": x["embeddings"].astype(object)}
        x | {"embeddings": x["embeddings"][0]} ; x | {"embeddings": x["embeddings"][:, :3]}
        x | {"targets": x["targets"][:, :3]} ; x | {"ids": x["ids"][1:]} ; x | {"groups": x["groups"][1:]}
        x | {k: x[k][:0] for k in ("ids", "embeddings", "targets", "groups")} ; x.pop("ids") is None
        ? x | {"evil": np.array([Evil()])} ; ? x | {"views": np.array(["\\x1b[31m"])}
        x | {"weight": x["weight"] * nan} ; x | {"weight": -x["weight"]} ; x | {"weight": x["weight"][1:]}
        ? x | {"run": np.array("\\x1b[31m")} ; ? x | {"source": np.array(["\\x1b[31m"] * len(x["ids"]))}"""),
    ("data/.cache/53aa51172d142c89-fp32/*.npz", [CLEAN], """
        =clean x | {"x": x["x"] * nan} ; =clean x | {"x": x["x"] * 0} ; =clean x | {"x": x["x"] * 613}
        =clean x | {"x": x["x"][:, :10]} ; =clean x | {"x": x["x"][:, 0]} ; =clean x | {"x": x["x"][:3]}
        =clean x | {"x": x["x"].astype("U9")} ; =clean x | {"x": np.array([Evil()] * 60, object)}
        =clean x | {"keys": np.arange(60)} ; =clean x.pop("x") is None"""),
    ("runs/tiny/.features/*/*.npy", [SCENARIOS["lp-replace"][2]], """
        =lp-replace x * nan ; =lp-replace x[:, :5] ; =lp-replace x[..., :5] ; =lp-replace x.ravel()
        =lp-replace x.astype("U9") ; =lp-replace np.array([Evil()], object)""")]


def edits():
    """EDITS -> name, files, command, what must become of the run"""
    for file, commands, lines in EDITS:
        for line in re.split(r" ; |\n", lines.strip()):
            mark, same, expression = re.fullmatch(r" *(\?|=(\S+))? *(.*)", line).groups()
            key = re.match(r"([a-z_.]+)(\??) (?=[^=|*>])", expression)
            changes = [(expression, None, None)]
            if key:
                changes = [(f"{key[1].split('cfg.')[-1]}-{v}", key[1], v) for v in expression.split()[1:]]
            for count, (name, at, value) in enumerate(changes, 1):
                def change(x, meta, at=at, value=value, expression=expression, command=commands[0]):
                    import numpy as np
                    import polars as pl
                    if "train.py --phase lp --data data/tiny --out" in command:  # without --model
                        x["recommend"] = {"model": "timm:resnet10t", "pretrained": "none"}
                    if at:
                        return set_at(meta or x, at, json.loads(value)) or x
                    new = eval(expression, {**vars(np), "np": np, "pl": pl, "x": x, "meta": meta, "Evil": Evil})
                    return new if type(new) is type(x) else x  # else it was changed in place
                want = f"same:{same}" if same else "any" if mark or key and key[2] else "refuse"
                for command in commands[:1 + count % 2]:
                    yield f"{Path(file).stem}{slug(name)}", {file: edited(change)}, command, want


def slug(text):
    return re.sub(r"[^a-zA-Z0-9.-]+", "_", f" {text[:70]}").rstrip("_")


def arguments():
    """What must be refused -> command, arguments"""
    many = {
        CLEAN: f"""--seed -1|--seed {HUGE}|--per-prompt {HUGE}|--per-prompt 0|--threshold nan|--threshold inf
            --threshold 0
            --split-threshold nan|--val-fraction nan|--val-fraction -0.1|--val-fraction 1.5|--size 0|--size {HUGE}
            --workers 0
            --workers -1|--limit 0|--max-tokens 0|--max-nsfw nan|--charset foo|--image-col nowhere
            --prompt-col nowhere
            --holdout-source nowhere|--text-model ./nowhere|--exclude nowhere|nowhere.csv|/dev/zero|--out .|--out ..
            --out /
            --out ''|--out /dev/null|--out raw|--out raw/prompts.csv|--out data/tiny|--out tiny.json --overwrite
            --out raw --overwrite|--out raw/images --overwrite|--out . --overwrite|--out runs/tiny --overwrite
            --out odd --overwrite|--out preds --overwrite""",
        NEW: f"""--seed -1|--seed {HUGE}|--epochs 0|--epochs {HUGE}|--batch-size 0|--batch-size 1|--batch-size {HUGE}
            --lr nan
            --lr inf|--lr 0|--wd nan|--warmup -1|--grad-clip-norm nan|--hflip nan|--hflip 2|--image-size 7
            --image-size 1000000
            --image-mean nan 0 0|--image-std 0 0 0|--image-std nan 1 1|--ema 0.5|--model nowhere
            --model timm:local-dir:evil
            --model raw/prompts.csv|--pretrained nowhere|--pretrained evil.bin|--head foo|--data nowhere|--data raw
            --data raw/prompts.csv|--out tiny.json|--out data/tiny|--out /dev/null|--workers -1|--workers 1000000
            --resume
            --mixgen 0.5|--dry-run|--model local-dir:evil --pretrained x""",
        INIT: """--mixgen nan|--mixgen 0.9|--layer-decay 0|--layer-decay nan|--accum-freq 0|--unfreeze-from 99
            --save-every nan
            --unfreeze-from -1|--save-every -1|--log-every 0|--init nowhere|--init raw|--init preds/a.npz|--ema 2
            --ema nan
            --model ViT-L-14|--out runs/tiny|--head mlp""",
        PREDICT: f"""--tta 0|--tta 5|--batch-size 0|--workers -1|--workers 1000000|--neighbors -1|--neighbors {HUGE}
            --limit 0
            --blend-neighbors nan|--blend-neighbors 2|--run nowhere|--run data|--run preds/a.npz|--out data/tiny
            --out .|--out /
            --out preds/a.npz|--out /dev/null|--submission data|--submission preds/new.npz|--html preds/new.npz
            --html preds/x --submission preds/x|--html preds/new.neighbors.parquet --neighbors 3
            --corpus nowhere --neighbors 2
            --corpus raw/images --neighbors 2|--sample-submission nowhere|--sample-submission raw/prompts.csv|nowhere
            /dev/zero
            tiny.json|raw/prompts.csv --image-col nowhere|raw/prompts.csv --prompt-col nowhere
            raw/images/00001.png --out raw/images/00001.png --overwrite|--submission notes.txt --overwrite
            --html raw/prompts.csv --overwrite|--html notes.txt --overwrite
            --out runs/tiny/ft/best.safetensors --overwrite
            --out data/tiny/pairs.parquet --overwrite|--out notes.txt --overwrite
            raw/prompts.csv --submission raw/prompts.csv --overwrite
            --sample-submission preds/a.csv --submission preds/a.csv --overwrite""",
        E: """--weights nan,1|--weights 0,0|--weights 1|--weights inf,1|--weights foo|--out preds/a.npz|--out preds
            --out .|--out /
            --out preds/a.npz --overwrite|--submission preds/b.npz --overwrite|--submission preds/new.npz
            --submission preds/new.json|--out preds/x.json|--out preds/x.png|--out /dev/null|--fit nowhere
            --fit raw/prompts.csv
            --sample-submission nowhere|--submission notes.txt --overwrite|--soup nowhere
            --soup runs/tiny/lp --out runs/tiny
            --soup runs/tiny/ft --out runs/tiny --overwrite|--soup raw runs/tiny/ft --out runs/new"""}
    for command, lines in many.items():
        yield from ((command, words.strip()) for line in lines.split("\n") for words in line.split("|"))


def tables():
    """What clean.py may be given as a table -> name, content or what makes it, what must become of it"""
    import polars as pl  # only its expressions, before the forks
    record = [{"image": f"raw/images/{n:05d}.png", "prompt": prompt} for n, prompt in enumerate(PROMPTS[:20])]
    lines, head, last = "\n".join(map(json.dumps, record)), "image,prompt\n", PROMPTS[30]
    rows = head + "".join(f'{r["image"]},"{r["prompt"]}"\n' for r in record)
    for n, prompt in enumerate(("a cat \x1b]0;PWNED\x07 on a mat", f"photo {'x' * 9900}", "x" * 20000,
                                "word " * 250_000, "é" * 9000,
                                "a" + "\u0301" * 9000, "🐱" * 9000)):
        yield f"prompt-{n}.csv", f'{rows}raw/images/00030.png,"{prompt}"\n', "rows:21"
    for n, image in enumerate(("\x1b]0;PWNED\x07.png", "a\0b.png", "../../../../../../etc/passwd", "self.csv::0",
                               "/proc/self/mem",
                               "http://127.0.0.1:9/a.png", "a.zip::b.zip::c.png::d", "/proc/kmsg")):
        yield f"image-{n}.csv", f'{rows}{image},"{last}"\n', "rows:21"
    for n, cell in enumerate(("\ud800.png", {"bytes": 5, "path": ["x"]}, [[[]]], "data:image/png;base64,!!", *(
            f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (png(60000, 60000), EPS)))):
        yield f"cell-{n}.json", json.dumps([*record, {"image": cell, "prompt": last}]), "rows:21"
    for n, change in enumerate((
            lambda d: d.with_columns(prompt=pl.struct(**{"\x1b[31m": "prompt"})),
            lambda d: d.with_columns(image=pl.lit(EPS)),
            lambda d: d.select(image=1, prompt=2.5),
            lambda d: pl.select(prompt=pl.repeat("a cat", 30_000_000), image=pl.repeat("a", 30_000_000)))):
        yield f"odd-{n}.parquet", lambda path, change=change: change(pl.DataFrame(record)).write_parquet(path), "refuse"
    yield from (("header.csv", head, "refuse"), ("zeros.csv", "\0" * 9999, "refuse"), ("nan.json", "[NaN]", "refuse"),
                ("columns.csv", "\x1b]0;PWNED\x07,b\rc\n1,2\n", "refuse"),
                ("keys.json", '{"\\u001b[31m": {"a": 1}}', "refuse"),
                ("many.csv", ",".join(map(str, range(200_000))) + "\n1\n", "refuse"),
                ("long.csv", "c" * 10**6 + ",b\n1,2\n", "refuse"),
                ("ragged.csv", f"{rows}1,2,3,4\n", "rows:20"), ("quote.csv", f'{rows}"{"x" * 10**6}', "any"),
                ("source.csv", "source," + rows.replace("raw/im", "\x1b[31mred\x07,raw/im"), "rows:20"),
                ("deep.json", "[" * 200_000, "refuse"), ("deep2.json", '{"image":' * 100_000, "refuse"),
                ("digits.json", "1" * 100_000, "refuse"),
                ("garbage.jsonl", f"{lines}\n\x1b[31m{{\n[1]\n5\n{'[' * 100_000}", "rows:20"),
                ("digits.jsonl", f'{lines}\n{{"image": {"1" * 9999}, "prompt": 1e999}}', "any"))


def archives():
    """Archives that hold odd/, too -> name, what makes it, what must become of it in clean.py"""
    one, more = picture(), "rows:20|rows:21"
    for name, member in {
            "sidecar": ("07.json", sidecar_bomb, 8), "table": ("x.json", sidecar_bomb, 8),
            "suffix": ("x.\x1b[31m", one),
            "zero": ("x.png", zeros(3000), 8, 3000 << 20), "liar": ("x.png", zeros(3000), 8, 5000),
            "eps": ("x.png", EPS),
            "claims": ("x.png", one, 0, 0xfffffffe), "encrypted": ("x.png", one, 0, None, 1),
            "method": ("x.png", one, 77),
            "up": ("../mine.png", one), "escape": ("\x1b]0;PWNED\x07.png", one), "newline": ("a\nb\r/c.png", one),
            "long": ("x" * 60000 + ".png", one)}.items():
        yield f"{name}.zip", zip_with(*member), more
    yield "twice.zip", zip_with("07.png", b"not an image"), "any"
    for name, right, member in (("link", more, {"type": b"2", "linkname": "/etc/passwd"}),
                                ("device", more, {"type": b"3", "devmajor": 1}),
                                ("up", more, {"data": one, "name": "../mine.png"}),
                                ("claims", "any", {"size": 1 << 40}),
                                ("escape", more, {"data": one, "name": "\x1b]0;PWNED\x07.png"}),
                                ("negative", "any", {"size": -512})):
        yield f"{name}.tar", tar_with(bytes, **member), right
    for end, pack in {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.items():
        for kind in "Lxg":  # a long name or a pax header of 8 GB
            yield f"{kind}.tar.{end}", tar_with(pack, filler=512, type=kind.encode(), size=1 << 33), "refuse"


def owned():
    """Files of the user, with "mine" in their paths, where outputs go -> name, files, command, right outcome"""
    replace, mine = SCENARIOS["clean-replace"][2], f"{E.replace('new.n', 'mine.n')} --overwrite"

    def at(folder, **more):
        more = {"mine.txt": b"mine", "images/mine.png": b"mine", **more}
        return {f"{folder}/{name}": data for name, data in more.items()}
    yield from (
        ("raw", at("data/new-raw"), f"clean.py --out data/new {C}", "refuse"),
        ("old", at("data/new.old"), CLEAN, "any"),
        ("partial", at("data/new.partial"), CLEAN, "any"), ("tiny-old", at("data/tiny.old"), replace, "any"),
        ("tiny-partial", at("data/tiny.partial"), replace, "any"),
        ("file", {"data/new": b"mine"}, f"{CLEAN} --overwrite", "refuse"),
        ("folder", at("data/new"), f"{CLEAN} --overwrite", "refuse"), ("added", at("data/tiny"), replace, "any"),
        ("log", at("data/new", **{"images/log.jsonl": b"mine"}), f"{CLEAN} --overwrite", "refuse"),
        ("summary", at("data/new", **{"summary.json": b'{"funnel": 1}'}), f"{CLEAN} --overwrite", "refuse"),
        *[(f"link-{n}", {"data/new": link(to)}, f"{CLEAN} --overwrite", "refuse") for n,
          to in enumerate(("../raw", "tiny", "new"))],
        ("holds", {"data/in": moved("../raw")}, f"clean.py data/in/prompts.csv --out data --overwrite {C}", "refuse"),
        ("by-link", {"data/x": link("../raw")}, f"clean.py data/x/prompts.csv --out raw --overwrite {C}", "refuse"),
        ("npz", {"mine.npz": b"mine"}, f"{P} --out mine.npz --overwrite", "refuse"),
        ("csv", {"mine.csv": b"a,b\n"}, f"{PREDICT} --submission mine.csv --overwrite", "refuse"),
        ("html", {"mine.html": b"<html>mine</html>"}, f"{PREDICT} --html mine.html --overwrite", "refuse"),
        ("npz", {"preds/mine.npz": b"mine"}, mine, "refuse"),
        ("chart", {"preds/mine.json": b"{}", "preds/mine.png": b"mine"}, mine, "refuse"),
        ("weights", {"runs/tiny/lp/best.safetensors": b"mine"}, SCENARIOS["lp-replace"][2], "any"),
        ("out-link", {"preds/new.npz": link("../mine.txt"), "mine.txt": b"mine"}, f"{PREDICT} --overwrite", "any"),
        ("twins", {"odd/07.png.png": lambda p: shutil.copy(p.with_name("07.png"), p)}, f"{PREDICT} odd", "ids:21"),
        ("twin-bytes", {f"odd/{os.fsdecode(b'a' + c)}.png": picture() for c in (b"\xff", b"\xfe")}, f"{PREDICT} odd",
         "any"))


def others(rng):
    """What fits no other table -> name, files, command, what must become of it"""
    for kind in "PNG JPEG WEBP GIF TIFF BMP AVIF JPEG2000 PPM TGA DDS PCX SGI QOI MPO".split():
        whole = forked(picture, kind)
        files = {f"raw/images/{n:05d}.png": fuzzed(whole, rng) for n in range(30)}
        yield f"fuzz-{kind}", files, CLEAN, f"drop:000[0-2].:{BAD}|{LARGE}|{BLANK}|{KEPT}"
        yield f"fuzz-{kind}", files, f"{PREDICT} raw/images", "ids:60"
    for key, name in NAMES.items():
        files, folder = {f"odd/{name}.png": moved("07.png"), f"odd/{name}.txt": moved("07.txt")}, {name: moved("odd")}
        yield f"name-{key}", files, ODD, "rows:20"
        yield f"name-{key}", files, f"{PREDICT} odd --html preds/new.html", "ids:20"
        right = ("rows:20", "ids:20") if name.isprintable() or name.isascii() else ("any", "any")
        yield f"folder-{key}", folder, ["clean.py", *f"--out data/new {C} --".split(), name], right[0]
        yield f"folder-{key}", folder, [*PREDICT.split(), "--", f"./{name}"], right[1]
        yield f"out-{key}", {}, ["clean.py", "odd", *C.split(), f"--out=data/new{name}"], "any"
        if key in ("cat", "nfd"):
            yield f"ascii-{key}", folder, ["PYTHONIOENCODING=ascii", *X.format(name).split()], "rows:20"
            yield f"ascii-{key}", folder, ["PYTHONIOENCODING=ascii", *PREDICT.split(), name], "ids:20"
    for n, change in enumerate((
            lambda b: re.sub(rb"_7,[^\n]*", b"_7,nan", b, count=1), lambda b: re.sub(rb"_7,[^\n]*", b"_7,inf", b),
            lambda b: b + b[14:],
            lambda b: b[:len(b) // 2], lambda b: re.sub(rb",-?0\.\d+", b",0", b), lambda b: b[:14],
            lambda b: b.replace(b"0000", b"\x1b[31m"), lambda b: b.replace(b"imgId", b"\x1b[31m"))):
        files = {"preds/a.csv": damaged(change)}
        yield f"kaggle-{n}", files, "ensemble.py preds/a.csv preds/b.npz --out preds/new.npz", "refuse"
        yield f"sample-{n}", files, f"{PREDICT} --sample-submission preds/a.csv --submission preds/new.csv", "any"
    for n, data in enumerate((b"\xff\xfe{]\n\0\x1b[31m", b"null\n5\n[]", b'{"step": "x"}\n{"step": null, "loss": "y"}',
                              b"[" * 100_000,
                              b'{"step": 1, "a": "' + b"x" * 10**6 + b'"}', b'{"step": ' + b"1" * 9999 + b"}")):
        yield f"metrics-{n}", {"runs/part/ft/metrics.jsonl": damaged(lambda b, d=data: b + d + b"\n")}, RESUME, "ok"
        files = {"runs/other/ft/metrics.jsonl": data, "runs/other/ft/best.safetensors": b""}
        yield f"metrics-{n}", files, "predict.py --workers 0 --out preds/new.npz", "ok"
    for n, prompt in enumerate((f"photo {'x' * 9900}", "x" * 20000, "a \x1b]0;PWNED\x07 cat", " ")):
        files = {"x.json": json.dumps([{"image": f"raw/images/0000{n}.png", "prompt": p} for n,
                                       p in ((1, prompt), (2, "a cat"))])}
        yield f"corpus-{n}", files, f"{PREDICT} raw/images/00001.png --neighbors 2 --corpus x.json", "any"
        yield f"prompt-{n}", files, f"{PREDICT} x.json --prompt-col prompt --html preds/new.html", "any"
    for n, modules in enumerate(([{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}], {"a": 1}, [5],
                                 [{"idx": 0, "name": "0", "path": "", "type": "os.system"}])):
        yield f"encoder-{n}", {"encoder": encoder_with(modules)}, f"{CLEAN} --text-model encoder", "refuse"
    for name in ("evil", "views", "embeddings", "ids"):
        yield f"large-{name}", {"preds/a.npz": large_array(name)}, E, "any" if name in ("evil", "views") else "refuse"
    yield "neighbors", {}, f"{PREDICT} --neighbors 1000000000", "any"


def inputs(rng):
    """-> every bad input: name, "", input_case, files, command, what must become of the run"""
    found = [*others(rng), *owned(), *((f"edit-{name}", *rest) for name, *rest in edits())]
    for rules, images in IMAGES.items():
        for name, data in images.items():
            files = {"raw/images/00007.png": instead(lambda p, d=data: p.write_bytes(d() if callable(d) else d))}
            found.append((f"image-{name}", files, CLEAN, f"drop:00007:{rules}"))
            right = "ok" if KEPT in rules or BLANK in rules else "named:00007"  # predict.py can do with these
            found.append((f"image-{name}", files, f"{PREDICT} raw/prompts.csv", right))
    for file, command, want in READS:
        for kind in ["fifo", "zero", *rng.sample([*DAMAGES][2:], 4)]:
            fine = {"empty": want[:4] in ("rows", "refu"), "folder": "odd/" in file,
                    "half": ".csv" in file}  # or may be
            right = "any" if fine.get(kind) else want
            found.append((f"{kind}{slug(file)}", {file: DAMAGES[kind]}, command, right))
    found += [(f"argument{slug(words)}", {}, f"{command} {words}", "refuse") for command, words in arguments()]
    found += [(f"table-{name}", {name: data}, f"{X.format(name)} --min-words 1", want) for name, data, want in tables()]
    for name, make, want in archives():
        found.append((f"archive-{name}", {name: make}, X.format(name), want))
        found.append((f"archive-{name}", {name: make}, f"{PREDICT} {name}", "any"))
    times = Counter()
    for name, files, command, want in found:
        words = shlex.split(command) if isinstance(command, str) else command
        name = f"{next(w for w in words if w.endswith('.py'))[:-3]}/{name}"
        times[name] += 1
        yield name + f"-{times[name]}" * (times[name] > 1), "", input_case, files, words, want


def input_case(case, files, words, want):
    forked(put_files, case.root, files)
    before, result = snapshot(case.root), case.run(words)
    if result.rc:
        case.check_unchanged(before, ["runs/part/ft/metrics.jsonl"])  # --resume first cuts what came after last.pt
        case.check_refusal(result)
        if want not in ("refuse", "any") and result.rc > 0:
            case.problem("refused", f"should be accepted ({want}): {case.last_line(result)}")
        return
    after = [re.sub(r"\.\w+$", "", words[i + 1]) for i,
             w in enumerate(words[:-1]) if w in ("--out", "--submission", "--html")]
    outputs = [o for o in after if re.match("(data|runs|preds)/(new|tiny|part|soup)", o)] + ["data/demo"]
    case.check_unchanged(before, outputs + ["runs/part/ft"] * ("--resume" in words))
    if want == "refuse":
        case.problem("accepted", f"rc 0: {shlex.join(words)[-150:]}")
    for column, what in forked(judge, case.root, want, result.err, outputs) if want != "refuse" else ():
        case.problem(column, what)


def put_files(root, files):
    """{name: bytes, text, or what makes or changes it}"""
    for name, made in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made = made.encode("utf-8", "surrogatepass") if isinstance(made, str) else made
        made(path) if callable(made) else path.write_bytes(made)


def judge(root, want, err, outputs):
    """What is wrong with the outputs of a run that accepted its input -> [(column, what)]"""
    import numpy as np
    import polars as pl
    problems, kind, detail = [], *want.partition(":")[::2]
    for path in [p for end in ("npz", "npy") for p in root.rglob(f"*.{end}")]:
        if str(path.relative_to(root)).startswith(tuple(outputs)) and "/." not in str(path):
            x = np.load(path) if path.suffix == ".npy" else np.load(path)["embeddings"]
            if x.ndim != 2 or x.shape[1] != 384 or not (abs(np.linalg.norm(x, axis=1) - 1) < 1e-3).all():
                problems.append(("accepted", f"{path.name} {x.shape} has rows that are not finite unit rows"))
    if kind in ("drop", "rows"):
        kept, gone = (pl.read_parquet(root / "data/new" / n) for n in ("pairs.parquet", "dropped.parquet"))
        if kind == "rows" and f"rows:{len(kept) + len(gone)}" not in want.split("|"):
            problems.append(("lost", f"{len(kept)} kept + {len(gone)} dropped, not {want}: {err[-150:]}"))
    if kind == "drop":
        token, _, rules = detail.partition(":")
        gone = dict(gone.select("image", "rule").iter_rows())
        bad = {k: v for k, v in (gone | dict.fromkeys(kept["origin"], KEPT)).items() if re.search(token, k)}
        if wrong := {v: k for k, v in bad.items() if v not in rules.split("|")}:
            problems.append(("accepted", f"{wrong}, not {rules}"))
        if len(kept) + len(gone) != 60 or gone.keys() - bad.keys():
            problems.append(("lost", f"{len(kept)} kept, dropped {Counter(gone.values())}"))
    if kind == "named" and detail not in err:
        problems.append(("accepted", f"{detail} is not named"))
    if kind in ("named", "ids"):
        ids = np.load(root / "preds/new.npz")["ids"].tolist()
        if len({*ids}) != len(ids) or len(ids) != int(detail if kind == "ids" else 60):
            problems.append(("lost", f"{len(ids)} ids, {len({*ids})} different"))
    if kind == "same" and signature(root, SCENARIOS[detail][3].split()) != REFERENCE[detail]["signature"]:
        problems.append(("accepted", f"other outputs than those of {detail}"))
    return problems


# ------------------------------------------------------------ all of it
def make_base(base):
    """The folders that every case copies: raw, odd (with sidecars), data/tiny, runs/tiny, runs/part (killed), preds"""
    from demo import draw_demo
    base.mkdir()
    case = Case(base)
    forked(draw_demo, base / "raw", 60, 0)
    shutil.rmtree(base / ".cache")
    shutil.copy(ROOT / "tests/tiny.json", base)
    for folder in ("odd", "evil"):
        (base / folder).mkdir()
    rows = [*csv.reader((base / "raw/prompts.csv").read_text().splitlines()[1:])]
    PROMPTS.extend(row[1] for row in rows)
    for n in range(20):
        shutil.copy(base / "raw" / rows[n][0], base / f"odd/{n:02d}.png")
        (base / f"odd/{n:02d}.txt").write_text(PROMPTS[n])
    for name in ("evil.bin", "evil/pytorch_model.bin", "evil/open_clip_pytorch_model.bin"):
        (base / name).write_bytes(pickle.dumps(Evil()))
    (base / "evil/config.json").write_text('{"architecture": "resnet10t", "num_classes": 0, "pretrained_cfg": {}}')
    lp, ft = SCENARIOS["lp"][2], SCENARIOS["ft"][2]
    for command in (f"clean.py raw/prompts.csv --out data/tiny {C}", lp, ft, lp.replace("runs/tiny", "runs/part"),
                    f"{P} {FILES.replace('new', 'a')}", f"{P.replace('/ft', '/lp')} --out preds/b.npz",
                    E.replace("new", "old")):
        result = case.run(command)
        assert result.rc == 0, f"{command}\n{result.err}"
    for n in range(4, 30):  # file operations until there is a last.pt in the middle
        case.run(ft.replace("runs/tiny", "runs/part"), ("replace", n, "after"))
        if (base / "runs/part/ft/last.pt").exists():
            break
    for folder in (".", "raw", "data", "runs", "runs/tiny", "runs/tiny/ft", "preds"):
        (base / folder / "notes.txt").write_text("of the user")


def reference(case, name):
    """What an undisturbed run leaves, takes and does"""
    top, _, command, outputs = SCENARIOS[name]

    def sizes():
        stats = {p: p.stat() for p in (case.root / top).rglob("*") if p.is_file()}
        return {p: (s.st_ino, s.st_mtime_ns, -(-s.st_size // 4096) * 4) for p, s in stats.items()}
    before, old = sizes(), forked(signature, case.root, outputs.split())
    result = case.run(command)
    if result.rc:
        case.problem("refused", f"without any accident: {case.last_line(result)}")
    kib = sum(size[2] for path, size in sizes().items() if size != before.get(path))
    return {"before": old, "signature": forked(signature, case.root, outputs.split()), "seconds": result.seconds,
            "kib": kib, "ops": json.loads((case.log / "ops").read_text())}


def drive(cases, base, jobs):
    """Cases (name, folders to remove, function, arguments), each in a fork, `jobs` at a time -> {name: result}"""
    running, results, todo, started = {}, {}, iter(cases), 0

    def perform(root, without, f, args):
        case = Case(root, base, without)
        try:
            value = f(case, *args)
        except Exception:
            value = case.problem("message", f"attack.py itself: {traceback.format_exc()[-250:]}")
        shutil.rmtree(root, ignore_errors=True)
        return {"problems": case.problems, "runs": case.runs, "full": getattr(case, "full", 0), "value": value}
    while True:
        while len(running) < jobs and (job := next(todo, None)):
            name, without, f, *args = job
            root, started = base.with_name(f"case{started:04d}-{zlib.crc32(name.encode()):08x}"), started + 1
            if not (pid := os.fork()):
                try:
                    Path(f"{root}.json").write_text(json.dumps(perform(root, without, f, args)))
                finally:
                    os._exit(0)
            running[pid] = name, Path(f"{root}.json")
        if not running:
            return results
        pid, _ = os.wait()
        if pid in running:
            name, file = running.pop(pid)
            results[name] = {"problems": [("message", "attack.py itself died")], "runs": 0, "full": 0, "value": None}
            if file.exists():
                results[name] = json.loads(file.read_text())
            if len(results) % 100 == 0:
                failed = sum(bool(r["problems"]) for r in results.values())
                print(f"{len(results)} of {len(cases)} cases, {failed} failed", file=sys.stderr)


def print_table(results):
    """Counts by part and script, then every failure -> the number of failures"""
    rows = {}
    for name, result in results.items():
        part, script = name.split("/")[:2]
        script = SCENARIOS[script][2].split(".py")[0] if part != "inputs" else script
        facts = {"cases": 1, "runs": result["runs"], "full": result["full"]}
        rows.setdefault((part, script), Counter()).update(facts)
        rows[part, script].update(column for column, _ in result["problems"])
    rows = sorted(rows.items())
    rows.append((("all", ""), sum((row for _, row in rows), Counter())))
    columns = ["cases", "runs", "full", *COLUMNS]
    print(f"{'part':<7} {'script':<9}" + "".join(f"{c:>10}" for c in columns))
    for (part, script), row in rows:
        print(f"{part:<7} {script:<9}" + "".join(f"{row[c]:>10}" for c in columns))
    print(f"full: disks that were full; {'; '.join(f'{k}: {v}' for k, v in COLUMNS.items())}")
    for name, result in results.items():
        for column, what in result["problems"]:
            print(f"{column:<9} --only {name}  {what}")
    return sum(rows[-1][1][c] for c in COLUMNS)


def main():
    global VERBOSE
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0, help="of places, times and bytes")
    p.add_argument("--jobs", type=int, default=2, help="cases at a time")
    p.add_argument("--parts", default="kills,disks,inputs", help="which of kills, disks, inputs")
    p.add_argument("--only", default="", help="only the cases whose name contains this")
    args = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # by way of finally
    tmp, start, hub = Path(tempfile.mkdtemp(prefix="attack-")), time.time(), 0
    try:
        hub, base = preload(tmp), tmp / "base"
        make_base(base)
        results = drive([(f"reference/{n}", s[1], reference, n) for n, s in SCENARIOS.items()], base, args.jobs)
        REFERENCE.update({n: results[f"reference/{n}"]["value"] for n in SCENARIOS})
        cases = [(f"{part}/{name}", *rest) for part in args.parts.split(",")
                 for name, *rest in {"kills": kills, "disks": disks, "inputs": inputs}[part](random.Random(args.seed))]
        cases, VERBOSE = [c for c in cases if args.only in c[0]], bool(args.only)
        results |= drive(cases, base, args.jobs)
        failures = print_table(results)
        print(f"{failures} failures in {len(results)} cases, {time.time() - start:.0f} s, seed {args.seed}")
    finally:
        if hub:
            os.kill(hub, signal.SIGKILL)
        shutil.rmtree(tmp, ignore_errors=True)
    sys.exit(int(failures > 0))


VERBOSE, REFERENCE, PROMPTS = False, {}, []
if __name__ == "__main__":
    main()
