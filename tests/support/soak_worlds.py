"""Worlds of tests/soak.py: ranks that live as long as faults leave them usable, and what the parent does to them."""

import contextlib
import importlib.util
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from mpirun import environment as without_launcher
from soak_cases import KEY_FILE, Observed, is_mpi, is_sealed, renewed

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from netlab import Netlab, NetlabError, check_available, run_tool

RANKS = str(Path(__file__).with_name("soak_ranks.py"))
START_SECONDS = 120.0
MARGIN_SECONDS = 45.0  # beyond the group's timeout, on a machine that is busy
EXIT_SECONDS = 60.0


class WorldError(RuntimeError):
    """A world could not be started, which is no fault of the case."""


def environment():
    """Without a launcher's variables, able to import the package and the tests' support."""
    inherited = without_launcher(OMP_WAIT_POLICY="passive", TORCH_CPP_LOG_LEVEL="FATAL", GLOO_SOCKET_IFNAME="lo")
    return {**inherited, "PYTHONPATH": f"{inherited['PYTHONPATH']}:{Path(__file__).parent}"}


class Template:
    """The process that forks ranks."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, RANKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,  # Ctrl-C is the parent's
        )
        self._process.stdout.readline()

    def _ask(self, **order):
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def fork(self, **order):
        """The process id of a new rank."""
        return self._ask(**order)

    def exit_code(self, pid):
        """Of a rank that has ended."""
        return self._ask(end=pid)

    def close(self):
        self._process.stdin.close()
        self._process.wait()


class Links(Netlab):
    """Hosts whose links can be taken down."""

    def namespace(self, host):
        return self._namespaces[host + 1]

    def set_link(self, host, end, state):
        """Sets one end of a host's link "up" or "down": its own interface, or the port of the bridge."""
        namespace, device = (self._namespaces[0], f"port{host}") if end else (self.namespace(host), "eth0")
        run_tool("ip", "-n", namespace, "link", "set", device, state)


def available_transports():
    """Those that this machine has, and the reasons why it lacks the others."""
    transports, reasons = ["gloo"], []
    try:
        check_available()
        transports.append("link")
    except NetlabError as error:
        reasons.append(f"no links are cut: {error}")
    if importlib.util.find_spec("mpi4py") is None or mpirun() is None:
        reasons.append("nothing runs over MPI: mpi4py or mpirun is missing (pip install mpi4py mpich)")
    else:
        transports.append("mpi")
    if importlib.util.find_spec("cryptography") is None:
        reasons.append("no messages are sealed: cryptography is missing (pip install 'qcomm[secure]')")
    else:
        transports += ["sealed", *(["sealed-mpi"] if "mpi" in transports else [])]
    return transports, reasons


