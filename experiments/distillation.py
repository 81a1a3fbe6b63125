"""The runs behind docs/distillation.md: prompts, distillation, teachers, on HotpotQA.

Each run is settings over a common base and one or several `lmcot` commands, which are printed. What
is done is skipped, what was interrupted is resumed. Every choice is made on the selection questions
(the first 200 of hotpotqa-validation); no other validation question is read here.

    export LMCOT_DATA=...   # the data folder
    export LMCOT_MODELS=... # holds the .gguf files of `FROZEN`
    python -m experiments.distillation list
    python -m experiments.distillation run 'prompts/*' --runs DIR
    python -m experiments.distillation tables > tables.md
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.distillation_plan import Step, plan
from experiments.distillation_tables import tables

_HERE = Path(__file__).resolve().parent
RESULTS = _HERE / "results" / "distillation.jsonl"


def main() -> None:
    """Runs, lists or tabulates the plan."""
    options = _options()
    results = _read(options.results)
    if options.action == "tables":
        print(tables(list(results.values())))
        return
    for step in plan(options.runs):
        if not any(fnmatch.fnmatch(step.name, pattern) for pattern in options.patterns):
            continue
        done = _is_done(step, results.get(step.name))
        if options.action == "list":
            print(f"{'done' if done else '    '} {step.name}: {' '.join(step.commands)}")
        elif not done:
            _run(step, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("list", "run", "tables"))
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--code", type=Path, default=_HERE.parent, help="checkout to run")
    parser.add_argument("--nice", type=int, default=10)
    return parser.parse_args()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each run, by its name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {result["name"]: result for result in results}


def _is_done(step: Step, result: dict[str, Any] | None) -> bool:
    return result is not None and result["settings"] == json.loads(json.dumps(step.recorded))


def _run(step: Step, options: argparse.Namespace) -> None:
    """Runs a step's commands and appends its result; a command that fails ends everything."""
    folder = (options.runs / step.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if step.templates is not None:
        _write_yaml(folder / "templates.yaml", step.templates)
        step.settings["prompts"]["templates"] = str(folder / "templates.yaml")
    _write_yaml(folder / "settings.yaml", step.settings)
    started, load = time.time(), os.getloadavg()[0]
    for command in step.commands:
        words = ["lmcot", command, "--config", str(folder / "settings.yaml")]
        words += ["--run-dir", str(folder / "run")]
        print(f"{time.strftime('%H:%M:%S')} {step.name}: {' '.join(words)}", flush=True)
        _lmcot(words[1:], folder / f"{command}.log", options)
    result = {
        "name": step.name,
        "commands": [f"lmcot {command}" for command in step.commands],
        "settings": step.recorded,
        "seed": step.settings["seed"],
        "commit": _git(options.code, "rev-parse", "--short", "HEAD"),
        "machine": _machine(),
        "seconds": round(time.time() - started),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        **_outcome(folder / "run"),
    }
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")


def _lmcot(arguments: Sequence[str], log: Path, options: argparse.Namespace) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(options.code.resolve()),
        "RAY_worker_niceness": "0",  # added to --nice, and 15 by default
    }
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            ["nice", "-n", str(options.nice), sys.executable, "-m", "lmcot.cli", *arguments],
            cwd=options.code,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code:
        sys.exit(f"'lmcot {arguments[0]}' ended with {code}: see {log}")


def _outcome(run: Path) -> dict[str, Any]:
    """What the run's files say that its commands made."""
    outcome: dict[str, Any] = {}
    rationales = run / "rationales.jsonl"
    if rationales.exists():
        reasons: dict[str, int] = {}
        for line in rationales.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            reason = one["reason"] if one["kept"] else f"rejected: {one['reason']}"
            reasons[reason] = reasons.get(reason, 0) + 1
        outcome["rationales"] = reasons
    stages = run / "stages.json"
    if stages.exists():
        outcome["stages"] = json.loads(stages.read_text(encoding="utf-8"))
    report = run / "report.json"
    if report.exists():
        outcome["rows"] = json.loads(report.read_text(encoding="utf-8"))["rows"]
    return outcome


def _machine() -> str:
    """The processor's name and the units that matter for its speed."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.exists() else ""
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.splitlines())
    }
    flags = fields.get("flags", "").split()
    units = [unit for unit in ("avx2", "avx512_bf16", "amx_bf16") if unit in flags]
    name = fields.get("model name", platform.processor())
    return f"{name}, {os.cpu_count()} cores, {' '.join(units)}"


def _git(folder: Path, *arguments: str) -> str:
    found = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def _write_yaml(path: Path, values: object) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


if __name__ == "__main__":
    main()
