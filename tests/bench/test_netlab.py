"""bench/netlab.py: hosts with addresses and rates of their own, and nothing left of them, however they end."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import is_gone

BENCH = Path(__file__).parents[2] / "bench"
# A command that tells its namespace and its process, and then does nothing for ever.
WAIT = 'echo "$(ip netns identify $$) $$ $RANK" >&2; exec tail -f /dev/null'


@pytest.fixture(scope="module")
def netlab():
    """The module, where the machine allows network namespaces."""
    sys.path.insert(0, str(BENCH))
    try:
        import netlab
    finally:
        sys.path.remove(str(BENCH))
    try:
        with netlab.Netlab(1):
            pass
    except netlab.NetlabError as error:
        pytest.skip(f"no network namespaces: {error}")
    return netlab


def namespaces():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def start(*arguments):
    """netlab's command line, running; only its stderr, to which the hosts write, is a pipe."""
    command = [sys.executable, str(BENCH / "netlab.py"), *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def told(process, hosts):
    """(namespaces, processes) of hosts that run WAIT."""
    lines = [process.stderr.readline() for _ in range(hosts)]
    found = [re.fullmatch(r"(ql\w+-\d) (\d+) \d\n", line) for line in lines]
    assert all(found), lines
    return {match[1] for match in found}, [int(match[2]) for match in found]


def ends_clean(process, places, processes, status):
    assert process.wait(60) == status
    process.stderr.close()
    assert all(is_gone(number, 20) for number in processes)
    lab = next(iter(places)).split("-")[0]
    assert not {name for name in namespaces() if name.startswith(lab)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_host_ends_the_others_and_leaves_nothing(netlab, number):
    process = start("--hosts", "3", "--", "sh", "-c", WAIT)
    places, processes = told(process, 3)
    assert len(places) == 3
    os.kill(processes[1], number)
    ends_clean(process, places, processes, 128 + number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_netlab_leaves_nothing(netlab, number):
    process = start("--hosts", "2", "--rate", "100mbit", "--", "sh", "-c", WAIT)
    places, processes = told(process, 2)
    process.send_signal(number)
    ends_clean(process, places, processes, 128 + number)


def test_a_second_signal_does_not_stop_the_removal(netlab):
    process = start("--hosts", "2", "--", "sh", "-c", WAIT)
    places, processes = told(process, 2)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
    ends_clean(process, places, processes, 128 + signal.SIGINT)


def test_a_signal_to_a_bench_leaves_nothing(netlab, tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(f"import subprocess\nsubprocess.run(['sh', '-c', {WAIT!r}])\n")
    program = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import ranks\n"
    program += f"ranks.run_ranks({str(script)!r}, [], 2, '1gbit')"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    places, processes = told(process, 2)
    process.send_signal(signal.SIGTERM)
    ends_clean(process, places, processes, 128 + signal.SIGTERM)


def test_what_a_killed_netlab_leaves_is_removed_by_the_next(netlab):
    process = start("--hosts", "2", "--", "sh", "-c", WAIT)
    places, processes = told(process, 2)
    with netlab.Netlab(1) as alive:
        process.kill()
        process.wait(60)
        assert places <= namespaces()
        netlab.remove_stale()
        assert not places & namespaces()
        assert any(name.startswith(alive._name) for name in namespaces())
    ends_clean(process, places, processes, -signal.SIGKILL)


def test_a_timeout_leaves_nothing(netlab):
    process = start("--hosts", "2", "--timeout", "5", "--", "sh", "-c", WAIT)
    places, processes = told(process, 2)
    ends_clean(process, places, processes, 124)


def test_hosts_have_what_torchrun_gives(netlab, tmp_path):
    command = 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $GLOO_SOCKET_IFNAME" > $RANK.txt'
    with netlab.Netlab(2, "1gbit") as lab:
        assert lab.run(["sh", "-c", command], cwd=tmp_path) == 0
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [
        f"{rank} 2 0 1 {lab.address(0)} eth0\n" for rank in range(2)
    ]


def test_a_status_is_passed_on(netlab):
    with netlab.Netlab(2) as lab:
        assert lab.run(["sh", "-c", "exit $((RANK * 5))"]) == 5


def test_what_cannot_be_is_refused(netlab):
    with pytest.raises(ValueError, match=r"hosts must be in 1..250, got 0"):
        netlab.Netlab(0)
    before = namespaces()
    with pytest.raises(netlab.NetlabError, match=r"tc .*nonsense"), netlab.Netlab(1, "nonsense"):
        pass
    assert not {name for name in namespaces() - before if name.startswith("ql")}


def test_without_rights_it_says_so_and_is_skipped():
    program = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import os; os.geteuid = lambda: 1000\n"
    program += "import netlab; sys.argv = ['netlab', '--', 'true']; sys.exit(netlab.main())"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 77 and "needs root" in ended.stderr
