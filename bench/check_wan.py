"""Checks the rate, the delay and the loss of wan.py's links against what was asked for. Linux, as root.

    python bench/check_wan.py --json bench/results/wan_check.json                 # twelve minutes on two idle cores
    python bench/check_wan.py --rates 100mbit --delays-ms 5 --losses 0 --hosts 2

Every host sends UDP packets to the next one, which measures their delay and counts them, and then a TCP stream, all
hosts at once. A stream without loss is compared with the rate's share that is left for values: 1448 bytes of 1514. A
stream with loss is bounded by Mathis, Semke, Mahdavi and Ott, 1997: MSS / RTT * sqrt(3/2) / sqrt(loss); the last row is
that of one stream with TCP Reno, for which the bound was derived, at 80 ms and 0.1 %.

Exits 1 where a median delay is off by more than 5 % and 0.3 ms, or where losses are so few or so many that it happens
once in 100,000 cells by chance. Rates are not judged, since a machine that is too slow for them is no fault: they stand
beside the share of a core that the hub took, and the hub's lateness.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netlab import SUBNET, Netlab, NetlabError, end_cleanly
from ranks import RanksError, about, explain, write
from wan import FRAME, MTU, Wan, bits_per_second, share

PROBE = Path(__file__).with_name("wan_probe.py")
MSS = MTU - 52  # 20 of IPv4, 32 of TCP with time stamps
DELAY_SHARE, DELAY_SECONDS = 0.05, 0.3e-3
CHANCE = 1e-5
PACKET_SECONDS = 4.0  # about 10,000 of UDP from each host


@dataclass(frozen=True)
class Case:
    """Links to measure, and TCP's congestion control if it is not the machine's own."""

    hosts: int
    rate: str
    delay_ms: float
    loss: float
    control: str = ""


def measure(case: Case, seconds: float, packet_seconds: float) -> dict[str, Any]:
    """One row of the results."""
    wan = Wan(delay_ms=case.delay_ms, loss=case.loss)
    warm_up = 1.0 + 60 * case.delay_ms / 1e3
    with tempfile.TemporaryDirectory() as folder, Netlab(case.hosts, case.rate, wan) as lab:
        options: dict[str, object] = {"packet-seconds": packet_seconds, "warm-up": warm_up, "seconds": seconds}
        options |= {"subnet": SUBNET, "folder": folder, "control": case.control}
        command = [sys.executable, str(PROBE), *(f"--{name}={value}" for name, value in options.items())]
        before = lab.hub_figures()
        if (status := lab.run(command, timeout=120 + seconds)) != 0:
            raise RanksError(f"wan_probe.py ended with status {status}")
        after = lab.hub_figures()
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(case.hosts)]
    delays = [delay for host in found for delay in host["packets"]["delays"]]
    sent = sum(host["packets"]["sent"] for host in found)
    lost = sent - sum(host["packets"]["received"] for host in found)
    rates = [host["stream"]["bits_per_second"] for host in found]
    link = bits_per_second(case.rate)
    moved = 8 * sum(host["received_bytes"] for host in after["hosts"])
    return {
        "hosts": case.hosts,
        "rate": case.rate,
        "delay_ms": case.delay_ms,
        "loss": case.loss,
        "control": case.control or Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "delay_median_ms": 1e3 * statistics.median(delays),
        "delay_p99_ms": 1e3 * statistics.quantiles(delays, n=100)[98],
        "packets": sent,
        "packets_lost": lost,
        "loss_chance": two_sided(lost, sent, case.loss),
        "reordered": sum(host["packets"]["reordered"] for host in found),
        "stream_bits_per_second": rates,
        "stream_share": statistics.fmean(rates) / (link * MSS / FRAME),
        "mathis_bits_per_second": mathis(case.delay_ms, case.loss),
        "hub_cpu_seconds": after["cpu_seconds"] - before["cpu_seconds"],
        "hub_cpu_seconds_per_gbit": (after["cpu_seconds"] - before["cpu_seconds"]) / moved * 1e9,
        "hub_late_mean_ms": 1e3 * after["late_mean"],
        "hub_late_most_ms": 1e3 * after["late_most"],
        "hub": after,
    }


def mathis(delay_ms: float, loss: float) -> float | None:
    """Bits of values a second that one TCP stream reaches at most; None without a delay or a loss."""
    if delay_ms == 0 or loss == 0:
        return None
    return 8 * MSS / (2 * delay_ms / 1e3) * math.sqrt(1.5 / loss)


def two_sided(found: int, count: int, probability: float) -> float:
    """The chance of a number at least as far from the binomial's mean, on either side; doubled as usual.

    Example:
        >>> two_sided(0, 1000, 0.0), two_sided(1, 1000, 0.0), round(two_sided(10, 1000, 0.01), 2)
        (1.0, 0.0, 1.0)
    """
    if probability == 0:
        return float(found == 0)

    def chance(number: int) -> float:
        ways = math.lgamma(count + 1) - math.lgamma(number + 1) - math.lgamma(count - number + 1)
        return math.exp(ways + number * math.log(probability) + (count - number) * math.log1p(-probability))

    below = sum(chance(number) for number in range(found + 1))
    above = sum(chance(number) for number in range(found, count + 1))
    return min(1.0, 2 * min(below, above))


def faults(row: dict[str, Any]) -> list[str]:
    """What is not as it was asked for."""
    wrong = []
    off = abs(row["delay_median_ms"] - row["delay_ms"]) / 1e3
    if off > DELAY_SHARE * row["delay_ms"] / 1e3 + DELAY_SECONDS:
        wrong.append(f"the median delay is off by {1e3 * off:.2f} ms")
    if row["loss_chance"] < CHANCE:
        wrong.append(f"{row['packets_lost']} of {row['packets']} packets are lost")
    if row["reordered"]:
        wrong.append(f"{row['reordered']} packets overtook others")
    if row["hub"]["no_room"]:
        wrong.append(f"the hub had no room for {row['hub']['no_room']} packets")
    return wrong


def show(row: dict[str, Any]) -> None:
    rates = [rate / 1e6 for rate in row["stream_bits_per_second"]]
    bound = row["mathis_bits_per_second"]
    text = f", Mathis {bound / 1e6:.1f}" if bound else ""
    print(f"{row['hosts']} hosts {row['rate']:>8} {row['delay_ms']:>5g} ms {100 * row['loss']:>4g} %: "
          f"delay {row['delay_median_ms']:.3f} (p99 {row['delay_p99_ms']:.3f}) ms, lost {row['packets_lost']} of "
          f"{row['packets']}, {row['control']} {min(rates):.1f} .. {max(rates):.1f} Mb/s "
          f"({row['stream_share']:.3f}{text}), "
          f"hub {row['hub_cpu_seconds']:.2f} s, late {row['hub_late_mean_ms']:.3f} ms "
          f"{'; '.join(faults(row))}", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["10mbit", "100mbit", "1gbit"], help="as tc writes them")
    parser.add_argument("--delays-ms", nargs="+", type=float, default=[0.5, 5, 50], help="one way")
    parser.add_argument("--losses", nargs="+", type=share, default=[0, 1e-3, 1e-2], help="shares, or in percent: 0.1%%")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each stream that count")
    parser.add_argument("--packet-seconds", type=float, default=PACKET_SECONDS, help="of UDP from each host")
    parser.add_argument("--no-mathis", action="store_true", help="without the last row")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    end_cleanly()
    grid = itertools.product(arguments.hosts, arguments.rates, arguments.delays_ms, arguments.losses)
    cases = [Case(*place) for place in grid]
    header, rows = about(packet_seconds=arguments.packet_seconds, seconds=arguments.seconds), []
    try:
        for case in cases:
            rows.append(measure(case, arguments.seconds, arguments.packet_seconds))
            show(rows[-1])
        if not arguments.no_mathis:
            rows.append(measure(Case(2, "100mbit", 40, 1e-3, "reno"), 10 * arguments.seconds, arguments.packet_seconds))
            show(rows[-1])
    except (NetlabError, RanksError) as error:
        return explain(error, "check_wan", "replay of the hub needs no rights")
    write(arguments.json, {**header, "load_after": about()["load"], "rows": rows})
    return 1 if any(faults(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
