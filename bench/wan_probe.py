"""Host's part of check_wan.py: sends UDP packets and a TCP stream to the next host, and measures what it gets itself.

All hosts have one clock, as they are one machine's: a packet holds the time when it was sent, and the kernel notes when
it has come, so that a late thread makes no delay. Needs neither torch nor qcomm, so that many runs are quick.
"""

import argparse
import itertools
import json
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

STAMP = struct.Struct("<Qq")  # number of a packet, and the nanosecond when it was sent
ARRIVAL = struct.Struct("@ll")  # the kernel's struct timespec
PACKET_BYTES = 64
BATCH = 5  # packets that leave together
BATCH_PAUSE = 0.002
PORT = 29500
CHUNK = bytes(1 << 18)
BUFFER_BYTES = 64 << 20  # enough for the largest round trip's bytes, which Linux's default is not
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35  # of Linux; Python does not name them
POLL_SECONDS, START_SECONDS = 0.005, 0.1
AFTER = 1.0  # seconds for the last packets, beyond the delay


def enlarge_buffers() -> None:
    """Of this host's TCP streams only: a namespace has settings of its own."""
    for kind in ("rmem", "wmem"):
        Path(f"/proc/sys/net/ipv4/tcp_{kind}").write_text(f"4096 131072 {BUFFER_BYTES}")


def until(moment: float) -> None:
    pause = moment - time.monotonic()
    if pause > 0:
        time.sleep(pause)


def common_start(folder: Path, rank: int, hosts: int) -> float:
    """A moment soon after all hosts are ready, on the monotonic clock. It is agreed on in files, not over the links."""
    (folder / f"ready{rank}").touch()
    agreed = folder / "start"
    while not agreed.exists():
        if rank == 0 and len(list(folder.glob("ready*"))) == hosts:
            made = folder / "start.new"
            made.write_text(str(time.monotonic() + START_SECONDS))
            made.rename(agreed)
        time.sleep(POLL_SECONDS)
    return float(agreed.read_text())


def send_packets(address: tuple[str, int], start: float, end: float, sent: list[int]) -> None:
    """Batches with a pause after each, also where this thread is late: catching up would fill a queue."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        until(start)
        while time.monotonic() < end:
            for _ in range(BATCH):
                sender.sendto(STAMP.pack(len(sent), time.time_ns()).ljust(PACKET_BYTES), address)
                sent.append(len(sent))
            time.sleep(BATCH_PAUSE)


def receive_packets(receiver: socket.socket, end: float) -> dict[str, Any]:
    """What has come by ``end``; delays are of packets that had none before them in a queue."""
    delays, numbers = [], []
    while True:
        receiver.settimeout(max(1e-3, end - time.monotonic()))
        try:
            packet, [(_, _, arrival)], _, _ = receiver.recvmsg(PACKET_BYTES, socket.CMSG_SPACE(ARRIVAL.size))
        except TimeoutError:
            break
        number, sent = STAMP.unpack_from(packet)
        numbers.append(number)
        if number % BATCH == 0:
            seconds, nanoseconds = ARRIVAL.unpack(arrival)
            delays.append(1e-9 * (seconds * 1_000_000_000 + nanoseconds - sent))
    reordered = sum(later < before for before, later in itertools.pairwise(numbers))
    return {"received": len(set(numbers)), "reordered": reordered, "delays": delays}


def send_stream(address: tuple[str, int], start: float, end: float, control: str) -> None:
    with socket.socket() as sender:
        if control:
            sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
        until(start)
        sender.connect(address)
        try:
            while time.monotonic() < end:
                sender.settimeout(max(1e-3, end - time.monotonic()))
                sender.send(CHUNK)
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            pass  # the time is over, also for the receiver
        # What is unsent is not of interest.
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def receive_stream(listener: socket.socket, begin: float, end: float) -> dict[str, Any]:
    """Bytes of values a second between the two times."""
    listener.settimeout(end - time.monotonic())
    receiver, _ = listener.accept()
    seen, first, last = 0, 0.0, 0.0
    with receiver:
        buffer = bytearray(1 << 20)
        while (now := time.monotonic()) < end:
            receiver.settimeout(end - now)
            try:
                count = receiver.recv_into(buffer)
            except (TimeoutError, ConnectionResetError):
                break
            now = time.monotonic()
            if count == 0:
                break
            if now >= begin:
                if first:
                    seen += count
                first, last = first or now, now
    return {"bits_per_second": 8 * seen / (last - first) if last > first else 0.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packet-seconds", type=float, required=True, help="of UDP")
    parser.add_argument("--warm-up", type=float, required=True, help="seconds of the stream that do not count")
    parser.add_argument("--seconds", type=float, required=True, help="of the stream that count")
    parser.add_argument("--control", default="", help="TCP's congestion control; the machine's own without it")
    parser.add_argument("--subnet", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the figures")
    arguments = parser.parse_args()
    rank, hosts = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own, target = (f"{arguments.subnet}.{host % hosts + 1}" for host in (rank, rank + 1))
    enlarge_buffers()
    found: dict[str, Any] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver, socket.socket() as listener:
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        receiver.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        receiver.bind((own, PORT))
        listener.bind((own, PORT))
        listener.listen()
        start = common_start(arguments.folder, rank, hosts)
        done = start + arguments.packet_seconds
        sent: list[int] = []
        packets = threading.Thread(target=send_packets, args=((target, PORT), start, done, sent))
        packets.start()
        found["packets"] = receive_packets(receiver, done + AFTER)
        packets.join()
        found["packets"]["sent"] = len(sent)
        begin = done + AFTER + arguments.warm_up
        end = begin + arguments.seconds
        stream = threading.Thread(target=send_stream, args=((target, PORT), done + AFTER, end, arguments.control))
        stream.start()
        found["stream"] = receive_stream(listener, begin, end)
        stream.join()
    (arguments.folder / f"{rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
