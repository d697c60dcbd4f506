"""The command ``plan``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_markup.config import load_config

if TYPE_CHECKING:
    from icl_markup.plan import Duration, Forecast, Plan

DESCRIPTION = """What a warm-up will cost: parameters, memory by part, FLOPs and time. Of the backbone, config.json and
the tokenizer are read, no weights. Options that are not listed here override keys of the configuration, as for warmup
(--optimiser.steps 500)."""


def add_command(commands: Any) -> None:
    """Declare the command."""
    plan = commands.add_parser(
        "plan", help="tell what a warm-up will cost", description=DESCRIPTION, allow_abbrev=False
    )
    plan.add_argument("config", help="the YAML file of a warm-up")
    plan.add_argument("--accelerators", nargs="+", default=["here"], metavar="NAME",
                      help="here: this machine, which is measured (default); or h100, a100-80, l4 …")  # fmt: skip
    plan.add_argument("--processes", nargs="+", type=int, default=[1], metavar="N", help="numbers of processes, each "
                      "with an accelerator of its own (default: 1)")  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    plan.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace, overrides: Sequence[str] = ()) -> None:
    """Plan a warm-up and print the plan; errors as in `icl_markup.plan.plan_warmup`."""
    from icl_markup.plan import plan_warmup
    from icl_markup.warmup_config import WarmupConfig

    plan = plan_warmup(load_config(WarmupConfig, args.config, overrides), args.accelerators, args.processes)
    if args.json:
        print(json.dumps(as_dict(plan), ensure_ascii=False))
    else:
        print_plan(plan)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data: bytes, FLOPs and seconds, with the totals that are sums."""
    data = asdict(plan)
    for told, forecast in zip(data["forecasts"], plan.forecasts, strict=True):
        told["memory"]["total"] = forecast.memory.total
        told["flops"]["total"] = forecast.flops.total
    return data


def print_plan(plan: Plan) -> None:
    """Print a plan as tables."""
    console = Console()
    table = _table("parameters", plan.backbone, plan.kind)
    for name, count in asdict(plan.parameters).items():
        table.add_row("", name, f"{count:,}")
    console.print(table)
    batches = plan.batches
    console.print(
        f"a batch: {batches.prompts:.1f} prompts, {batches.tokens:,.0f} tokens, {batches.padding:.1%} padding, longest "
        f"{batches.longest} (of {batches.batches_seen}); composing takes {1000 * plan.compose_seconds:.2g} ms an "
        f"episode here",
        highlight=False,
        soft_wrap=True,
    )
    for forecast in plan.forecasts:
        _print_forecast(console, forecast)
    table = _table("accelerator", "processes", "batches a step", "step", "tokens a second", "validation",
                   f"{plan.steps} steps, {plan.validations} validations", "memory")  # fmt: skip
    for one in plan.durations:
        table.add_row(*_told(one))
    console.print(table)
    if any(one.accelerator == "here" for one in plan.durations):
        console.print("here: of this machine's rates, which were measured", highlight=False, soft_wrap=True)
    if any(one.accelerator != "here" for one in plan.durations):
        console.print(
            "other accelerators: of data sheets, with assumed shares of their peaks (icl_markup.costs); not "
            "measured", highlight=False, soft_wrap=True
        )  # fmt: skip


def _print_forecast(console: Console, forecast: Forecast) -> None:
    quantised = "" if forecast.quantisation == "none" else f", {forecast.quantisation}"
    device = {"cpu": "CPU", "cuda": "GPU", "cuda without bf16": "GPU without bf16"}[forecast.target]
    autocast = "no autocast" if forecast.precision == "none" else f"autocast {forecast.precision}"
    table = _table(f"on a {device}", f"{forecast.dtype}{quantised}, {autocast}, attention {forecast.attention}", "")
    parts = {**asdict(forecast.memory), "total": forecast.memory.total}
    for name, size in parts.items():
        table.add_row("memory" if name == "weights" else "", name, f"{size / 2**20:,.1f} MiB")
    flops = {**asdict(forecast.flops), "total": forecast.flops.total}
    for name, count in flops.items():
        table.add_row("a batch" if name == "forward" else "", name, f"{count / 1e9:,.2f} GFLOP")
    console.print(table)


def _told(one: Duration) -> list[str]:
    fits = {None: "", True: "enough", False: "not enough"}[one.fits]
    validation = _time(one.validation_seconds) if one.validation_seconds else "none"
    return [one.accelerator, str(one.processes), str(one.batches_per_step), _time(one.step_seconds),
            f"{one.tokens_per_second:,.0f}", validation, _time(one.total_seconds), fits]  # fmt: skip


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if number < 2 else "right")
    return table
