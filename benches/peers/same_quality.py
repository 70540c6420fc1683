#!/usr/bin/env python3
"""Whether runs of the embedded job end alike on two devices: for each seed, the intervals of the true reward after DPO
must overlap.

    python3 benches/peers/same_quality.py FOLDER

FOLDER holds runs by the names memo-SEED-DEVICE; one of the devices is cpu.
"""
import json
import sys
from pathlib import Path


def main():
    runs = {}
    for path in sorted(Path(sys.argv[1]).glob("memo-*-*/summary.json")):
        _, seed, device = path.parent.name.split("-", 2)
        runs.setdefault(seed, {})[device] = json.loads(path.read_text())
    if not runs:
        sys.exit(f"{sys.argv[1]}: no runs")
    print("| seed | device | true reward after DPO | difference to SFT | pairs/s | seconds |")
    print("|---|---|---|---|---|---|")
    apart = []
    for seed, devices in runs.items():
        for device, summary in devices.items():
            dpo, difference = summary["true_reward"]["dpo"], summary["true_reward"]["difference"]
            print(f"| {seed} | {device} | {show(dpo)} | {show(difference)} | {summary['pairs_per_second']:.0f} | "
                  f"{summary['wall_seconds']:.0f} |")
        cpu = devices["cpu"]["true_reward"]["dpo"]
        for device, summary in devices.items():
            found = summary["true_reward"]["dpo"]
            if found["ci_low"] > cpu["ci_high"] or found["ci_high"] < cpu["ci_low"]:
                apart.append(f"seed {seed} on {device}")
    if apart:
        sys.exit("intervals do not overlap: " + ", ".join(apart))


def show(interval):
    return f"{interval['mean']:.2f} [{interval['ci_low']:.2f}, {interval['ci_high']:.2f}]"


if __name__ == "__main__":
    main()