class World:
    """``size`` ranks over a transport; ``lab`` has the network namespaces of "link"."""

    def __init__(self, transport, size, template, lab=None):
        self.transport, self.size, self._template, self.lab = transport, size, template, lab
        self.folder = Path(tempfile.mkdtemp(prefix="qcomm-soak-"))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.folder / "parent"))
        self._listener.listen(size)
        self._listener.settimeout(START_SECONDS)
        self._job = None
        self.cases, self.is_usable, self.fresh = 0, True, True
        self.first = {}  # descriptors and threads after the first case, by rank
        self.pids, self._pidfds = {}, {}
        started = self._start()
        self.connections = dict.fromkeys(range(size))
        for _ in range(size):
            connection = self._accept()
            _, rank, pid = connection.recv()
            self.connections[rank], self.pids[rank] = connection, pid
        assert not started or set(started) == set(self.pids.values())
        self._pidfds = {rank: os.pidfd_open(pid) for rank, pid in self.pids.items()}
        self._tell("begin")
        for rank in self.connections:
            self._receive(rank, START_SECONDS)

    def _start(self):
        address = str(self.folder / "parent")
        if is_sealed(self.transport):
            (self.folder / KEY_FILE).touch(mode=0o600)
            (self.folder / KEY_FILE).write_text(secrets.token_hex(32))
        if is_mpi(self.transport):
            with (self.folder / "log").open("w") as log:
                command = [*mpirun(), "-np", str(self.size), sys.executable, RANKS]
                command += [address, str(self.folder), self.transport]
                self._job = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
            return []
        pids = []
        for rank in range(self.size):
            network = None if self.lab is None else self.lab.namespace(rank)
            order = {"rank": rank, "size": self.size, "address": address, "folder": str(self.folder)}
            order["transport"] = self.transport
            pids.append(self._template.fork(**order, log=str(self.folder / "log"), network=network))
        return pids

    def _accept(self):
        try:
            accepted, _ = self._listener.accept()
        except TimeoutError as error:
            raise WorldError(f"ranks did not start: {self.log()}") from error
        accepted.setblocking(True)
        return Connection(accepted.detach())

    def _receive(self, rank, seconds):
        if not self.connections[rank].poll(seconds):
            raise WorldError(f"rank {rank} is silent: {self.log()}")
        try:
            return self.connections[rank].recv()
        except EOFError as error:
            raise WorldError(f"rank {rank} ended: {self.log()}") from error

    def _tell(self, message, ranks=None):
        for rank in self.connections if ranks is None else ranks:
            with contextlib.suppress(BrokenPipeError):
                self.connections[rank].send(message)

    def log(self):
        return (self.folder / "log").read_text(errors="replace")[-8000:]

    def run(self, case):
        """Runs a case and the check after it; what was seen."""
        self.cases += 1
        case = replace(case, fresh=self.fresh)
        self._tell(("save_with_a_full_disk" if case.kind == "disk" else "run", case))
        seen = Observed([None] * self.size)
        self._watch(case, seen)
        survivors = [rank for rank, report in enumerate(seen.reports) if report is not None]
        if seen.hung or seen.exits or len(survivors) < self.size:
            self._give_up(case, seen, survivors)
            return seen
        broken = any(step.broken for report in seen.reports for step in report.steps)
        self._check(renewed(case) if broken else replace(case, fresh=case.kind == "disk" and self.fresh), seen)
        self.fresh = False
        return seen

    def _watch(self, case, seen):
        """Reads what ranks say, and does to the faulty one what its case is about."""
        waiting = {self.connections[rank]: rank for rank in range(self.size)}
        deadline = time.monotonic() + 3 * case.timeout + MARGIN_SECONDS
        stopped = cut = released = False
        while waiting:
            left = [rank for rank in waiting.values() if not (stopped and rank == case.rank)]
            if not left and stopped:
                if not self._continue(case, seen, waiting):
                    break
                stopped, deadline = False, time.monotonic() + case.timeout + MARGIN_SECONDS
            if cut and not released and left == [case.rank]:
                released = self._release(case)
            ready = wait([c for c, rank in waiting.items() if rank in left or not stopped], deadline - time.monotonic())
            if not ready:
                seen.hung = sorted(rank for rank in waiting.values() if rank in left or not stopped)
                self._dump(seen.hung)
                break
            for connection in ready:
                rank = waiting[connection]
                try:
                    word, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    del waiting[connection]
                    seen.exits[rank] = self._exit_code(rank)
                    continue
                if word == "done":
                    seen.reports[rank] = value
                    del waiting[connection]
                elif case.kind == "kill":
                    os.kill(self.pids[rank], signal.SIGKILL)
                    self._ended(rank, EXIT_SECONDS)
                    del waiting[connection]
                    deadline = time.monotonic() + case.timeout + MARGIN_SECONDS
                    if self._job is not None:
                        self._await_job(seen, waiting)
                        return
                elif case.kind == "stop":
                    os.kill(self.pids[rank], signal.SIGSTOP)
                    self._tell("go", [rank])
                    stopped, deadline = True, time.monotonic() + case.timeout + MARGIN_SECONDS
                elif case.kind == "cut":
                    self.lab.set_link(rank, case.bit % 2, "down")
                    self._tell("go", [rank])
                    cut, deadline = True, time.monotonic() + case.timeout + MARGIN_SECONDS
                else:
                    self._disturb(case, rank)
        if cut and not released:
            self._release(case)
        if stopped and seen.hung:
            os.kill(self.pids[case.rank], signal.SIGCONT)

    def _disturb(self, case, rank):
        if case.kind == "outage":
            self.lab.set_link(rank, case.bit % 2, "down")
            self._tell("go", [rank])
        threading.Event().wait(case.seconds)  # the fault itself
        if case.kind == "outage":
            self.lab.set_link(rank, case.bit % 2, "up")
        else:
            self._tell("go", [rank])

    def _release(self, case):
        self.lab.set_link(case.rank, case.bit % 2, "up")
        return True

    def _continue(self, case, seen, waiting):
        """All others have come back: the stopped rank does, too, or never again."""
        if case.comes_back:
            os.kill(self.pids[case.rank], signal.SIGCONT)
            return True
        if self._job is not None:  # the others end, and with them the job
            self._tell(None, [rank for rank in range(self.size) if rank != case.rank])
            self._await_job(seen, {})
            if seen.job == 0:
                seen.trouble = "mpirun ended with 0 though a rank was stopped"
            self.is_usable = False
        else:
            os.kill(self.pids[case.rank], signal.SIGKILL)
            self._ended(case.rank, EXIT_SECONDS)
        return False

    def _await_job(self, seen, waiting):
        """mpirun ends by itself, and all ranks with it."""
        self.is_usable = False
        try:
            seen.job = self._job.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            seen.hung = sorted(rank for rank in self.pids if not self._ended(rank, 0.0))
            self._dump(seen.hung)
            seen.trouble = "mpirun did not end"
            return
        left = [rank for rank in self.pids if not self._ended(rank, 5.0)]
        if left:
            seen.trouble = f"mpirun left rank(s) {left} behind"

    def _ended(self, rank, seconds):
        return bool(select.select([self._pidfds[rank]], [], [], seconds)[0])

    def _exit_code(self, rank):
        if not self._ended(rank, EXIT_SECONDS):
            return -999
        return -1000 if self._job is not None else self._template.exit_code(self.pids.pop(rank))

    def _dump(self, ranks):
        """Stacks of ranks that do not come back, into the world's log."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGUSR1)
        threading.Event().wait(0.5)

    def _give_up(self, case, seen, survivors):
        """A rank is gone: the others end by themselves, and well."""
        self.is_usable = False
        if self._job is not None or seen.hung or seen.exits:
            return
        self._tell(None, survivors)
        for rank in survivors:
            if not self._ended(rank, EXIT_SECONDS):
                self._dump([rank])
                seen.trouble = f"hang: rank {rank} does not end after its error"
            elif code := self._template.exit_code(self.pids.pop(rank)):
                seen.trouble = f"abort: rank {rank} ended with {code} after its error"

    def _check(self, case, seen):
        self._tell(("check", case))
        deadline = time.monotonic() + 2 * case.timeout + MARGIN_SECONDS
        for rank in range(self.size):
            if not self.connections[rank].poll(max(0.0, deadline - time.monotonic())):
                seen.hung.append(rank)
                continue
            try:
                seen.checks.append(self.connections[rank].recv()[1])
            except (EOFError, ConnectionResetError):
                seen.exits[rank] = self._exit_code(rank)
        if seen.hung or seen.exits:
            self._dump(seen.hung)
            seen.checks, self.is_usable = [], False

    def close(self):
        """Ends the world; a sentence if that did not go well."""
        trouble = ""
        if self.is_usable:
            self._tell(None)
            for rank in list(self.pids):
                if not self._ended(rank, EXIT_SECONDS):
                    self._dump([rank])
                    trouble = f"hang: rank {rank} does not end: {self.log()}"
                elif self._job is None and (code := self._template.exit_code(self.pids.pop(rank))):
                    trouble = f"abort: rank {rank} ended with {code}: {self.log()}"
        for rank, pid in self.pids.items():
            if not self._ended(rank, 0.0):
                os.kill(pid, signal.SIGKILL)
                self._ended(rank, EXIT_SECONDS)
            if self._job is None:
                self._template.exit_code(pid)
        if self._job is not None and self._job.poll() is None:
            try:
                self._job.wait(EXIT_SECONDS if self.is_usable else 0.0)
            except subprocess.TimeoutExpired:
                os.killpg(self._job.pid, signal.SIGKILL)
                self._job.wait()
        if self._job is not None and self.is_usable and self._job.returncode:
            trouble = trouble or f"abort: mpirun ended with {self._job.returncode}: {self.log()}"
        for descriptor in self._pidfds.values():
            os.close(descriptor)
        for connection in self.connections.values():
            connection.close()
        self._listener.close()
        shutil.rmtree(self.folder)
        return trouble


def mpirun():
    """The command that starts ranks under the mpirun of mpi4py's MPI; None without one."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        return None
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    extra = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    return [found, *extra]
